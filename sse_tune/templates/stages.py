"""The stage graph: which stages compute a problem, what each reads and writes, and the arithmetic it cannot avoid.

The stages themselves are in `gla_stages.py` and `gdn_stages.py`; the buffers between them, and the words used here, are
those of `buffers.py`.
"""

from __future__ import annotations

import dataclasses

from sse_tune.errors import PlanError
from sse_tune.problem import Problem
from sse_tune.space import Config, Space
from sse_tune.templates.buffers import BUFFERS, Sizes
from sse_tune.templates.gdn_stages import gdn_stages, scan_keeps_states
from sse_tune.templates.gla_stages import GLA_GRAPHS
from sse_tune.templates.outer import STAGED_OUTER
from sse_tune.templates.stage import Stage

# where the always-on stream is alone, rows are tokens: stages write the call's own tensors, and nothing is to be summed
ROWS_OF_TOKENS = {"o": "o_rows", "d_v": "dv_rows"}
_BETWEEN_GROUPS = ("group_h", "transitions", "group_dh")


def stages_of(problem: Problem, outer: Config) -> tuple[Stage, ...]:
    """The staged graph of a problem under a plan's outer choices, in the order the stages run.

    Raises PlanError when a choice that decides is missing: a plan written by another version."""
    for decides in ("states", "split") if problem.rule == "gdn" else ("states",):
        if decides not in outer:
            raise PlanError(f"a plan must choose `{decides}`", f"only {sorted(outer)}", "search again for this problem")
    if problem.rule == "gdn":
        stages = gdn_stages(problem, int(outer["split"]), scan_keeps_states(problem, outer))
    elif outer["states"] in GLA_GRAPHS:
        stages = GLA_GRAPHS[str(outer["states"])](problem)
    else:
        known = ", ".join(GLA_GRAPHS)
        raise PlanError(f"`states` must be one of {known}", str(outer["states"]), "search again for this problem")
    return stages if problem.num_partitions else _of_tokens(stages)


def _of_tokens(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    tokens = {rows: name for name, rows in ROWS_OF_TOKENS.items()}
    return tuple(
        dataclasses.replace(
            stage,
            reads=tuple(tokens.get(name, name) for name in stage.reads),
            writes=tuple(tokens.get(name, name) for name in stage.writes),
        )
        for stage in stages
        if stage.name not in ("combine", "combine_gradients")
    )


# graph name -> the outer space its plans choose from
GRAPHS: dict[str, Space] = {"staged": STAGED_OUTER, "whole": Space()}


def stage_names(graph: str, problem: Problem, outer: Config) -> tuple[str, ...]:
    """The stages a plan of this graph must choose a template for; "whole" is one stage that does everything.

    `outer` must have passed the graph's space."""
    if graph == "whole":
        return ("whole",)
    if graph == "staged":
        return tuple(stage.name for stage in stages_of(problem, outer))
    raise PlanError("the stage graph must be known", f"{graph!r}", f"use one of {', '.join(GRAPHS)}")


def stage_contract(name: str, problem: Problem, outer: Config) -> tuple[object, ...]:
    """What a stage sees of the outer choices: C, how segments are split if it walks along them, and dtype and shape of
    each buffer it reads or writes. Where two outer points have the same contract, what was measured at one holds at
    the other."""
    if name == "whole":
        return tuple(sorted(outer.items()))
    sizes = Sizes.of(problem, outer)
    (stage,) = (stage for stage in stages_of(problem, outer) if stage.name == name)
    seen = [BUFFERS[buffer] for buffer in (*stage.reads, *stage.writes) if buffer in BUFFERS]
    split = (("split", sizes.split),) if any(buffer.name in _BETWEEN_GROUPS for buffer in seen) else ()
    shapes = ((buffer.name, buffer.dtype_in(problem, outer), buffer.shape(sizes)) for buffer in seen)
    return sizes.chunk_size, *split, *shapes


__all__ = ["GRAPHS", "ROWS_OF_TOKENS", "Stage", "scan_keeps_states", "stage_contract", "stage_names", "stages_of"]
