"""Whole plans put together of the leaders of all stages, measured while a device would only wait for the compilers.

Stage times add up nearly, not quite: what one stage leaves in the cache another finds there. Among the few configs of
each stage that its own times do not tell apart, end-to-end times decide, at no cost: all of them are compiled.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator, Mapping

from sse_tune.plan import Plan, StageChoice

_CLOSE = 1.05  # times the fastest of a stage
_AT_MOST = 4  # configs of a stage
_SURE = 0.98  # of the sum of stage times: a gain that no order within the plan takes back
_CLEARLY = 0.99  # of the time of a plan that was chosen: worth the admission of another

Ranking = list[tuple[StageChoice, float]]  # with times in us, fastest first


class Rehearsal:
    """Of one outer point.

    Args:
        base: its base plan.
    """

    def __init__(self, base: Plan) -> None:
        self._base = base
        self._times: dict[Plan, float | None] = {}  # None: on its way, or it failed
        self._leaders: dict[str, list[StageChoice]] = {}
        self._by_sum: Iterator[Plan] = iter(())  # of these leaders

    def next(self, rankings: Mapping[str, Ranking]) -> Plan | None:
        """The best of every stage; then, around the fastest plan so far, one stage by another of its leaders; then all
        plans of leaders by the sum of their stages' times; None: all of these were asked for."""
        first = self.fastest_stages(rankings)
        if first not in self._times:
            return self._asked(first)
        around = self.favourite or first
        leaders = {
            stage: [pair for pair in ranking[:_AT_MOST] if pair[1] <= _CLOSE * ranking[0][1]]
            for stage, ranking in sorted(rankings.items(), key=lambda pair: -pair[1][0][1] if pair[1] else 0.0)
            if ranking
        }
        choices = {stage: [choice for choice, _ in pairs] for stage, pairs in leaders.items()}
        if choices != self._leaders:
            self._leaders, self._by_sum = choices, self._in_order(leaders)
        near = (around.replace_stage(stage, choice) for stage, own in choices.items() for choice in own)
        left = (plan for plans in (near, self._by_sum) for plan in plans if plan not in self._times)
        plan = next(left, None)
        return None if plan is None else self._asked(plan)

    def tell(self, plan: Plan, time_us: float | None) -> bool:
        """What became of a plan that was asked for, or a better measurement of it; whether it is the fastest so far."""
        self._times[plan] = time_us
        return time_us is not None and plan == self.favourite

    @property
    def favourite(self) -> Plan | None:
        """The fastest plan measured."""
        timed = [(time_us, plan) for plan, time_us in self._times.items() if time_us is not None]
        return min(timed, key=lambda pair: pair[0])[1] if timed else None

    def chosen(self, rankings: Mapping[str, Ranking]) -> Plan:
        """The favourite, unless what stages have found since is clearly ahead of it."""
        first = self.fastest_stages(rankings)
        favourite = self.favourite
        if favourite is None or _sum_us(first, rankings) < _SURE * _sum_us(favourite, rankings):
            return first
        return favourite

    def ahead_of(self, plan: Plan) -> Plan | None:
        """The favourite, if it is clearly faster than a plan that was chosen before; None: it is not."""
        favourite, time_us = self.favourite, self._times.get(plan)
        if favourite is None or time_us is None:
            return None
        return favourite if (self._times[favourite] or time_us) < _CLEARLY * time_us else None

    def fastest_stages(self, rankings: Mapping[str, Ranking]) -> Plan:
        best = {stage: ranking[0][0] for stage, ranking in rankings.items() if ranking}
        return dataclasses.replace(self._base, stages={**self._base.stages, **best})

    def _in_order(self, leaders: Mapping[str, Ranking]) -> Iterator[Plan]:
        for stages in _by_sum(leaders):
            yield dataclasses.replace(self._base, stages={**self._base.stages, **stages})

    def _asked(self, plan: Plan) -> Plan:
        self._times[plan] = None
        return plan


def _by_sum(leaders: Mapping[str, Ranking]) -> Iterator[dict[str, StageChoice]]:
    """A choice for each stage, in all ways, the least sum of times first."""
    stages = list(leaders)
    begin = (0,) * len(stages)
    left = [(0.0, begin)]  # by how much more than the least sum, and the place of each stage's choice in its ranking
    seen = {begin}
    while left:
        _, places = heapq.heappop(left)
        yield {stage: leaders[stage][place][0] for stage, place in zip(stages, places)}
        for number, stage in enumerate(stages):
            other = (*places[:number], places[number] + 1, *places[number + 1 :])
            if other[number] < len(leaders[stage]) and other not in seen:
                seen.add(other)
                pairs = zip(stages, other)
                heapq.heappush(left, (sum(leaders[s][place][1] - leaders[s][0][1] for s, place in pairs), other))


def _sum_us(plan: Plan, rankings: Mapping[str, Ranking]) -> float:
    return sum(dict(ranking).get(plan.stages[stage], 0.0) for stage, ranking in rankings.items())
