"""`sweep`: measures every config of some stages, or of a backend's whole plans, and gathers them for `replay.py`.

With `whole_plans` it goes on to the whole plans that the configs of the stages make, each measured end to end.

It goes the way of a search: candidates are admitted and timed in worker processes, claimed and stored as trials of the
same study. So it goes on where it was stopped, and a search that resumes profits from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
import random
from collections.abc import Hashable, Sequence

import torch

from sse_tune.database.keys import sources_of, study_key, toolchain_of
from sse_tune.database.records import now
from sse_tune.database.store import TuningDatabase
from sse_tune.device import Device, toolchain
from sse_tune.errors import ConstraintError, SearchError
from sse_tune.plan import Plan, StageChoice
from sse_tune.problem import Problem
from sse_tune.space import Config, Param
from sse_tune.tuning.candidates import Candidate
from sse_tune.tuning.engine import Engine
from sse_tune.tuning.evaluate import Evaluator
from sse_tune.tuning.landscape import Landscape, Slot, Templates
from sse_tune.tuning.lanes import Lanes
from sse_tune.tuning.machine import backends_for, compilers_for, detect, workers_for
from sse_tune.tuning.recorder import Progress, Recorder
from sse_tune.tuning.strategy import Strategy
from sse_tune.tuning.sweep_file import Sweep
from sse_tune.tuning.sweep_spaces import RecordedSpace, Row

_NOTE = "the default plan passed the quick cases; each config in it, and each combination, `ordinary` alone"


def sweep(
    problem: Problem,
    *,
    stages: Sequence[str] | None = None,
    every_outer: bool = False,
    nearest: int | None = None,
    whole_plans: bool = False,
    backends: Sequence[str] | None = None,
    database: TuningDatabase | str | pathlib.Path | None = None,
    device: Device | torch.device | str | Sequence[str] | None = None,
    progress: Progress | None = None,
    how: dict[str, object] | None = None,
) -> Sweep:
    """Measure every config of some spaces on this machine; trials that are there are not made again.

    Args:
        problem: what is computed.
        stages: the stages to measure; None: all.
        every_outer: at each outer point that the roofline leaves, not at the default one alone.
        nearest: of each template only so many configs, those nearest to its default; None: all.
        whole_plans: measure each combination of the configs that ran too, end to end, all other stages at their
            defaults. It is admitted by the case "ordinary" alone, as each of its configs was: what is recorded is time.
        backends: of one stage graph; None: Triton on a GPU, torch on a CPU.
        database, device, progress: as in `search`.
        how: kept with the sweep: the command, ...

    Raises:
        SearchError: there is no such stage, fewer than two to combine, or no base plan was admitted.
        KeyboardInterrupt: what was measured is in the database.
    """
    with contextlib.ExitStack() as stack:
        opened = database
        if not isinstance(opened, TuningDatabase):
            opened = stack.enter_context(TuningDatabase(database))  # type: ignore[arg-type]
        lanes = Lanes(workers_for(device))
        stack.callback(lanes.close)
        found = detect(lanes, device)
        chosen = backends_for(backends, found)
        study = opened.open_study(study_key(problem, found, chosen), problem, found, {"sweep": True})
        recorder = Recorder(opened, study, problem, resume=True, budget_s=float("inf"), progress=progress)
        stack.callback(recorder.close)
        ahead = compilers_for(chosen, found)
        if ahead is not None:
            stack.enter_context(ahead)
        engine = Engine(Evaluator(problem, found, recorder), ahead, lanes)
        everything = Everything(Templates(problem, found, chosen), stages, every_outer, nearest, whole_plans)
        try:
            engine.run(everything, 1.0)
        except KeyboardInterrupt:
            recorder.interrupt()
            raise
        spaces = everything.spaces(recorder)
        if not spaces:
            raise SearchError("some base plan must be admitted", "none", "run `sse-tune check` for the whole story")
        ran: dict[str, dict[str, str]] = {"toolchain": {}, "sources": {}}
        for plan in everything.of_each_template():
            ran["toolchain"] |= toolchain_of(plan, toolchain())
            ran["sources"] |= sources_of(plan)
        return Sweep(
            problem=problem, device=found.slug, arch=found.arch, **ran, created=now(),
            how={**(how or {}), **({"whole_plans": _NOTE} if whole_plans else {})}, spaces=spaces,
            plans=everything.whole_plans(recorder),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Covered:
    """A template's configs for a stage, at the base where they are measured."""

    stage: str
    slot: Slot
    base: Plan
    configs: tuple[Config, ...]

    def candidate(self, config: Config) -> Candidate:
        plan = self.base.replace_stage(self.stage, self.slot.choice(config))
        return Candidate("plan", plan) if plan.graph == "whole" else Candidate("stage", plan, self.base, self.stage)


class Everything(Strategy):
    """Asks for each base plan, and at each that is admitted for the configs of the stages, each contract once; then,
    where they are to be combined, for every plan of those that ran."""

    def __init__(
        self,
        landscape: Landscape,
        stages: Sequence[str] | None,
        every_outer: bool,
        nearest: int | None = None,
        whole_plans: bool = False,
    ) -> None:
        super().__init__()
        self.landscape, self.nearest, self._combines = landscape, nearest, whole_plans
        default = landscape.base(None)
        self.stages = tuple(default.stages) if stages is None else tuple(dict.fromkeys(stages))
        unknown = [stage for stage in self.stages if stage not in default.stages]
        if unknown:
            known = ", ".join(default.stages)
            raise SearchError("the stages must be the problem's", ", ".join(unknown), f"use {known}")
        if whole_plans and (stages is None or len(self.stages) < 2):
            raise SearchError("two or more stages must be named, for their configs to be combined",
                              ", ".join(stages or ()) or "none", "name each with --stage")  # fmt: skip
        if nearest is not None and nearest < 1:
            raise SearchError("a config of each template must be left", f"nearest={nearest}", "ask for 1 or more")
        outers = landscape.outer.configs(landscape.problem, landscape.device) if every_outer else ()
        # how far stages add up to plans can be said only where the slow ones were measured as well as the others
        self.gives_up = not whole_plans
        self._bases: list[Plan] = []
        for outer in dict.fromkeys((default.outer, *outers)):
            with contextlib.suppress(ConstraintError):
                self._bases.append(landscape.base(outer))
        self._to_ask = [Candidate("plan", base) for base in self._bases]
        self._asked = self._told = 0
        self._total = len(self._to_ask)
        self._base_times: dict[Plan, float | None] = {}
        self._covered: dict[tuple[str, str, str, Hashable], _Covered] = {}
        self._looked_at = 0
        self._ran: set[tuple[object, StageChoice]] = set()
        self._combinations: dict[Plan, list[Plan]] | None = None

    @property
    def admitted(self) -> list[Plan]:
        """The base plans that are, the default first."""
        return [base for base in self._bases if self._base_times.get(base) is not None]

    def ask(self) -> Candidate | None:
        if not self._to_ask and self._told == self._asked and self._combines and self._combinations is None:
            self._combinations = {base: self._combined(base) for base in self.admitted}
            plans = [plan for combined in self._combinations.values() for plan in combined]
            # a machine that drifts must not make neighbours in the space alike
            random.Random(0).shuffle(plans)
            self._add([Candidate("combination", plan) for plan in plans])
        if self._to_ask:
            self._asked += 1
            return self._to_ask.pop(0)
        self.finished = self._told == self._asked
        return None

    def tell(self, candidate: Candidate, time_us: float | None) -> None:
        self._told += 1
        if candidate.stage is not None and time_us is not None:
            contract = self.landscape.contract(candidate.stage, candidate.plan.outer)
            self._ran.add(((candidate.stage, contract), candidate.plan.stages[candidate.stage]))
        if candidate.kind == "plan" and candidate.plan in self._bases and candidate.plan not in self._base_times:
            self._base_times[candidate.plan] = time_us
            # in the order of the bases, whichever is measured first: a resumed sweep covers the same
            while self._looked_at < len(self._bases) and self._bases[self._looked_at] in self._base_times:
                base = self._bases[self._looked_at]
                self._looked_at += 1
                if self._base_times[base] is not None:
                    self._add(self._cover(base))

    def stop(self) -> None:
        raise AssertionError("a sweep has no budget")

    def withdraw(self, candidate: Candidate) -> bool:
        raise AssertionError("a sweep has no budget")

    def progress(self) -> tuple[str, int, int]:
        return "sweep" if self._combinations is None else "whole plans", self._told, self._total

    def spaces(self, recorder: Recorder) -> tuple[RecordedSpace, ...]:
        """What was measured of the stages, from the trials."""
        spaces = []
        for covered in self._covered.values():
            slot, outer = covered.slot, covered.base.outer
            rows = {config: _row(recorder, covered.candidate(config)) for config in covered.configs}
            default = slot.space.default(self.landscape.problem, self.landscape.device, outer)
            params = tuple(
                Param(param.name, param.values, default[param.name], param.doc) for param in slot.space.params
            )
            spaces.append(RecordedSpace(covered.stage, slot.backend, slot.template, outer, params, rows))
        return tuple(spaces)

    def whole_plans(self, recorder: Recorder) -> dict[Plan, Row]:
        """What was measured of the combinations: plans with the stages of the sweep alone."""
        rows = {}
        for plan in itertools.chain.from_iterable((self._combinations or {}).values()):
            kept = dataclasses.replace(plan, stages={stage: plan.stages[stage] for stage in self.stages})
            rows[kept] = _row(recorder, Candidate("combination", plan))
        return rows

    def of_each_template(self) -> list[Plan]:
        """Plans that use every template that was measured."""
        return [covered.candidate(covered.configs[0]).plan for covered in self._covered.values()]

    def _add(self, candidates: Sequence[Candidate]) -> None:
        self._to_ask += candidates
        self._total += len(candidates)

    def _cover(self, base: Plan) -> list[Candidate]:
        """The candidates at an admitted base whose contract was not covered at another."""
        problem, device = self.landscape.problem, self.landscape.device
        wanted = []
        for stage in self.stages:
            # GLA that recomputes its states has other stages than GLA that stores them
            for slot in self.landscape.slots(stage) if stage in base.stages else ():
                key = (stage, slot.backend, slot.template, self.landscape.contract(stage, base.outer))
                if key in self._covered:
                    continue
                configs = slot.space.by_nearness(problem, device, base.outer)[: self.nearest]
                if configs:
                    covered = self._covered[key] = _Covered(stage, slot, base, configs)
                    wanted += [covered.candidate(config) for config in configs]
        return wanted

    def _combined(self, base: Plan) -> list[Plan]:
        """Every plan of the configs that ran at the contracts of a base; none where it lacks a stage."""
        if any(stage not in base.stages for stage in self.stages):
            return []
        choices = []
        for stage in self.stages:
            seen = (stage, self.landscape.contract(stage, base.outer))
            choices.append([
                choice for (name, _, _, contract), covered in self._covered.items() if (name, contract) == seen
                for choice in map(covered.slot.choice, covered.configs) if (seen, choice) in self._ran
            ])  # fmt: skip
        return [
            dataclasses.replace(base, stages={**base.stages, **dict(zip(self.stages, chosen))})
            for chosen in itertools.product(*choices)
        ]


def _row(recorder: Recorder, candidate: Candidate) -> Row:
    attempt = recorder.lookup(candidate)
    assert attempt is not None, "every candidate was told"
    return Row(attempt.outcome, attempt.reason, tuple(attempt.timings_us))
