"""How far the sum of stage times is from whole plans: what a search that tunes stages apart relies on.

A whole plan is predicted as the default plan's time, and for each stage what its config takes more or less alone than
the default one. That is held against what was measured end to end.
"""

from __future__ import annotations

import dataclasses
import statistics

from sse_tune.errors import SearchError
from sse_tune.plan import Plan
from sse_tune.tuning.measure import Timing
from sse_tune.tuning.recorded import Recorded
from sse_tune.tuning.sweep_file import Sweep


@dataclasses.dataclass(frozen=True)
class Additivity:
    """Of one sweep; all but `plans` as ratios, 0.01 for 1 %.

    Args:
        plans: how many ran.
        median_error: of the predictions' absolute errors.
        worst_error: with its sign: above 0, the prediction was too long.
        noise: of a plan's own median, half its 95 % interval; the median over the plans.
        best_by_sums: what the plan with the shortest prediction took whole, to the shortest whole; 1: it is the best.
    """

    plans: int
    median_error: float
    worst_error: float
    noise: float
    best_by_sums: float

    def line(self, within: float) -> str:
        is_near = "within" if self.best_by_sums <= within else "not within"
        return (
            f"Additivity: of {self.plans} plans the default and the differences of stage times predict the whole to "
            f"{self.median_error:.1%} (median) and {self.worst_error:+.1%} (worst; the noise of a plan is "
            f"{self.noise:.1%}); the best by sums takes {self.best_by_sums:.3f} of the best, {is_near} {within}."
        )


def additivity(sweep: Sweep) -> Additivity:
    """Holds predictions against the whole plans of a sweep.

    Raises:
        SearchError: it has none, or the default did not run at an outer point.
    """
    recorded = Recorded(sweep)
    if not recorded.has_whole_plans:
        raise SearchError("the sweep must hold whole plans", "none", "record it with `sse-tune sweep --whole-plans`")
    ran = {plan: row for plan, row in sweep.plans.items() if row.time_us is not None and plan.outer in recorded.outers}
    predicted = {plan: _predicted_us(plan, recorded) for plan in ran}
    wholes = {plan: recorded.exact_us(plan) or 0.0 for plan in ran}
    errors = [predicted[plan] / wholes[plan] - 1 for plan in ran]
    return Additivity(
        plans=len(ran),
        median_error=statistics.median(map(abs, errors)),
        worst_error=max(errors, key=abs),
        noise=statistics.median(Timing(row.times_us).noise_us / Timing(row.times_us).median_us for row in ran.values()),
        best_by_sums=wholes[min(ran, key=lambda plan: predicted[plan])] / min(wholes.values()),
    )


def _predicted_us(plan: Plan, recorded: Recorded) -> float:
    base = recorded.base(plan.outer)
    time_us = recorded.exact_us(base)
    if time_us is None:
        raise SearchError("the default must have run at each outer point", str(dict(plan.outer)), "record it again")
    for stage in recorded.stages:
        chosen, default = recorded.exact_us(plan, stage), recorded.exact_us(base, stage)
        assert chosen is not None and default is not None, "whole plans are made of configs that ran"
        time_us += chosen - default
    return time_us
