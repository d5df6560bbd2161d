"""Between plans whose times the noise cannot tell apart: the times of their stages, measured alone.

A stage of some microseconds is lost in the noise of the whole, and one with fewer launches saves the host what no
replay of a graph shows.
"""

from __future__ import annotations

from collections.abc import Callable

from sse_tune.plan import Plan

STAGE_MARGIN = 1.02  # times: a stage within it is not slower; its rival may have been measured at another moment
_CLEARLY = 0.9  # times: such a stage is faster


def saved_by_stages(plan: Plan, holder: Plan, time_of: Callable[[Plan, str], float | None]) -> float:
    """What a plan's stages save by their own times, against the holder's, in microseconds: 0 for the holder itself, and
    less unless one stage is clearly faster, none is slower, and the time of each that differs is known.

    Args:
        plan, holder: of one time by the noise.
        time_of: of a plan's stage, in microseconds; None: not known.
    """
    if plan == holder:
        return 0.0
    if plan.outer != holder.outer or plan.graph != holder.graph:
        return -1.0
    saved_us, is_clear = 0.0, False
    for stage, choice in plan.stages.items():
        if choice == holder.stages[stage]:
            continue
        mine, theirs = time_of(plan, stage), time_of(holder, stage)
        if mine is None or theirs is None or mine > STAGE_MARGIN * theirs:
            return -1.0
        saved_us += theirs - mine
        is_clear = is_clear or mine < _CLEARLY * theirs
    return saved_us if is_clear else -1.0
