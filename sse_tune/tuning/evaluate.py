"""One candidate from proposal to recorded trial: quarantine, compiler, worker, database, in this order."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable

from sse_tune.database.store import TuningDatabase
from sse_tune.device import Device, toolchain
from sse_tune.plan import Plan, StageChoice
from sse_tune.problem import Problem
from sse_tune.space import Config
from sse_tune.templates.registry import find_template
from sse_tune.tuning import jobs
from sse_tune.tuning.ahead import Compiled
from sse_tune.tuning.jobs import Attempt
from sse_tune.tuning.recorder import Recorder
from sse_tune.tuning.worker import Worker

Pending = list[concurrent.futures.Future[Compiled]]
STAGE_DEADLINE_S = 60.0
PLAN_DEADLINE_S = 240.0
_QUARANTINED = ("wrong", "crash")  # never to be tried again; a hang or a lack of memory may be the machine's


class Evaluator:
    """Runs candidates of one search in its worker and records them."""

    def __init__(self, problem: Problem, device: Device, recorder: Recorder, worker: Worker) -> None:
        self.problem, self.device, self.recorder, self.worker = problem, device, recorder, worker
        self.database: TuningDatabase = recorder.database
        self._toolchain = toolchain()

    def plan(self, plan: Plan, time_limit_s: float, give_up_us: float | None = None) -> Attempt:
        """Admits and times a whole plan, or says what an earlier trial of it found."""
        known = self.recorder.lookup("plan", None, plan)
        if known is not None:
            return known
        single = plan.stages["whole"] if plan.graph == "whole" else None
        reason = self.quarantined(single, plan.outer) if single is not None else None
        if reason is not None:
            self.recorder.reject("plan", None, plan, reason)
            return Attempt("rejected", reason)
        attempt = self._run(
            "plan", None, plan, {}, PLAN_DEADLINE_S, jobs.check_and_time, plan, self.problem, self.device, time_limit_s,
            give_up_us,
        )  # fmt: skip
        if single is not None:
            self._quarantine(single, plan.outer, attempt)
        return attempt

    def stage(
        self,
        plan: Plan,
        base: Plan,
        stage: str,
        compiled: Pending,
        time_limit_s: float,
        give_up_us: float | None = None,
    ) -> Attempt:
        """Admits a plan that differs from `base` in one stage, and times that stage."""
        known = self.recorder.lookup("stage", stage, plan)
        if known is not None:
            return known
        choice = plan.stages[stage]
        resources: dict[str, int] = {}
        reason = self.quarantined(choice, plan.outer)
        if reason is not None:
            self.recorder.reject("stage", stage, plan, reason)
            return Attempt("rejected", reason)
        self.recorder.begin("stage", stage, plan)
        for future in compiled:
            answer = future.result()
            resources = {name: max(value, resources.get(name, 0)) for name, value in answer.resources.items()}
            if answer.outcome != "ok":
                attempt = Attempt(answer.outcome, answer.reason)
                self.recorder.end(attempt, resources)
                return attempt
        attempt = self._run(
            "stage", stage, plan, resources, STAGE_DEADLINE_S, jobs.check_and_time_stage, plan, base, stage,
            self.problem, self.device, time_limit_s, give_up_us,
        )  # fmt: skip
        self._quarantine(choice, plan.outer, attempt)
        return attempt

    def quarantined(self, choice: StageChoice, outer: Config) -> str | None:
        """Why a config is not to be tried again; None: it may be."""
        found = self.database.is_quarantined(*self._quarantine_key(choice, outer))
        return None if found is None else f"quarantined: {found}"

    def _quarantine(self, choice: StageChoice, outer: Config, attempt: Attempt) -> None:
        if attempt.outcome in _QUARANTINED:
            self.database.quarantine(*self._quarantine_key(choice, outer), attempt.reason or attempt.outcome)

    def _quarantine_key(self, choice: StageChoice, outer: Config) -> tuple[str, str, str, Config, str]:
        template = find_template(choice.backend, choice.template)
        compiler = f"{choice.backend} {self._toolchain.get(choice.backend)}"
        name = f"{choice.backend}:{choice.template}"
        return self.device.arch, compiler, name, Config({**outer, **choice.config}), template.source_hash

    def _run(
        self,
        kind: str,
        stage: str | None,
        plan: Plan,
        resources: dict[str, int],
        deadline_s: float,
        job: Callable[..., Attempt],
        *arguments: object,
    ) -> Attempt:
        self.recorder.begin(kind, stage, plan)
        done = self.worker.run(job, *arguments, deadline_s=deadline_s)
        attempt = done.value if done.outcome == "ok" else Attempt(done.outcome, done.reason)
        self.recorder.end(attempt, resources)
        return attempt
