"""The engine of a search: asks a strategy, has candidates compiled ahead, runs them side by side, tells their times."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Sequence

from sse_tune.plan import Plan
from sse_tune.templates.stages import stage_contract
from sse_tune.tuning.ahead import CompileAhead, Compiled
from sse_tune.tuning.candidates import Candidate, Known
from sse_tune.tuning.cases import OWN, QUICK
from sse_tune.tuning.check import chunk_size_of
from sse_tune.tuning.evaluate import Evaluator, Pending
from sse_tune.tuning.jobs import Attempt
from sse_tune.tuning.lanes import Lanes
from sse_tune.tuning.leaders import Leaders
from sse_tune.tuning.strategy import Strategy
from sse_tune.tuning.worker import JobResult

_HOPELESS = 1.5  # times the best: two runs are enough to see it
_SYNC_S = 0.5  # how often the database is asked for what others found, while that is waited for
COMPILE_S = 0.01  # how often for what is compiled, while nothing is
_LATE = 0.6  # of the time for exploring
_LAPSED_S = 5.0  # how often for what the dead left


class Engine:
    """Drives strategies over one problem or workload; `problem` is its heaviest entry's.

    Args:
        evaluator: makes jobs of candidates and records their ends.
        ahead: compiles what is asked before it is run; None: there is nothing to compile.
        lanes: the workers.
        max_memory_bytes: a plan that needs more counts as failed for the search; its trial is recorded as it is.
    """

    def __init__(
        self, evaluator: Evaluator, ahead: CompileAhead | None, lanes: Lanes, max_memory_bytes: int | None = None
    ) -> None:
        self.evaluator, self.ahead, self.lanes = evaluator, ahead, lanes
        self.recorder, self.workload, self.problem = evaluator.recorder, evaluator.workload, evaluator.problem
        self.max_memory_bytes = max_memory_bytes
        self.over_memory: dict[Plan, int] = {}
        self.compile_wait_s = 0.0  # with every worker idle, until what is next was compiled
        self._best: dict[object, float] = {}
        self._queue: list[tuple[Candidate, Pending]] = []
        self._theirs: dict[str, Candidate] = {}
        self._leaders, self._share = Leaders(), 1.0
        self._next_sync = 0.0
        self._next_lapsed = time.monotonic() + _LAPSED_S

    def known(self, candidate: Candidate) -> Known | None:
        """The result of an earlier trial, as a strategy sees it."""
        attempt = self.recorder.lookup(candidate)
        return None if attempt is None else Known(self.time_of(candidate, attempt))

    def time_of(self, candidate: Candidate, attempt: Attempt) -> float | None:
        """The time that counts for the search; None: failed, or over the memory limit."""
        limit, peak = self.max_memory_bytes, attempt.peak_bytes
        if candidate.stage is None and attempt.outcome == "ok" and limit is not None and (peak or 0) > limit:
            self.over_memory[candidate.plan] = peak or 0
            return None
        return attempt.time_us

    def run(self, strategy: Strategy, share: float) -> None:
        """Runs a strategy until it is finished, or `share` of the budget is used and its findings are put together."""
        self._share = share
        while True:
            if not self.recorder.may_go_on(share):
                strategy.stop()
                self._withdraw(strategy)
            self._look_at_theirs(strategy)
            while self.lanes.free and (entry := self._next(strategy)) is not None:
                self._start(strategy, *entry)
            while self.lanes.free and self._queue and self._use_idle(strategy):
                pass
            self.recorder.report(*strategy.progress())
            if self.lanes.busy:
                for end, result in self.lanes.wait(self._patience_s):
                    end(result)
            elif self._queue:
                self.compile_wait_s += COMPILE_S
                time.sleep(COMPILE_S)
            elif self._theirs:
                time.sleep(_SYNC_S / 5)
            else:
                assert strategy.finished, "a strategy must ask for something, wait for something, or be finished"
                self.recorder.store_again()
                return

    def evaluate(self, candidate: Candidate) -> Attempt:
        """One candidate, alone; what is known of it is not run again."""
        while (attempt := self.recorder.lookup(candidate)) is None:
            if self.recorder.claim(candidate):
                attempt, resources = self._refusal(candidate, self.compile(candidate))
                if attempt.outcome != "ok":
                    self.recorder.end(candidate, attempt, resources)
                    return attempt
                result = self.lanes.run(self.evaluator.job(candidate, None, None))
                return self.evaluator.finish(candidate, result, resources)
            time.sleep(_SYNC_S / 5)
            self.recorder.sync()
        return attempt

    def compile(self, candidate: Candidate) -> Pending:
        """Hands a candidate to the compilers; a whole plan, which others wait for, before all stages."""
        if self.ahead is None or candidate.plan.graph == "whole":
            return []
        plan, chunk_size = candidate.plan, chunk_size_of(candidate.plan)
        urgent = candidate.kind == "plan"
        names: tuple[str, ...] = QUICK if urgent else QUICK[:1]
        if candidate.stage is not None:
            plan, names = dataclasses.replace(plan, stages={candidate.stage: plan.stages[candidate.stage]}), OWN
        pending: dict[concurrent.futures.Future[Compiled], None] = {}  # in order, each once
        for problem in self.workload.problems:
            posed = names if problem == self.problem else QUICK[:1] if problem in self.workload.layouts else ()
            pending |= dict.fromkeys(self.ahead.submit_plan(plan, problem, chunk_size, posed, urgent=urgent))
        return list(pending)

    def withdraw(self, dropped: Pending, kept: Sequence[Pending]) -> None:
        """Takes back from the compilers what only candidates that are dropped need."""
        wanted = {future for compiled in kept for future in compiled}
        gone = [future for future in dropped if future not in wanted]
        if self.ahead is not None and gone:
            self.ahead.withdraw(gone)

    def _next(self, strategy: Strategy) -> tuple[Candidate, Pending] | None:
        """A candidate that is compiled; None: there is none now."""
        lookahead = len(self.lanes) if self.ahead is None else 2 * self.ahead.size
        while len(self._queue) < lookahead and (candidate := strategy.ask()) is not None:
            known = self.known(candidate)
            if known is not None:
                strategy.tell(candidate, known.time_us)
            else:
                self._queue.append((candidate, self.compile(candidate)))
        for i, (_, compiled) in enumerate(self._queue):
            if all(future.done() for future in compiled):
                return self._queue.pop(i)
        return None

    def _withdraw(self, strategy: Strategy) -> None:
        """Takes back what need not be run any more, from the compilers too: the finals are next there."""
        kept: list[tuple[Candidate, Pending]] = []
        dropped: Pending = []
        for candidate, compiled in self._queue:
            if strategy.withdraw(candidate):
                dropped += compiled
            else:
                kept.append((candidate, compiled))
        self._queue = kept
        self.withdraw(dropped, [compiled for _, compiled in kept])

    @property
    def _patience_s(self) -> float | None:
        """How long to wait for a worker before looking elsewhere; None: there is nowhere else to look."""
        if self.lanes.free and self._queue:
            return COMPILE_S
        return _SYNC_S if self._theirs else None

    def _use_idle(self, strategy: Strategy) -> bool:
        """While nothing that is asked for is compiled: has the leaders of a stage, or the fastest plans that were
        rehearsed, run in turn, or rehearses another plan of leaders. Whether there was anything to do."""
        groups = (self._leaders.next(base) for base in (*strategy.bases, None))
        if (group := next((group for group in groups if group is not None), None)) is not None:
            rivals, leaders = group
            self.lanes.submit(
                self.evaluator.job_in_turn(leaders), functools.partial(self._sharpen, strategy, rivals, leaders)
            )
            return True
        while (plan := strategy.rehearse()) is not None:
            candidate = Candidate("combination", plan)
            known = self.known(candidate)
            if known is not None:
                strategy.rehearsed(plan, known.time_us)
            elif self.recorder.claim(candidate):
                self.lanes.submit(
                    self.evaluator.job(candidate, None, None), functools.partial(self._rehearsed, strategy, candidate)
                )
                return True
        return False

    def _sharpen(self, strategy: Strategy, rivals: object, leaders: list[Candidate], result: JobResult) -> None:
        """Adds to what is known of leaders; where that failed, they stay as they were."""
        if result.outcome != "ok":
            self._leaders.ran(rivals, failed=leaders)
            return
        self._leaders.ran(rivals)
        for candidate, more in zip(leaders, result.value, strict=True):
            attempt = self.recorder.measured_again(candidate, more)
            self._leaders.note(rivals, candidate, attempt.timings_us)
            if candidate.stage is None:
                strategy.rehearsed(candidate.plan, attempt.time_us)
            elif candidate.base in strategy.bases and attempt.time_us is not None:
                strategy.correct(candidate, attempt.time_us)

    def _rehearsed(self, strategy: Strategy, candidate: Candidate, result: JobResult) -> None:
        """Tells how long a plan of leaders took. Late in exploring the fastest one is handed to the compilers for its
        admission, as it is likely to be the one that is put together."""
        attempt = self.evaluator.finish(candidate, result, {}, counts=False)
        time_us = self.time_of(candidate, attempt)
        if time_us is not None:
            self._leaders.note(candidate.plan.outer, candidate, attempt.timings_us)
        is_fastest = strategy.rehearsed(candidate.plan, time_us)
        if is_fastest and not self.recorder.may_go_on(_LATE * self._share):
            self.compile(Candidate("plan", candidate.plan))

    def _start(self, strategy: Strategy, candidate: Candidate, compiled: Pending) -> None:
        if not self.recorder.claim(candidate):
            self._theirs[candidate.key(self.problem)] = candidate
            return
        self._submit(strategy, candidate, compiled, told=True)

    def _submit(self, strategy: Strategy, candidate: Candidate, compiled: Pending, *, told: bool) -> None:
        attempt, resources = self._refusal(candidate, compiled)
        if attempt.outcome != "ok":
            self.recorder.end(candidate, attempt, resources)
            if told:
                strategy.tell(candidate, None)
            return
        best = self._best.get(self._rivals(candidate))
        # a base is slow for stages that are still to be tuned: only what is the end of its search is given up
        ends = strategy.gives_up and (candidate.stage is not None or candidate.plan.graph == "whole")
        job = self.evaluator.job(candidate, _HOPELESS * best if ends and best is not None else None, best)
        self.lanes.submit(job, functools.partial(self._end, strategy if told else None, candidate, resources=resources))

    def _refusal(self, candidate: Candidate, compiled: Pending) -> tuple[Attempt, dict[str, int]]:
        """See `Evaluator.refusal`: waits for the compilers."""
        begin, idle = time.monotonic(), not self.lanes.busy
        found = self.evaluator.refusal(candidate, compiled)
        self.compile_wait_s += time.monotonic() - begin if idle else 0.0
        return found

    def _end(
        self, strategy: Strategy | None, candidate: Candidate, result: JobResult, resources: dict[str, int]
    ) -> None:
        attempt = self.evaluator.finish(candidate, result, resources)
        time_us = self.time_of(candidate, attempt)
        if time_us is not None:
            rivals = self._rivals(candidate)
            if candidate.stage is not None:
                self._leaders.note(rivals, candidate, attempt.timings_us)
            self._best[rivals] = min(time_us, self._best.get(rivals, time_us))
        if strategy is not None:
            strategy.tell(candidate, time_us)

    def _rivals(self, candidate: Candidate) -> object:
        """What a candidate's time is compared with: whole plans, or the same stage under the same contract."""
        stage = candidate.stage
        return None if stage is None else (stage, stage_contract(stage, self.problem, candidate.plan.outer))

    def _look_at_theirs(self, strategy: Strategy) -> None:
        """Takes what other processes have found, and up what the dead among them left."""
        if self._theirs and time.monotonic() >= self._next_sync:
            self._next_sync = time.monotonic() + _SYNC_S
            self.recorder.sync()
            for key, candidate in list(self._theirs.items()):
                known = self.known(candidate)
                if known is not None:
                    del self._theirs[key]
                    strategy.tell(candidate, known.time_us)
                elif self.lanes.free and self.recorder.claim(candidate):
                    del self._theirs[key]
                    self._submit(strategy, candidate, self.compile(candidate), told=True)
        if self.lanes.free and time.monotonic() >= self._next_lapsed and self.recorder.may_go_on():
            self._next_lapsed = time.monotonic() + _LAPSED_S
            bases = {base.outer: base for base in strategy.bases}
            lapsed = self.recorder.take_lapsed(lambda plan, stage: stage is None or plan.outer in bases)
            if lapsed is not None:
                plan, stage = lapsed
                base = None if stage is None else bases[plan.outer]
                candidate = Candidate("plan" if stage is None else "stage", plan, base, stage)
                if self.recorder.claim(candidate):
                    self._submit(strategy, candidate, self.compile(candidate), told=False)
