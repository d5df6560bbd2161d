"""A recorded sweep in the place of a machine: what can be chosen, and what it took.

A plan takes what was measured end to end, where the sweep has whole plans; else, of several stages, their sum, as far
as they are recorded. Answers may be blurred by noise, seeded.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Collection, Hashable

from sse_tune.device import ARCHS, Device
from sse_tune.errors import ConstraintError
from sse_tune.plan import Plan, StageChoice
from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.stages import GRAPHS, stage_contract, stage_names
from sse_tune.tuning.candidates import Candidate
from sse_tune.tuning.landscape import Slot, fastest_predicted, of_other_stages
from sse_tune.tuning.sweep_file import Sweep
from sse_tune.tuning.sweep_spaces import RecordedSpace, Row
from sse_tune.tuning.workload import Workload

_Key = tuple[str, str, str, Hashable]
_RECORDED = "the config must be one that was recorded"


class Recorded:
    """The landscape of a sweep, and its answers.

    Args:
        sweep: the recording.
        noise: of each answer: standard deviation of its logarithm, 0.02 for about 2 %.
        seed: of the noise.
    """

    def __init__(self, sweep: Sweep, noise: float = 0.0, seed: int = 0) -> None:
        self.problem = sweep.problem
        self.device = ARCHS.get(sweep.arch) or Device("cpu", sweep.device, sweep.arch, 1)
        self.graph = "whole" if sweep.spaces[0].stage == "whole" else "staged"
        self.noise, self._random = noise, random.Random(seed)
        self._contracts: dict[tuple[str, Config], Hashable] = {}
        self._choices: dict[tuple[str, Hashable], tuple[StageChoice, ...]] = {}
        self._spaces: dict[_Key, RecordedSpace] = {}
        for space in sweep.spaces:
            self._spaces[self._key(space.stage, space.backend, space.template, space.outer)] = space
        self.stages = tuple(dict.fromkeys(space.stage for space in sweep.spaces))
        known, with_plans = self._known_outers({space.outer for space in sweep.spaces}), {p.outer for p in sweep.plans}
        self.outers = [outer for outer in known if outer in with_plans] if sweep.plans else known
        self._plan_rows = sweep.plans
        self._slots = {stage: self._slots_of(stage) for stage in self.stages}

    @property
    def outer(self) -> Space:
        return Space(GRAPHS[self.graph].params, (Constraint(_RECORDED, lambda p, c, d: c in self.outers),))

    def base(self, outer: Config | None) -> Plan:
        if outer is None:
            declared = GRAPHS[self.graph].default(self.problem, self.device)
            outer = declared if declared in self.outers else self.outers[0]
        if outer not in self.outers:
            raise ConstraintError(_RECORDED, f"{dict(outer)}", "record it")
        return Plan(self.graph, outer, {stage: self._at(stage, outer)[0].default for stage in self.stages})

    def promising(self, without: Collection[Config] = ()) -> Config | None:
        outers = of_other_stages(self.graph, self.problem, self.outers, without)
        return fastest_predicted(Workload.of(self.problem), self.device, self.base(None).outer, outers)

    def slots(self, stage: str) -> tuple[Slot, ...]:
        return self._slots[stage]

    def contract(self, stage: str, outer: Config) -> Hashable:
        if (stage, outer) not in self._contracts:
            self._contracts[stage, outer] = stage_contract(stage, self.problem, outer)
        return self._contracts[stage, outer]

    def answer_us(self, candidate: Candidate) -> float | None:
        """What measuring a candidate would have said; None: it failed."""
        exact = self.exact_us(candidate.plan, candidate.stage)
        return None if exact is None else exact * math.exp(self._random.gauss(0.0, self.noise))

    def exact_us(self, plan: Plan, stage: str | None = None) -> float | None:
        """The recorded time of a plan, or of one of its stages; None: it failed, or a part of it did."""
        if stage is None and self._plan_rows:
            whole = self._plan_rows.get(plan)
            return None if whole is None else whole.time_us
        total = 0.0
        for name in self.stages if stage is None else (stage,):
            choice = plan.stages[name]
            row = self._row(name, choice.backend, choice.template, plan.outer, choice.config)
            if row is None or row.time_us is None:
                return None
            total += row.time_us
        return total

    def best_us(self) -> float:
        """Of the fastest plan there is."""
        if self._plan_rows:
            at = [row.time_us for plan, row in self._plan_rows.items() if plan.outer in self.outers]
            return min((time_us for time_us in at if time_us is not None), default=math.inf)
        return min(
            sum(
                min(
                    (row.time_us for space in self._at(stage, outer) for row in space.rows.values() if row.time_us),
                    default=math.inf,
                )
                for stage in self.stages
            )
            for outer in self.outers
        )

    def has(self, stage: str, outer: Config, choice: StageChoice) -> bool:
        """Whether a choice passes the constraints, and so was recorded."""
        return self._row(stage, choice.backend, choice.template, outer, choice.config) is not None

    def choices(self, stage: str, outer: Config) -> tuple[StageChoice, ...]:
        """All that can be chosen for a stage, of every template."""
        key = (stage, self.contract(stage, outer))
        if key not in self._choices:
            self._choices[key] = tuple(space.choice(c) for space in self._at(stage, outer) for c in space.rows)
        return self._choices[key]

    def configs_of(self, stage: str, slot: Slot) -> tuple[Config, ...]:
        """What was recorded of a template, at any outer point."""
        wanted = (stage, slot.backend, slot.template)
        return tuple(config for key, space in self._spaces.items() if key[:3] == wanted for config in space.rows)

    @property
    def has_whole_plans(self) -> bool:
        """Whether plans have times of their own, which their stages' need not add up to."""
        return bool(self._plan_rows)

    @property
    def configs(self) -> int:
        """How many configs there are, each stage by itself and once for each contract."""
        return sum(len(space.rows) for space in self._spaces.values())

    @functools.cached_property
    def plans(self) -> int:
        """How many whole plans there are."""
        return sum(
            math.prod(sum(len(space.rows) for space in self._at(stage, outer)) for stage in self.stages)
            for outer in self.outers
        )

    def _known_outers(self, recorded: set[Config]) -> list[Config]:
        """Every outer point that has the stages, all of them known: recorded there or at one of the same contract. Of
        points that no stage tells apart, as stages that were not recorded may, the recorded one stands for all."""
        declared = [
            outer
            for outer in GRAPHS[self.graph].configs(self.problem, self.device)
            if set(self.stages) <= set(stage_names(self.graph, self.problem, outer))
            and all(self._at(stage, outer) for stage in self.stages)
        ]
        told_apart: dict[tuple[Hashable, ...], Config] = {}
        for outer in sorted(declared, key=lambda outer: outer not in recorded):
            told_apart.setdefault(tuple(self.contract(stage, outer) for stage in self.stages), outer)
        return [outer for outer in declared if outer in told_apart.values()]

    def _row(self, stage: str, backend: str, template: str, outer: Config, config: Config) -> Row | None:
        space = self._spaces.get(self._key(stage, backend, template, outer))
        return None if space is None else space.rows.get(config)

    def _at(self, stage: str, outer: Config) -> list[RecordedSpace]:
        if stage not in stage_names(self.graph, self.problem, outer):
            return []
        wanted = (stage, self.contract(stage, outer))
        return [space for (name, _, _, contract), space in self._spaces.items() if (name, contract) == wanted]

    def _key(self, stage: str, backend: str, template: str, outer: Config) -> _Key:
        return stage, backend, template, self.contract(stage, outer)

    def _slots_of(self, stage: str) -> tuple[Slot, ...]:
        """A space for each template: its declared parameters, and that a config was recorded at the outer point."""
        slots = []
        shared = {param.name for param in GRAPHS[self.graph].params}
        of_stage = [space for space in self._spaces.values() if space.stage == stage]
        firsts: dict[tuple[str, str], RecordedSpace] = {}
        for space in of_stage:
            firsts.setdefault((space.backend, space.template), space)
        for first in firsts.values():

            def recorded(
                p: Problem,
                joint: Config,
                d: Device,
                backend: str = first.backend,
                template: str = first.template,
                names: tuple[str, ...] = tuple(param.name for param in first.params),
            ) -> bool:
                outer = Config({name: value for name, value in joint.items() if name in shared})
                own = Config({name: joint[name] for name in names})
                return self._row(stage, backend, template, outer, own) is not None

            params = tuple(Param(param.name, param.values, param.default, param.name) for param in first.params)
            slots.append(Slot(first.backend, first.template, Space(params, (Constraint(_RECORDED, recorded),))))
        return tuple(slots)
