"""Whole plans put together of the leaders of all stages, measured while a device would only wait for the compilers.

Stage times add up nearly, not quite: what one stage leaves in the cache another finds there. Among the few configs of
each stage that its own times do not tell apart, end-to-end times decide, at no cost: all of them are compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sse_tune.plan import Plan, StageChoice

_CLOSE = 1.03  # times the fastest of a stage
_AT_MOST = 3  # configs of a stage
_SURE = 0.98  # of the sum of stage times: a gain that no order within the plan takes back

Ranking = list[tuple[StageChoice, float]]  # with times in us, fastest first


class Rehearsal:
    """Of one outer point.

    Args:
        base: its base plan.
    """

    def __init__(self, base: Plan) -> None:
        self._base = base
        self._times: dict[Plan, float | None] = {}  # None: on its way, or it failed

    def next(self, rankings: Mapping[str, Ranking]) -> Plan | None:
        """The best of every stage; then, around the fastest plan so far, one stage by another of its leaders; None:
        all of these were asked for."""
        first = self.fastest_stages(rankings)
        if first not in self._times:
            return self._asked(first)
        around = self.favourite or first
        for stage, ranking in sorted(rankings.items(), key=lambda pair: -pair[1][0][1] if pair[1] else 0.0):
            for choice, time_us in ranking[:_AT_MOST]:
                plan = around.replace_stage(stage, choice)
                if plan not in self._times and time_us <= _CLOSE * ranking[0][1]:
                    return self._asked(plan)
        return None

    def tell(self, plan: Plan, time_us: float | None) -> bool:
        """What became of a plan that was asked for; whether it is the fastest so far."""
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

    def fastest_stages(self, rankings: Mapping[str, Ranking]) -> Plan:
        best = {stage: ranking[0][0] for stage, ranking in rankings.items() if ranking}
        return dataclasses.replace(self._base, stages={**self._base.stages, **best})

    def _asked(self, plan: Plan) -> Plan:
        self._times[plan] = None
        return plan


def _sum_us(plan: Plan, rankings: Mapping[str, Ranking]) -> float:
    return sum(dict(ranking).get(plan.stages[stage], 0.0) for stage, ranking in rankings.items())
