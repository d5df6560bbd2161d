"""Who wins: the finalists in turn with the incumbent, the winner's neighbours after them, and the longer admission.

The incumbent is what would run without this search. It stays unless another plan beats it by more than the noise, or
ties with it and has a stage that is clearly faster by itself (`ties.py`). What the noise cannot tell from the winner is
recorded as a tie. On a workload, where each entry may have an incumbent of its own, the expected time decides, among
those that are slower than the incumbent on no entry.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence

from sse_tune.errors import SearchError
from sse_tune.plan import Plan
from sse_tune.tuning import jobs
from sse_tune.tuning.candidates import Candidate
from sse_tune.tuning.cases import FINAL
from sse_tune.tuning.engine import COMPILE_S, Engine
from sse_tune.tuning.evaluate import PLAN_DEADLINE_S, Job, Pending
from sse_tune.tuning.jobs import Attempt
from sse_tune.tuning.measure import Measured, Timing
from sse_tune.tuning.neighbours import neighbours
from sse_tune.tuning.ties import STAGE_MARGIN, saved_by_stages, with_faster_stages

_FINALISTS = 3
_CLOSE = 1.25  # times the fastest: two runs tell those beyond it from the best
_NEIGHBOURS_AT_ONCE = 3
_SEEMS_SLOWER = 1.03  # times: a trial alone is less sure than a comparison in turn
_COMPARISON_S = (1.0, 15.0)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The answer of a search.

    Args:
        plan: the answer.
        timings: of every plan of the last comparison that the answer was in, on every entry.
        errors: of the answer, in the longer admission.
        ties: plans of that comparison that the answer does not beat by more than the noise and 1 %.
        neighbours: how many neighbours were tried.
        default: timings of the default plan, in turn with the answer; None: it was not admitted.
        slowed: the entries on which the answer is slower than what would run there without this search: none, unless
            their incumbents differ and nothing beats them all.
    """

    plan: Plan
    timings: dict[Plan, Measured]
    errors: dict[str, float]
    ties: tuple[Plan, ...]
    neighbours: int
    default: Measured | None
    slowed: tuple[int, ...] = ()

    @property
    def timing(self) -> Measured:
        return self.timings[self.plan]


class Finals:
    """The end of one search.

    Args:
        engine: with the budget, the worker and what is known.
        default: the default plan, in every comparison if it was admitted.
        incumbents: what would run without this search on each entry, if it was admitted; None: the default.
    """

    def __init__(self, engine: Engine, default: Plan, *incumbents: Plan | None) -> None:
        self.engine, self.default, self.incumbents = engine, default, incumbents
        assert len(incumbents) == len(engine.workload.entries), "an incumbent, or None, for each entry"
        self._always = [plan for plan in dict.fromkeys((default, *incumbents)) if plan is not None]
        self._neighbours = 0
        self._failures: list[str] = []
        self._passed: dict[Plan, Attempt] = {}
        self._compiling: list[Pending] = []

    def decide(self, found: Sequence[Plan]) -> Verdict:
        """The answer among the plans found, their neighbours and the incumbent.

        Raises:
            SearchError: none of them runs again, or none passes the longer admission.
        """
        finalists = list(dict.fromkeys((*self._finalists(found), *self._with_faster_stages())))
        failed: set[Plan] = set()
        while True:
            entrants = [plan for plan in finalists if plan not in failed]
            if not entrants:
                rule = "some plan must pass the final admission"
                raise SearchError(rule, self._failures[0], "run `sse-tune check` to see all cases")
            likely = min(entrants, key=lambda plan: self._time_of(plan) or float("inf"))
            self._compile(self._worth_trying(likely))
            timings = self._in_turn(entrants)
            winner = self._winner(timings)
            attempt = self._admitted(winner)  # before its neighbours, which are still compiled
            if attempt.outcome == "ok":
                winner, timings = self._refined(winner, timings, failed)
                attempt = self._admitted(winner)
            if attempt.outcome == "ok":
                ties = tuple(
                    plan for plan, timing in timings.items()
                    if plan != winner and not timings[winner].beats(timing)
                )  # fmt: skip
                return Verdict(
                    winner, timings, attempt.errors, ties, self._neighbours, timings.get(self.default),
                    self._slowed(winner, timings),
                )  # fmt: skip
            failed.add(winner)
            self._failures.append(f"{attempt.outcome}, {attempt.reason}")

    def _finalists(self, found: Sequence[Plan]) -> list[Plan]:
        """The default and the incumbents, if admitted, and the fastest of the others; those that an entry has seemed to
        suffer from come last."""
        always = [plan for plan in self._always if self._time_of(plan)]
        timed = [(time_us, plan) for plan in dict.fromkeys(found) if plan not in always
                 and (time_us := self._time_of(plan)) is not None]  # fmt: skip
        timed.sort(key=lambda pair: (self._seems_slower(pair[1]), pair[0]))
        return always + [plan for time_us, plan in timed[:_FINALISTS] if time_us <= _CLOSE * timed[0][0]]

    def _with_faster_stages(self) -> list[Plan]:
        """The incumbents with the stages that are clearly faster by themselves, tried like every other plan."""
        engine, made = self.engine, []
        choices = engine.recorder.stage_choices()
        for holder in dict.fromkeys(plan for plan in self.incumbents if plan is not None and self._time_of(plan)):
            plan = with_faster_stages(holder, choices, self._stage_us)
            if plan != holder and engine.recorder.may_go_on():
                if self._time_of(plan) is None:
                    engine.evaluate(Candidate("plan", plan))
                made.append(plan)
        return [plan for plan in made if self._time_of(plan) is not None]

    def _seems_slower(self, plan: Plan) -> bool:
        """Whether the trials say that some entry is slower with a plan than with what would run there without it."""
        mine = self._entries_of(plan)
        for number, holder in enumerate(self.incumbents):
            theirs = self._entries_of(self.default if holder is None else holder)
            if mine and theirs and mine[number] > _SEEMS_SLOWER * theirs[number]:
                return True
        return False

    def _entries_of(self, plan: Plan) -> list[float]:
        """Median times of a plan's trial, entry by entry; empty where there is one."""
        attempt = self.engine.recorder.lookup(Candidate("plan", plan))
        return [] if attempt is None else [statistics.median(times) for times in attempt.entries_us]

    def _time_of(self, plan: Plan) -> float | None:
        known = self.engine.known(Candidate("plan", plan))
        return None if known is None else known.time_us

    def _winner(self, timings: dict[Plan, Measured]) -> Plan:
        """The fastest of those that no entry suffers from, if it beats the incumbents and the default by more than the
        noise; else the best of these."""
        holders = self._holders(timings)
        if not holders:
            return min(timings, key=lambda plan: timings[plan].median_us)
        present = self._without_search(holders, timings)
        faster = [
            plan for plan, timing in timings.items() if timing.beats(present) and not timing.slower_on(present)
        ]
        if faster:
            return min(faster, key=lambda plan: timings[plan].median_us)
        best = min(dict.fromkeys(holders), key=lambda plan: timings[plan].median_us)
        level = [  # to the noise alone: 1 % of the whole may be more than the stage that decides
            plan for plan, timing in timings.items()
            if plan == best or not (present.total.beats(timing.total, margin=0.0) or timing.slower_on(present))
        ]  # fmt: skip
        return max(level, key=lambda plan: saved_by_stages(plan, best, self._stage_us))

    def _stage_us(self, plan: Plan, stage: str) -> float | None:
        known = self.engine.known(Candidate("stage", plan, plan, stage))
        return None if known is None else known.time_us

    def _holders(self, timings: dict[Plan, Measured]) -> list[Plan]:
        """What would run on each entry without this search: its incumbent, unless the default beats it there; empty
        where neither runs."""
        holders = []
        for number, incumbent in enumerate(self.incumbents):
            both = [plan for plan in (incumbent, self.default) if plan is not None and plan in timings]
            if not both:
                return []
            first, last = (timings[plan].entries[number] for plan in (both[0], both[-1]))
            holders.append(both[-1] if last.beats(first) else both[0])
        return holders

    def _without_search(self, holders: Sequence[Plan], timings: dict[Plan, Measured]) -> Measured:
        entries = tuple(timings[plan].entries[number] for number, plan in enumerate(holders))
        return Measured(entries, self.engine.workload.shares)

    def _slowed(self, plan: Plan, timings: dict[Plan, Measured]) -> tuple[int, ...]:
        """The entries that suffer from a plan."""
        holders = self._holders(timings)
        return timings[plan].slower_on(self._without_search(holders, timings)) if holders else ()

    def _refined(
        self, winner: Plan, timings: dict[Plan, Measured], failed: set[Plan]
    ) -> tuple[Plan, dict[Plan, Measured]]:
        """Moves to neighbours that beat the winner until none does or the budget is used. A neighbour is timed first,
        which takes few compiled programs; what seems faster than the winner is then admitted like every other plan."""
        engine, seen = self.engine, set(timings) | failed
        improved = True
        while improved:
            improved = False
            batch: list[Plan] = []
            left = self._compile(plan for plan in self._worth_trying(winner) if plan not in seen)
            while left and len(batch) < _NEIGHBOURS_AT_ONCE:
                candidate = self._compiled(left)
                if candidate is None:  # the budget is used: those admitted by now are compared all the same
                    break
                del left[candidate]
                if candidate.plan not in seen:
                    seen.add(candidate.plan)
                    self._neighbours += 1
                engine.recorder.report("neighbours of the best", self._neighbours, self._neighbours + 1)
                time_us = engine.time_of(candidate, engine.evaluate(candidate))
                if time_us is None or time_us >= timings[winner].median_us:
                    continue
                if candidate.kind == "plan":
                    batch.append(candidate.plan)
                else:
                    as_plan = Candidate("plan", candidate.plan)
                    left = {as_plan: engine.compile(as_plan), **left}
                    self._compiling.append(left[as_plan])
            if batch:
                rivals = dict.fromkeys((winner, *(plan for plan in self._always if plan in timings), *batch))
                again = self._in_turn(list(rivals))
                better = [p for p in batch if again[p].beats(again[winner]) and not self._slowed(p, again)]
                timings = again
                winner = min(better, key=lambda plan: again[plan].median_us, default=winner)
                improved = bool(better) or len(batch) == _NEIGHBOURS_AT_ONCE
        return winner, timings

    def _compile(self, plans: Iterable[Plan]) -> dict[Candidate, Pending]:
        """Hands plans to the compilers, to be timed, in this order, if there is time left to try them, and takes back
        what was handed to them before and is not among these. What was tried as a plan is not timed again."""
        engine = self.engine
        if not engine.recorder.may_go_on():
            return {}
        pending: dict[Candidate, Pending] = {}
        for plan in plans:
            as_plan = Candidate("plan", plan)
            if engine.known(as_plan) is None:
                candidate = Candidate("combination", plan)
                pending[candidate] = engine.compile(candidate)
            else:
                pending[as_plan] = []
        engine.withdraw([future for futures in self._compiling for future in futures], list(pending.values()))
        self._compiling = list(pending.values())
        return pending

    def _compiled(self, left: dict[Candidate, Pending]) -> Candidate | None:
        """The first that is compiled, once there is one; None: the budget is used before."""
        engine = self.engine
        while engine.recorder.may_go_on():
            for candidate, pending in left.items():
                if all(future.done() for future in pending):
                    return candidate
            engine.compile_wait_s += COMPILE_S
            time.sleep(COMPILE_S)
        return None

    def _worth_trying(self, winner: Plan) -> Iterator[Plan]:
        """The neighbours whose changed stage is not known to be slower than the winner's; its dearest stage first."""
        known = {
            stage: found.time_us
            for stage in winner.stages
            if (found := self.engine.known(Candidate("stage", winner, winner, stage))) is not None and found.time_us
        }
        for stage in sorted(winner.stages, key=lambda stage: -known.get(stage, 0.0)):
            for plan in neighbours(winner, stage, self.engine):
                found = self.engine.known(Candidate("stage", plan, winner, stage))
                if found is None or (
                    found.time_us is not None and found.time_us <= STAGE_MARGIN * known.get(stage, found.time_us)
                ):
                    yield plan

    def _in_turn(self, plans: Sequence[Plan]) -> dict[Plan, Measured]:
        """Measures plans in turn, end to end, on one entry after the other.

        Raises:
            SearchError: one of them, each admitted before, fails.
        """
        engine, recorder = self.engine, self.engine.recorder
        recorder.report("finalists", 0, len(plans))
        least, most = _COMPARISON_S
        limit_s = min(most, max(least, 0.4 * recorder.remaining_s()))
        named = {plan.key: plan for plan in plans}
        entries: dict[Plan, list[Timing]] = {plan: [] for plan in plans}
        count = len(engine.workload.entries)
        for number in range(count):
            arguments = (named, engine.workload, engine.evaluator.device, limit_s / count, number)
            done = engine.lanes.run(Job(jobs.time_in_turn, arguments, PLAN_DEADLINE_S))
            if done.outcome != "ok":
                raise SearchError("the finalists must run again", f"{done.outcome}: {done.reason}", "resume the search")
            for key, times in done.value.items():
                entries[named[key]].append(Timing(times))
        return {plan: Measured(tuple(timings), engine.workload.shares) for plan, timings in entries.items()}

    def _admitted(self, plan: Plan) -> Attempt:
        """The longer admission, once for each plan."""
        engine = self.engine
        if plan in self._passed:
            return self._passed[plan]
        engine.recorder.report("final admission", 0, 1)
        arguments = (plan, engine.workload, engine.evaluator.device, FINAL)
        done = engine.lanes.run(Job(jobs.check, arguments, PLAN_DEADLINE_S))
        attempt = done.value if done.outcome == "ok" else Attempt(done.outcome, done.reason)
        if attempt.outcome == "ok":
            self._passed[plan] = attempt
        else:
            engine.recorder.add(Candidate("plan", plan), attempt)
        return attempt
