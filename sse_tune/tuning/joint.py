"""Whole plans proposed at once, outer choices and all stages together: what the decomposed search is held against."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable

import optuna
from optuna.trial import TrialState

from sse_tune.plan import Plan, StageChoice
from sse_tune.space import Config, Param, Value
from sse_tune.tuning.candidates import Candidate
from sse_tune.tuning.landscape import Slot
from sse_tune.tuning.recorded import Recorded
from sse_tune.tuning.samplers import Axis, make_sampler, quiet
from sse_tune.tuning.strategy import Proposer

_PROPOSALS = {"tpe": 100, "random": 100, "gp": 3}
Codes = dict[str, int | str]


@dataclasses.dataclass(frozen=True)
class _Group:
    """The parameters of the outer choices or of one template, as Optuna sees them: `prefix` + name."""

    prefix: str
    names: tuple[str, ...]
    axes: tuple[Axis, ...]
    fixed: tuple[tuple[str, Value], ...]

    @classmethod
    def of(cls, prefix: str, params: tuple[Param, ...], recorded: Iterable[Config]) -> _Group:
        """Values that no recorded config has are left out: proposals of them would only cost time."""
        present = {param.name: {config[param.name] for config in recorded} for param in params}
        values = {param.name: tuple(v for v in param.values if v in present[param.name]) for param in params}
        axes = tuple(Axis.of(name, some) for name, some in values.items() if len(some) > 1)
        fixed = tuple((name, some[0]) for name, some in values.items() if len(some) == 1)
        return cls(prefix, tuple(param.name for param in params), axes, fixed)

    def config(self, codes: Codes) -> Config:
        values = dict(self.fixed) | {axis.name: axis.value(codes[self.prefix + axis.name]) for axis in self.axes}
        return Config({name: values[name] for name in self.names})

    def codes(self, config: Config) -> Codes:
        return {self.prefix + axis.name: axis.code(config[axis.name]) for axis in self.axes}


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A stage's templates. Where there are several, the choice among them is one more category; the parameters of
    those that are not chosen are proposed too and mean nothing."""

    name: str
    slots: tuple[Slot, ...]
    groups: tuple[_Group, ...]
    template: Axis | None

    @classmethod
    def of(cls, name: str, slots: tuple[Slot, ...], recorded: Recorded) -> _Stage:
        titles = tuple(f"{slot.backend}:{slot.template}" for slot in slots)
        prefixes = [f"{name}."] if len(slots) == 1 else [f"{name}.{title}." for title in titles]
        groups = tuple(
            _Group.of(prefix, slot.space.params, recorded.configs_of(name, slot))
            for slot, prefix in zip(slots, prefixes)
        )
        return cls(name, slots, groups, Axis.of("template", titles) if len(slots) > 1 else None)

    @property
    def key(self) -> str:
        return f"{self.name}:template"

    def number(self, codes: Codes) -> int:
        """Which template is meant."""
        return 0 if self.template is None else self.template.codes.index(codes[self.key])

    def codes(self, choice: StageChoice) -> Codes:
        names = [(slot.backend, slot.template) for slot in self.slots]
        chosen = names.index((choice.backend, choice.template))
        found: Codes = {} if self.template is None else {self.key: self.template.codes[chosen]}
        for number, (slot, group) in enumerate(zip(self.slots, self.groups)):
            declared = Config({param.name: param.default for param in slot.space.params})
            found |= group.codes(choice.config if number == chosen else declared)
        return found


class Joint(Proposer):
    """The default first, then what a sampler proposes in the product of all spaces, the choice of templates included.

    Proposals that are not possible are told as such, and known ones again what they took; neither counts. When only
    such proposals come, a possible plan is drawn at random.

    Args:
        recorded: what can be chosen.
        sampler: "tpe", "gp" or "random".
        seed: of it.
    """

    def __init__(self, recorded: Recorded, sampler: str, seed: int) -> None:
        super().__init__()
        self.recorded, self.sampler = recorded, sampler
        self._random = random.Random(seed)
        self._base = recorded.base(None)
        self._plans = recorded.plans
        self._outer = _Group.of("None.", recorded.outer.params, recorded.outers)
        self._stages = [_Stage.of(stage, recorded.slots(stage), recorded) for stage in recorded.stages]
        self._distributions = {self._outer.prefix + axis.name: axis.distribution for axis in self._outer.axes}
        for stage in self._stages:
            if stage.template is not None:
                self._distributions[stage.key] = stage.template.distribution
            self._distributions |= {g.prefix + axis.name: axis.distribution for g in stage.groups for axis in g.axes}
        with quiet():
            self._study = optuna.create_study(sampler=make_sampler(sampler, seed))
        self._told: dict[Plan, float | None] = {}
        self._trial: optuna.Trial | None = None
        self._first: Plan | None = self._base

    def ask(self) -> Candidate | None:
        if self._first is not None:
            plan, self._first = self._first, None
            return Candidate("plan", plan)
        if len(self._told) >= self._plans:
            self.finished = True
            return None
        for _ in range(_PROPOSALS[self.sampler]):
            with quiet():
                trial = self._study.ask(self._distributions)
            proposed = self._plan(trial.params)
            if proposed is not None and proposed not in self._told:
                self._trial = trial
                return Candidate("plan", proposed)
            self._close(trial, None if proposed is None else self._told[proposed])
        return Candidate("plan", self._any_plan())

    def tell(self, candidate: Candidate, time_us: float | None) -> None:
        self._told[candidate.plan] = time_us
        if time_us is not None:
            self.plan_times[candidate.plan] = time_us
        trial, self._trial = self._trial, None
        if trial is not None:
            self._close(trial, time_us)
            return
        params = self._outer.codes(candidate.plan.outer)
        for stage in self._stages:
            params |= stage.codes(candidate.plan.stages[stage.name])
        self._study.add_trial(
            optuna.trial.create_trial(
                params=params, distributions=self._distributions, value=self._objective(time_us),
                constraints={"constraints": float(time_us is None)}, state=TrialState.COMPLETE,
            )
        )  # fmt: skip

    def _close(self, trial: optuna.Trial, time_us: float | None) -> None:
        trial.set_constraint("constraints", float(time_us is None))
        self._study.tell(trial, self._objective(time_us))

    def _objective(self, time_us: float | None) -> float:
        worst = max((value for value in self._told.values() if value is not None), default=1.0)
        return math.log(2 * worst if time_us is None else time_us)

    def _plan(self, codes: Codes) -> Plan | None:
        """The plan that a proposal means; None: it was not recorded, being against a constraint."""
        outer = self._outer.config(codes)
        if outer not in self.recorded.outers:
            return None
        stages = {}
        for stage in self._stages:
            number = stage.number(codes)
            choice = stage.slots[number].choice(stage.groups[number].config(codes))
            if not self.recorded.has(stage.name, outer, choice):
                return None
            stages[stage.name] = choice
        return Plan(self._base.graph, outer, stages)

    def _any_plan(self) -> Plan:
        while True:
            outer = self._random.choice(self.recorded.outers)
            stages = {name: self._random.choice(self.recorded.choices(name, outer)) for name in self.recorded.stages}
            plan = Plan(self._base.graph, outer, stages)
            if plan not in self._told:
                return plan
