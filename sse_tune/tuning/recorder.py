"""The trials of one search: each is written to the database when it ends, or when the search is stopped."""

from __future__ import annotations

import collections
import statistics
import time
from typing import Protocol

from sse_tune.database.records import Trial, now
from sse_tune.database.store import TuningDatabase
from sse_tune.errors import PlanError
from sse_tune.plan import Plan
from sse_tune.tuning.jobs import Attempt

TrialKey = tuple[str, str | None, str]  # kind, stage, plan key


class Progress(Protocol):
    """Told how a search goes: `phase` in words, `done` of `total` trials in it, and the best time so far."""

    def __call__(self, phase: str, done: int, total: int, best_us: float | None) -> None: ...


class Recorder:
    """Writes and remembers trials.

    Args:
        database: where they go.
        study: its id there.
        known: trials of an earlier search, not to be run again; interrupted ones are.
        budget_s: how long the search may take.
        max_trials: how many candidates may be run; None: no limit.
        progress: the callback.
    """

    def __init__(
        self,
        database: TuningDatabase,
        study: str,
        known: list[Trial],
        budget_s: float,
        max_trials: int | None,
        progress: Progress | None,
    ) -> None:
        self.database, self.study, self.budget_s = database, study, budget_s
        self.known: dict[TrialKey, Trial] = {}
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.evaluated = 0
        self.best_us: float | None = None
        self._max_trials, self._progress = max_trials, progress
        self._begin = time.monotonic()
        self._in_flight: tuple[str, str | None, Plan] | None = None
        for trial in known:
            if trial.outcome == "interrupted":
                continue
            try:
                key = (trial.kind, trial.stage, Plan.from_dict(trial.plan).key)
            except PlanError:
                continue  # written by a version with other plans
            self.known[key] = trial
            self.outcomes[trial.outcome] += 1
            self._note(trial)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._begin

    def may_go_on(self, share: float = 1.0) -> bool:
        """Whether this share of the budget is not used up and trials are left."""
        trials_left = self._max_trials is None or self.evaluated < self._max_trials
        return trials_left and self.elapsed_s < share * self.budget_s

    def remaining_s(self, share: float = 1.0) -> float:
        return max(0.0, share * self.budget_s - self.elapsed_s)

    def lookup(self, kind: str, stage: str | None, plan: Plan) -> Attempt | None:
        """The result of a trial that was made before."""
        trial = self.known.get((kind, stage, plan.key))
        if trial is None:
            return None
        return Attempt(trial.outcome, trial.reason, tuple(trial.timings_us), dict(trial.errors))

    def begin(self, kind: str, stage: str | None, plan: Plan) -> None:
        self._in_flight = (kind, stage, plan)

    def end(self, attempt: Attempt, resources: dict[str, int] | None = None) -> None:
        """Writes the trial in flight."""
        assert self._in_flight is not None
        kind, stage, plan = self._in_flight
        self._in_flight = None
        if attempt.outcome != "rejected":
            self.evaluated += 1
        self._write(kind, stage, plan, attempt, resources or {})

    def reject(self, kind: str, stage: str | None, plan: Plan, reason: str) -> None:
        """Writes a candidate that was never run."""
        if (kind, stage, plan.key) not in self.known:
            self._write(kind, stage, plan, Attempt("rejected", reason), {})

    def interrupt(self) -> None:
        """Writes the trial in flight as interrupted: a resumed search runs it again."""
        if self._in_flight is not None:
            kind, stage, plan = self._in_flight
            self._in_flight = None
            self._write(kind, stage, plan, Attempt("interrupted", "the search was stopped"), {})

    def report(self, phase: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(phase, done, total, self.best_us)

    def _write(self, kind: str, stage: str | None, plan: Plan, attempt: Attempt, resources: dict[str, int]) -> None:
        trial = Trial(
            study=self.study,
            kind=kind,
            stage=stage,
            plan=plan.to_dict(),
            outcome=attempt.outcome,
            reason=attempt.reason,
            time_us=statistics.median(attempt.timings_us) if attempt.timings_us else None,
            timings_us=tuple(attempt.timings_us),
            errors=dict(attempt.errors),
            resources=dict(resources),
            created=now(),
        )
        self.database.add_trial(trial)
        self.outcomes[attempt.outcome] += 1
        self.known[(kind, stage, plan.key)] = trial
        self._note(trial)

    def _note(self, trial: Trial) -> None:
        if trial.kind == "plan" and trial.outcome == "ok" and trial.time_us is not None:
            self.best_us = trial.time_us if self.best_us is None else min(self.best_us, trial.time_us)
