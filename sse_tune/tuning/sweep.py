"""`sweep`: measures every config of some stages, or of a backend's whole plans, and gathers them for `replay.py`.

It goes the way of a search: candidates are admitted and timed in worker processes, claimed and stored as trials of the
same study. So it goes on where it was stopped, and a search that resumes profits from it.
"""

from __future__ import annotations

import contextlib
import itertools
import pathlib
from collections.abc import Iterator, Sequence

import torch

from sse_tune.database.keys import sources_of, study_key, toolchain_of
from sse_tune.database.records import now
from sse_tune.database.store import TuningDatabase
from sse_tune.device import Device, toolchain
from sse_tune.errors import ConstraintError, SearchError
from sse_tune.plan import Plan
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
from sse_tune.tuning.sweep_file import RecordedSpace, Row, Sweep


def sweep(
    problem: Problem,
    *,
    stages: Sequence[str] | None = None,
    every_outer: bool = False,
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
        backends: of one stage graph; None: Triton on a GPU, torch on a CPU.
        database, device, progress: as in `search`.
        how: kept with the sweep: the command, ...

    Raises:
        SearchError: there is no such stage, or no base plan was admitted.
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
        everything = Everything(Templates(problem, found, chosen), stages, every_outer)
        try:
            engine.run(everything, 1.0)
        except KeyboardInterrupt:
            recorder.interrupt()
            raise
        spaces = everything.spaces(recorder)
        if not spaces:
            raise SearchError("some base plan must be admitted", "none", "run `sse-tune check` for the whole story")
        plan = everything.admitted[0]
        return Sweep(
            problem=problem, device=found.slug, arch=found.arch, toolchain=toolchain_of(plan, toolchain()),
            sources=sources_of(plan), created=now(), how=dict(how or {}), spaces=spaces,
        )  # fmt: skip


class Everything(Strategy):
    """Asks for each base plan, and at each that is admitted for every config of the stages; each contract once."""

    def __init__(self, landscape: Landscape, stages: Sequence[str] | None, every_outer: bool) -> None:
        super().__init__()
        self.landscape = landscape
        default = landscape.base(None)
        self.stages = tuple(default.stages) if stages is None else tuple(stages)
        unknown = [stage for stage in self.stages if stage not in default.stages]
        if unknown:
            known = ", ".join(default.stages)
            raise SearchError("the stages must be the problem's", ", ".join(unknown), f"use {known}")
        outers = landscape.outer.configs(landscape.problem, landscape.device) if every_outer else ()
        self._outers = list(dict.fromkeys((default.outer, *outers)))
        self.admitted: list[Plan] = []
        self._covered: dict[object, tuple[str, Slot, Plan, tuple[Config, ...]]] = {}
        self._left: Iterator[Candidate] = iter(())
        self._waiting: Plan | None = None
        self._done = self._total = 0

    def ask(self) -> Candidate | None:
        if self._waiting is not None:
            return None
        candidate = next(self._left, None)
        if candidate is not None:
            return candidate
        while self._outers:
            with contextlib.suppress(ConstraintError):
                self._waiting = self.landscape.base(self._outers.pop(0))
                self._total += 1
                return Candidate("plan", self._waiting)
        self.finished = True
        return None

    def tell(self, candidate: Candidate, time_us: float | None) -> None:
        self._done += 1
        if candidate.plan == self._waiting:
            self._waiting = None
            if time_us is not None:
                self.admitted.append(candidate.plan)
                self._left = itertools.chain(self._left, iter(self._cover(candidate.plan)))

    def stop(self) -> None:
        raise AssertionError("a sweep has no budget")

    def withdraw(self, candidate: Candidate) -> bool:
        raise AssertionError("a sweep has no budget")

    def progress(self) -> tuple[str, int, int]:
        return "sweep", self._done, self._total

    def spaces(self, recorder: Recorder) -> tuple[RecordedSpace, ...]:
        """What was measured, from the trials."""
        spaces = []
        for stage, slot, base, configs in self._covered.values():
            rows = {}
            for config in configs:
                attempt = recorder.lookup(self._candidate(stage, slot, base, config))
                assert attempt is not None, "every config was told"
                rows[config] = Row(attempt.outcome, attempt.reason, tuple(attempt.timings_us))
            default = slot.space.default(self.landscape.problem, self.landscape.device, base.outer)
            params = tuple(
                Param(param.name, param.values, default[param.name], param.doc) for param in slot.space.params
            )
            spaces.append(RecordedSpace(stage, slot.backend, slot.template, base.outer, params, rows))
        return tuple(spaces)

    def _cover(self, base: Plan) -> list[Candidate]:
        """The candidates at an admitted base whose contract was not covered at another."""
        problem, device = self.landscape.problem, self.landscape.device
        wanted = []
        for stage in self.stages:
            for slot in self.landscape.slots(stage):
                key = (stage, slot.backend, slot.template, self.landscape.contract(stage, base.outer))
                if key not in self._covered:
                    configs = slot.space.by_nearness(problem, device, base.outer)
                    self._covered[key] = (stage, slot, base, configs)
                    wanted += [self._candidate(stage, slot, base, config) for config in configs]
        self._total += len(wanted)
        return wanted

    def _candidate(self, stage: str, slot: Slot, base: Plan, config: Config) -> Candidate:
        plan = base.replace_stage(stage, slot.choice(config))
        return Candidate("plan", plan) if base.graph == "whole" else Candidate("stage", plan, base, stage)
