"""Between plans whose times the noise cannot tell apart: the times of their stages, measured alone.

A stage of some microseconds is lost in the noise of the whole, and one with fewer launches saves the host what no
replay of a graph shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sse_tune.plan import Plan, StageChoice

STAGE_MARGIN = 1.02  # times: a stage within it is not slower; its rival may have been measured at another moment
_CLEARLY = 0.9  # times: such a stage is faster

TimeOf = Callable[[Plan, str], float | None]  # of a plan's stage, in microseconds; None: not known


def with_faster_stages(holder: Plan, choices: Iterable[tuple[str, StageChoice]], time_of: TimeOf) -> Plan:
    """A plan with the choices, of those given by stage, that are clearly faster than its own, and of several the
    fastest; itself where there are none."""
    best: dict[str, tuple[float, StageChoice]] = {}
    for stage, choice in choices:
        if stage not in holder.stages:
            continue
        mine, theirs = time_of(holder.replace_stage(stage, choice), stage), time_of(holder, stage)
        if mine is None or theirs is None or mine >= _CLEARLY * theirs:
            continue
        if stage not in best or mine < best[stage][0]:
            best[stage] = mine, choice
    for stage, (_, choice) in best.items():
        holder = holder.replace_stage(stage, choice)
    return holder


def saved_by_stages(plan: Plan, holder: Plan, time_of: TimeOf) -> float:
    """What a plan's stages save by their own times, against the holder's, in microseconds: 0 for the holder itself, and
    less unless one stage is clearly faster, none is slower, and the time of each that differs is known.

    Args:
        plan, holder: of one time by the noise.
        time_of: of their stages.
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
