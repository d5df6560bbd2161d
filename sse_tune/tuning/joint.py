"""Whole plans proposed at once, outer choices and all stages together: what the decomposed search is held against."""

from __future__ import annotations

import math
import random

import optuna
from optuna.trial import TrialState

from sse_tune.plan import Plan
from sse_tune.space import Config
from sse_tune.tuning.candidates import Candidate
from sse_tune.tuning.recorded import Recorded
from sse_tune.tuning.samplers import Axis, make_sampler, quiet
from sse_tune.tuning.strategy import Proposer

_PROPOSALS = {"tpe": 100, "random": 100, "gp": 3}


class Joint(Proposer):
    """The default first, then what a sampler proposes in the product of all spaces.

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
        self._axes: list[tuple[str | None, Axis]] = []
        self._fixed: list[tuple[str | None, str, object]] = []
        groups = [(None, recorded.outer.params)]
        groups += [(stage, recorded.slots(stage)[0].space.params) for stage in recorded.stages]  # type: ignore[misc]
        for stage, params in groups:
            for param in params:
                if len(param.values) > 1:
                    self._axes.append((stage, Axis.of(param.name, param.values)))
                else:
                    self._fixed.append((stage, param.name, param.values[0]))
        self._distributions = {f"{stage}.{axis.name}": axis.distribution for stage, axis in self._axes}
        with quiet():
            self._study = optuna.create_study(sampler=make_sampler(sampler, seed))
        self._told: dict[Plan, float | None] = {}
        self._trial: optuna.Trial | None = None
        self._first: Plan | None = self._base

    def ask(self) -> Candidate | None:
        if self._first is not None:
            plan, self._first = self._first, None
            return Candidate("plan", plan)
        if len(self._told) >= self.recorded.plans:
            self.finished = True
            return None
        for _ in range(_PROPOSALS[self.sampler]):
            with quiet():
                trial = self._study.ask(self._distributions)
            proposed = self._plan({name: trial.params[name] for name in self._distributions})
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
        params = {
            f"{stage}.{axis.name}": axis.code(self._config_of(candidate.plan, stage)[axis.name])
            for stage, axis in self._axes
        }
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

    def _config_of(self, plan: Plan, stage: str | None) -> Config:
        return plan.outer if stage is None else plan.stages[stage].config

    def _plan(self, codes: dict[str, int | str]) -> Plan | None:
        """The plan that a proposal means; None: it was not recorded, being against a constraint."""
        values: dict[str | None, dict] = {}
        for stage, name, value in self._fixed:
            values.setdefault(stage, {})[name] = value
        for stage, axis in self._axes:
            values.setdefault(stage, {})[axis.name] = axis.value(codes[f"{stage}.{axis.name}"])
        outer = Config(values.get(None, {}))
        if outer not in self.recorded.outers:
            return None
        stages = {}
        for stage in self.recorded.stages:
            slot = self.recorded.slots(stage)[0]
            config = Config({param.name: values[stage][param.name] for param in slot.space.params})
            if slot.space.violations(self.recorded.problem, config, self.recorded.device, outer):
                return None
            stages[stage] = slot.choice(config)
        return Plan(self._base.graph, outer, stages)

    def _any_plan(self) -> Plan:
        while True:
            outer = self._random.choice(self.recorded.outers)
            stages = {}
            for stage in self.recorded.stages:
                slot = self.recorded.slots(stage)[0]
                configs = list(slot.space.configs(self.recorded.problem, self.recorded.device, outer))
                stages[stage] = slot.choice(self._random.choice(configs))
            plan = Plan(self._base.graph, outer, stages)
            if plan not in self._told:
                return plan
