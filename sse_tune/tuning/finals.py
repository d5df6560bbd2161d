"""Who wins: the finalists in turn with the incumbent, the winner's neighbours after them, and the longer admission.

The incumbent is what would run without this search. It stays unless another plan beats it by more than the noise; what
the noise cannot tell from the winner is recorded as a tie.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from sse_tune.errors import SearchError
from sse_tune.plan import Plan
from sse_tune.templates.registry import find_template
from sse_tune.tuning import jobs
from sse_tune.tuning.candidates import Candidate
from sse_tune.tuning.cases import FINAL
from sse_tune.tuning.engine import Engine
from sse_tune.tuning.evaluate import PLAN_DEADLINE_S, Job
from sse_tune.tuning.jobs import Attempt
from sse_tune.tuning.measure import Timing

_FINALISTS = 3
_CLOSE = 1.25  # times the fastest: two runs tell those beyond it from the best
_NEIGHBOURS_AT_ONCE = 3
_STAGE_MARGIN = 1.02  # a neighbour whose stage was measured and is slower than this is not tried in the whole
_COMPARISON_S = (1.0, 15.0)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The answer of a search.

    Args:
        plan: the answer.
        timings: of every plan of the last comparison that the answer was in.
        errors: of the answer, in the longer admission.
        ties: plans of that comparison that the answer does not beat by more than the noise and 1 %.
        neighbours: how many neighbours were tried.
        default: timing of the default plan, in turn with the answer; None: it was not admitted.
    """

    plan: Plan
    timings: dict[Plan, Timing]
    errors: dict[str, float]
    ties: tuple[Plan, ...]
    neighbours: int
    default: Timing | None

    @property
    def timing(self) -> Timing:
        return self.timings[self.plan]


class Finals:
    """The end of one search.

    Args:
        engine: with the budget, the worker and what is known.
        default: the default plan, in every comparison if it was admitted.
        incumbent: what would run without this search, if it was admitted.
    """

    def __init__(self, engine: Engine, default: Plan, incumbent: Plan | None) -> None:
        self.engine, self.default, self.incumbent = engine, default, incumbent
        self._neighbours = 0
        self._failures: list[str] = []

    def decide(self, found: Sequence[Plan]) -> Verdict:
        """The answer among the plans found, their neighbours and the incumbent.

        Raises:
            SearchError: none of them runs again, or none passes the longer admission.
        """
        finalists = self._finalists(found)
        failed: set[Plan] = set()
        while True:
            entrants = [plan for plan in finalists if plan not in failed]
            if not entrants:
                rule = "some plan must pass the final admission"
                raise SearchError(rule, self._failures[0], "run `sse-tune check` to see all cases")
            timings = self._in_turn(entrants)
            winner = self._winner(timings)
            winner, timings = self._refined(winner, timings, failed)
            self.engine.recorder.report("final admission", 0, 1)
            attempt = self._admitted(winner)
            if attempt.outcome == "ok":
                ties = tuple(
                    plan for plan, timing in timings.items()
                    if plan != winner and not timings[winner].beats(timing)
                )  # fmt: skip
                return Verdict(winner, timings, attempt.errors, ties, self._neighbours, timings.get(self.default))
            failed.add(winner)
            self._failures.append(f"{attempt.outcome}, {attempt.reason}")

    def _finalists(self, found: Sequence[Plan]) -> list[Plan]:
        """The default and the incumbent, if admitted, and the fastest of the others."""
        always = [p for p in dict.fromkeys((self.default, self.incumbent)) if p is not None and self._time_of(p)]
        timed = [(time_us, plan) for plan in dict.fromkeys(found) if plan not in always
                 and (time_us := self._time_of(plan)) is not None]  # fmt: skip
        timed.sort(key=lambda pair: pair[0])
        return always + [plan for time_us, plan in timed[:_FINALISTS] if time_us <= _CLOSE * timed[0][0]]

    def _time_of(self, plan: Plan) -> float | None:
        known = self.engine.known(Candidate("plan", plan))
        return None if known is None else known.time_us

    def _winner(self, timings: dict[Plan, Timing]) -> Plan:
        """The fastest, if it beats the incumbent and the default by more than the noise; else the one of these."""
        holders = [plan for plan in (self.incumbent, self.default) if plan is not None and plan in timings]
        holder = holders[0] if holders else None
        if len(holders) == 2 and timings[holders[1]].beats(timings[holders[0]]):
            holder = holders[1]
        faster = [plan for plan, timing in timings.items() if holder is None or timing.beats(timings[holder])]
        return min(faster, key=lambda plan: timings[plan].median_us) if faster or holder is None else holder

    def _refined(
        self, winner: Plan, timings: dict[Plan, Timing], failed: set[Plan]
    ) -> tuple[Plan, dict[Plan, Timing]]:
        """Moves to neighbours that beat the winner until none does or the budget is used."""
        recorder, seen = self.engine.recorder, set(timings) | failed
        improved = True
        while improved:
            improved, batch = False, []
            for plan in self._worth_trying(winner):
                if not recorder.may_go_on():
                    return winner, timings
                if plan in seen:
                    continue
                seen.add(plan)
                self._neighbours += 1
                recorder.report("neighbours of the best", self._neighbours, self._neighbours + 1)
                if self.engine.time_of(c := Candidate("plan", plan), self.engine.evaluate(c)) is not None:
                    batch.append(plan)
                if len(batch) == _NEIGHBOURS_AT_ONCE:
                    break
            if batch:
                rivals = dict.fromkeys((winner, *(p for p in (self.incumbent, self.default) if p in timings), *batch))
                again = self._in_turn([plan for plan in rivals if plan is not None])
                better = [plan for plan in batch if again[plan].beats(again[winner])]
                timings = again
                winner = min(better, key=lambda plan: again[plan].median_us, default=winner)
                improved = bool(better) or len(batch) == _NEIGHBOURS_AT_ONCE
        return winner, timings

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
                    found.time_us is not None and found.time_us <= _STAGE_MARGIN * known.get(stage, found.time_us)
                ):
                    yield plan

    def _in_turn(self, plans: Sequence[Plan]) -> dict[Plan, Timing]:
        """Measures plans in turn, end to end.

        Raises:
            SearchError: one of them, each admitted before, fails.
        """
        engine, recorder = self.engine, self.engine.recorder
        recorder.report("finalists", 0, len(plans))
        least, most = _COMPARISON_S
        limit_s = min(most, max(least, 0.4 * recorder.remaining_s()))
        named = {plan.key: plan for plan in plans}
        arguments = (named, engine.problem, engine.evaluator.device, limit_s)
        done = engine.lanes.run(Job(jobs.time_in_turn, arguments, PLAN_DEADLINE_S))
        if done.outcome != "ok":
            raise SearchError("the finalists must run again", f"{done.outcome}: {done.reason}", "resume the search")
        return {named[key]: Timing(times) for key, times in done.value.items()}

    def _admitted(self, plan: Plan) -> Attempt:
        engine = self.engine
        arguments = (plan, engine.problem, engine.evaluator.device, FINAL)
        done = engine.lanes.run(Job(jobs.check, arguments, PLAN_DEADLINE_S))
        attempt = done.value if done.outcome == "ok" else Attempt(done.outcome, done.reason)
        if attempt.outcome != "ok":
            engine.recorder.add(Candidate("plan", plan), attempt)
        return attempt


def neighbours(plan: Plan, stage: str, engine: Engine) -> Iterator[Plan]:
    """The plans that differ in one parameter of one stage by one step along its values."""
    choice = plan.stages[stage]
    space = find_template(choice.backend, choice.template).space
    for param in space.params:
        place = param.values.index(choice.config[param.name])
        for other in (place - 1, place + 1):
            if 0 <= other < len(param.values):
                config = choice.config.replace(**{param.name: param.values[other]})
                if not space.violations(engine.problem, config, engine.evaluator.device, plan.outer):
                    yield plan.replace_stage(stage, dataclasses.replace(choice, config=config))
