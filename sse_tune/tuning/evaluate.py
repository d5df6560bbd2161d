"""One candidate from proposal to recorded trial: quarantine, compiler, worker, database, in this order."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from sse_tune.device import Device, toolchain
from sse_tune.plan import StageChoice
from sse_tune.problem import Problem
from sse_tune.space import Config, Value
from sse_tune.templates.registry import find_template
from sse_tune.tuning import jobs
from sse_tune.tuning.ahead import Compiled
from sse_tune.tuning.candidates import Candidate
from sse_tune.tuning.cases import QUICK
from sse_tune.tuning.jobs import Attempt
from sse_tune.tuning.recorder import Recorder
from sse_tune.tuning.worker import JobResult
from sse_tune.tuning.workload import Workload

Pending = list[concurrent.futures.Future[Compiled]]
STAGE_DEADLINE_S = 60.0
PLAN_DEADLINE_S = 240.0
STAGE_TIME_LIMIT_S = 0.05
PLAN_TIME_LIMIT_S = 0.5
COMBINATION_TIME_LIMIT_S = 0.06  # there are hundreds; about a hundred repeats of half a millisecond
_ENTRY_S = 15.0  # added to a deadline for every further entry of a workload: compiling and admission are for all
QUARANTINED = ("wrong", "crash")  # never to be tried again; a hang or a lack of memory may be the machine's


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker is to run."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    deadline_s: float


class Evaluator:
    """Says what to run for a candidate of one search, and records what became of it."""

    def __init__(self, problem: Problem | Workload, device: Device, recorder: Recorder) -> None:
        self.workload = Workload.of(problem)
        self.problem, self.device, self.recorder = self.workload.problem, device, recorder
        self._toolchain = toolchain()

    def refusal(self, candidate: Candidate, compiled: Pending) -> tuple[Attempt, dict[str, int]]:
        """What is known of a candidate before it runs: why it cannot ("ok": it can), and what the compiler said."""
        resources: dict[str, int] = {}
        choice = self._single_choice(candidate)
        found = None if choice is None else self.quarantined(choice, candidate.plan.outer)
        if found is not None:
            return Attempt("rejected", found), resources
        for future in compiled:
            answer = future.result()
            resources = {name: max(value, resources.get(name, 0)) for name, value in answer.resources.items()}
            if answer.outcome != "ok":
                return Attempt(answer.outcome, answer.reason), resources
        return Attempt("ok"), resources

    def job(self, candidate: Candidate, give_up_us: float | None, confirm_us: float | None) -> Job:
        """Admission and measurement of a candidate."""
        plan, limits = candidate.plan, (give_up_us, confirm_us)
        more_s = _ENTRY_S * (len(self.workload.entries) - 1)
        if candidate.stage is None:
            is_plan = candidate.kind == "plan"
            limit_s, names = (PLAN_TIME_LIMIT_S, QUICK) if is_plan else (COMBINATION_TIME_LIMIT_S, QUICK[:1])
            arguments: tuple[Any, ...] = (plan, self.workload, self.device, limit_s, *limits, names)
            return Job(jobs.check_and_time, arguments, PLAN_DEADLINE_S + more_s)
        arguments = (plan, candidate.base, candidate.stage, self.workload, self.device, STAGE_TIME_LIMIT_S, *limits)
        return Job(jobs.check_and_time_stage, arguments, STAGE_DEADLINE_S + more_s)

    def job_in_turn(self, candidates: Sequence[Candidate]) -> Job:
        """More measurements of admitted configs of one stage, on the buffers of one base, or of plans."""
        first = candidates[0]
        plans = [candidate.plan for candidate in candidates]
        if first.stage is None:
            arguments: tuple[Any, ...] = (plans, self.workload, self.device, COMBINATION_TIME_LIMIT_S)
            return Job(jobs.time_plans_in_turn, arguments, PLAN_DEADLINE_S)
        arguments = (plans, first.base, first.stage, self.workload, self.device, STAGE_TIME_LIMIT_S)
        return Job(jobs.time_stage_in_turn, arguments, STAGE_DEADLINE_S)

    def finish(
        self, candidate: Candidate, result: JobResult, resources: dict[str, int], *, counts: bool = True
    ) -> Attempt:
        """Records what a worker answered, and what must not be tried again; see `Recorder.end`."""
        attempt = result.value if result.outcome == "ok" else Attempt(result.outcome, result.reason)
        self.recorder.end(candidate, attempt, resources, counts=counts)
        choice = self._single_choice(candidate)
        if choice is not None and attempt.outcome in QUARANTINED:
            key = self._quarantine_key(choice, candidate.plan.outer)
            self.recorder.database.quarantine(*key, attempt.reason or attempt.outcome)
        return attempt

    def quarantined(self, choice: StageChoice, outer: Config) -> str | None:
        """Why a config is not to be tried again; None: it may be."""
        found = self.recorder.database.is_quarantined(*self._quarantine_key(choice, outer))
        return None if found is None else f"quarantined: {found}"

    def _single_choice(self, candidate: Candidate) -> StageChoice | None:
        """The one choice that a failure would be due to; None: a plan of several stages."""
        return candidate.plan.stages.get(candidate.stage or "whole")

    def _quarantine_key(self, choice: StageChoice, outer: Config) -> tuple[str, str, str, Config, str]:
        template = find_template(choice.backend, choice.template)
        compiler = f"{choice.backend} {self._toolchain.get(choice.backend)}"
        name = f"{choice.backend}:{choice.template}"
        # what decides the tiles, beside the config: the same config may be right at other head sizes
        sizes: dict[str, Value] = {"K": self.problem.key_dim, "V": self.problem.value_dim, "dtype": self.problem.dtype}
        return self.device.arch, compiler, name, Config({**outer, **choice.config, **sizes}), template.source_hash
