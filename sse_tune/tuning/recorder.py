"""The trials of one search: each is claimed, and written to the database when it ends or when the search is stopped.

Other processes may work on the same study, on this host or another: what they have claimed is left to them, and what
they found is taken from the database.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import socket
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Protocol

from sse_tune.database.claims import MINE, Claim
from sse_tune.database.records import Trial, now
from sse_tune.database.store import TuningDatabase
from sse_tune.errors import DatabaseError, PlanError
from sse_tune.plan import Plan, StageChoice
from sse_tune.problem import Problem
from sse_tune.tuning.candidates import Candidate
from sse_tune.tuning.jobs import Attempt

LEASE_S = 30.0
_FIRST_GUESS_S = 0.5  # of a trial, before one was made


class Progress(Protocol):
    """Told how a search goes: `phase` in words, `done` of `total` trials in it, and the best time so far."""

    def __call__(self, phase: str, done: int, total: int, best_us: float | None) -> None: ...


class Recorder:
    """Claims, writes and remembers trials.

    Args:
        database: where they go.
        study: its id there.
        problem: of the study.
        resume: whether the trials that are there count; else only those that come from now on.
        budget_s: how long the search may take.
        max_trials: how many candidates may be run here; None: no limit.
        progress: the callback.
        lease_s: after how long without a sign of life others may take up what was claimed here.
    """

    def __init__(
        self,
        database: TuningDatabase,
        study: str,
        problem: Problem,
        *,
        resume: bool,
        budget_s: float,
        max_trials: int | None = None,
        progress: Progress | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        self.database, self.study, self.problem, self.budget_s = database, study, problem, budget_s
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.known: dict[str, Trial] = {}
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.evaluated = 0
        self.best_us: float | None = None
        self._max_trials, self._progress, self._lease_s = max_trials, progress, lease_s
        self._begin = time.monotonic()
        self._busy_s = 0.0
        self._running: dict[str, tuple[Candidate, float]] = {}
        present = database.trials(study)
        self._since = 0 if resume else 1 + max((trial.number for trial in present), default=-1)
        self._seen = self._since
        self._own: set[int] = set()
        self._again: dict[str, Candidate] = {}
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="claims", daemon=True)
        self._heart.start()
        self.sync()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._begin

    def may_go_on(self, share: float = 1.0) -> bool:
        """Whether this share of the budget is not used up and trials are left."""
        trials_left = self._max_trials is None or self.evaluated + len(self._running) < self._max_trials
        return trials_left and self.elapsed_s < share * self.budget_s

    def remaining_s(self, share: float = 1.0) -> float:
        return max(0.0, share * self.budget_s - self.elapsed_s)

    def room(self, share: float = 1.0) -> float:
        """About how many more trials fit into this share of the budget."""
        trial_s = self._busy_s / self.evaluated if self.evaluated else _FIRST_GUESS_S
        by_time = self.remaining_s(share) / max(trial_s, 1e-3)
        return by_time if self._max_trials is None else min(by_time, self._max_trials - self.evaluated)

    def lookup(self, candidate: Candidate) -> Attempt | None:
        """The result of a trial that was made before."""
        trial = self.known.get(candidate.key(self.problem))
        if trial is None:
            return None
        peak, entries = trial.resources.get("peak_bytes"), trial.resources.get("entries_us", ())
        return Attempt(
            trial.outcome, trial.reason, tuple(trial.timings_us), dict(trial.errors), peak_bytes=peak,
            entries_us=tuple(map(tuple, entries)),
        )  # fmt: skip

    def stage_choices(self) -> list[tuple[str, StageChoice]]:
        """What ran of stages, by the stage's name, each choice once."""
        ran = [
            (trial.stage, Plan.from_dict(trial.plan).stages[trial.stage])
            for trial in self.known.values() if trial.stage is not None and trial.outcome == "ok"
        ]  # fmt: skip
        return list(dict.fromkeys(ran))

    def claim(self, candidate: Candidate) -> bool:
        """Whether this process is to run a candidate; else another one does, or did since."""
        wanted = self._claim_of(candidate)
        if wanted.candidate in self._running:
            return False  # taken up from another process before the strategy asked for it
        if self.database.claim(wanted, self.owner, self._lease_s, self._since) != MINE:
            return False
        self._running[wanted.candidate] = (candidate, time.monotonic())
        return True

    def take_lapsed(self, accept: Callable[[Plan, str | None], bool]) -> tuple[Plan, str | None] | None:
        """Takes up a candidate, a plan and the stage that is measured, of a process that is gone."""

        def accepts(claim: Claim) -> bool:
            try:
                plan = Plan.from_dict(claim.plan)
                # a combination, which has another key, is left to a sweep that asks for it
                candidate = Candidate("plan" if claim.stage is None else "stage", plan, stage=claim.stage)
                return candidate.key(self.problem) == claim.candidate and accept(plan, claim.stage)
            except PlanError:
                return False

        taken = self.database.take_lapsed(self.study, self.owner, self._lease_s, accepts)
        return None if taken is None else (Plan.from_dict(taken.plan), taken.stage)

    def end(
        self, candidate: Candidate, attempt: Attempt, resources: dict[str, int] | None = None, *, counts: bool = True
    ) -> None:
        """Writes a claimed trial. One that only fills the time of an idle device does not count among those that the
        budget is for."""
        key = candidate.key(self.problem)
        _, begun = self._running.pop(key)
        if counts and attempt.outcome != "rejected":
            self.evaluated += 1
            self._busy_s += time.monotonic() - begun
        trial = self._trial(candidate, attempt, self._resources(attempt, resources or {}))
        number = self.database.finish_claim(trial, key, self.owner)
        if number is None:
            self.sync()  # the lease ran out while this process slept, and another one has the candidate
            return
        self._own.add(number)
        self._note(key, trial)

    def add(self, candidate: Candidate, attempt: Attempt) -> None:
        """Writes what was found of a candidate after its trial had ended well, and what counts from now on."""
        trial = self._trial(candidate, attempt, {})
        self._own.add(self.database.add_trial(trial))
        self._note(candidate.key(self.problem), trial)

    def measured_again(self, candidate: Candidate, more: Attempt) -> Attempt:
        """Adds samples to those of a trial, which count here from now on; `store_again` writes them down."""
        before = self.lookup(candidate)
        assert before is not None and before.outcome == more.outcome == "ok", "only what was timed is timed again"
        entries = tuple(old + new for old, new in zip(before.entries_us, more.entries_us, strict=True))
        attempt = dataclasses.replace(before, timings_us=before.timings_us + more.timings_us, entries_us=entries)
        key = candidate.key(self.problem)
        self._again[key] = candidate
        self._note(key, self._trial(candidate, attempt, self._resources(attempt, self.known[key].resources)))
        return attempt

    def store_again(self) -> None:
        """Writes a further trial, with all samples, of each candidate that was measured again."""
        for key in self._again:
            self._own.add(self.database.add_trial(self.known[key]))
        self._again.clear()

    def reject(self, candidate: Candidate, reason: str) -> None:
        """Writes a candidate that was never run."""
        key = candidate.key(self.problem)
        if key not in self.known and self.database.claim(
            self._claim_of(candidate), self.owner, self._lease_s, self._since
        ) == MINE:  # fmt: skip
            trial = self._trial(candidate, Attempt("rejected", reason), {})
            number = self.database.finish_claim(trial, key, self.owner)
            if number is not None:
                self._own.add(number)
                self._note(key, trial)

    def sync(self) -> None:
        """Takes in what other processes have found since the last time."""
        for trial in self.database.trials_since(self.study, self._seen):
            self._seen = max(self._seen, trial.number + 1)
            if trial.number in self._own:
                continue
            try:
                plan = Plan.from_dict(trial.plan)
                key = Candidate(trial.kind, plan, stage=trial.stage).key(self.problem)
            except PlanError:
                continue  # written by a version with other plans
            known = self.known.get(key)
            # a failure stands, whenever it was found; of two measurements the later one has the samples of both
            if trial.outcome != "interrupted" and (known is None or known.outcome == "ok" or trial.outcome != "ok"):
                self._note(key, trial)

    def interrupt(self) -> None:
        """Writes the trials in flight as interrupted: a resumed search runs them again."""
        for candidate, _ in self._running.values():
            trial = self._trial(candidate, Attempt("interrupted", "the search was stopped"), {})
            self._own.add(self.database.add_trial(trial))
            self.outcomes["interrupted"] += 1
        self._running.clear()

    def close(self) -> None:
        """Gives back what was claimed and not run."""
        if not self._ended.is_set():
            self._ended.set()
            self._heart.join()
            self.database.release_claims(self.owner)

    def report(self, phase: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(phase, done, total, self.best_us)

    def _beat(self) -> None:
        while not self._ended.wait(self._lease_s / 3):
            try:
                self.database.renew_claims(self.owner, self._lease_s)
            except DatabaseError:
                continue  # the trial that cannot be stored will say so

    def _claim_of(self, candidate: Candidate) -> Claim:
        return Claim(self.study, candidate.key(self.problem), candidate.plan.to_dict(), candidate.stage)

    @staticmethod
    def _resources(attempt: Attempt, compiled: Mapping[str, object]) -> dict[str, object]:
        stored = dict(compiled)
        if attempt.peak_bytes is not None:
            stored["peak_bytes"] = attempt.peak_bytes
        if attempt.entries_us:
            stored["entries_us"] = [list(times) for times in attempt.entries_us]
        return stored

    def _trial(self, candidate: Candidate, attempt: Attempt, resources: dict[str, object]) -> Trial:
        return Trial(
            study=self.study,
            kind=candidate.kind,
            stage=candidate.stage,
            plan=candidate.plan.to_dict(),
            outcome=attempt.outcome,
            reason=attempt.reason,
            time_us=statistics.median(attempt.timings_us) if attempt.timings_us else None,
            timings_us=tuple(attempt.timings_us),
            errors=dict(attempt.errors),
            resources=resources,
            created=now(),
        )

    def _note(self, key: str, trial: Trial) -> None:
        before = self.known.get(key)
        self.known[key] = trial
        if before is None or before.outcome != trial.outcome:
            self.outcomes[trial.outcome] += 1
        if trial.kind == "plan" and trial.outcome == "ok" and trial.time_us is not None:
            self.best_us = trial.time_us if self.best_us is None else min(self.best_us, trial.time_us)
