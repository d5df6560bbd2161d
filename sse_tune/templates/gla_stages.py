"""The stages of GLA, by the outer choice `states`: recomputed, stored, or made with the rows they give."""

from __future__ import annotations

from sse_tune.problem import Problem
from sse_tune.templates.stage import (
    CHUNK,
    COMBINE,
    QKV,
    ROUTING,
    ROW_GRADIENTS,
    WALK,
    Stage,
    combine_gradients,
    key_value,
    shared_gradients,
)


def _gla_gradients(problem: Problem) -> Stage:
    return Stage(
        "gradients",
        (*CHUNK, *QKV, "g", "do", "k_scale", "q_scale", "h", "dh", "initial_state", "d_final_state"),
        (*ROW_GRADIENTS, *shared_gradients(problem, ("q", "k", "g"))),
        lambda p, c: 4 * key_value(p) + 2 * c * p.value_dim + 4 * c * p.key_dim,
        backward=True,
    )


_JOINT_STEP = 0.4  # three products at once, where GDN's step has four one after the other: an estimate
_GLA_WALK = ("perm", "segment_rows", "segment_chunks", "segment_boundaries", "decay")
_DECAY_ROWS = Stage(
    "decay_rows",
    (*CHUNK, "q", "k", "g"),
    ("P", "qg", "kg", "decay", "k_scale", "q_scale"),
    lambda p, c: 2 * c * p.key_dim,
)


def _gla_stored(problem: Problem) -> tuple[Stage, ...]:
    """States kept at boundaries. They meet rows decayed beforehand, so that all stages but the first and `gradients`
    are products of matrices, the same ones forward and backward, and every chunk is a block of its own."""
    walk = (*_GLA_WALK, "chunk_table")
    forward = (
        ROUTING,
        _DECAY_ROWS,
        Stage(
            "states", (*walk, "v", "kg", "initial_state"), ("h", "final_state"), lambda p, c: 2 * key_value(p)
        ),
        Stage(
            "output",
            ("perm", "chunk_table", "v", "P", "qg", "h", "initial_state"),
            ("o_rows",),
            lambda p, c: 2 * key_value(p) + 2 * c * p.value_dim,
        ),
        COMBINE,
    )  # fmt: skip
    if not problem.trains:
        return forward
    return (
        *forward,
        Stage(
            "states_backward",
            (*walk, "do", "qg", "d_final_state"),
            ("dh", "d_initial_state"),
            lambda p, c: 2 * key_value(p),
            backward=True,
        ),
        Stage(
            "value_gradients",
            ("perm", "chunk_table", "do", "P", "kg", "dh", "d_final_state"),
            ("dv_rows",),
            lambda p, c: 2 * key_value(p) + 2 * c * p.value_dim,
            backward=True,
        ),
        _gla_gradients(problem),
        combine_gradients(problem),
    )


def _gla_joint(problem: Problem) -> tuple[Stage, ...]:
    """As `_gla_stored`, but the walks that make the states make the rows they give too: rows are read once for both,
    states written for `gradients` alone, and with no backward pass not at all."""

    def flops(p: Problem, c: int) -> float:
        return 4 * key_value(p) + 2 * c * p.value_dim

    states = ("h",) if problem.trains else ()
    reads, writes = (*_GLA_WALK, "v", "P", "qg", "kg", "initial_state"), ("o_rows", "final_state", *states)
    forward = (ROUTING, _DECAY_ROWS, Stage("states_output", reads, writes, flops, walks=_JOINT_STEP), COMBINE)
    if not problem.trains:
        return forward
    return (
        *forward,
        Stage(
            "states_value_gradients",
            (*_GLA_WALK, "do", "P", "qg", "kg", "d_final_state"),
            ("dv_rows", "d_initial_state", "dh"),
            flops,
            backward=True,
            walks=_JOINT_STEP,
        ),
        _gla_gradients(problem),
        combine_gradients(problem),
    )


def _gla_recomputed(problem: Problem) -> tuple[Stage, ...]:
    """States stay in registers with the output, and are gone through once more for the gradients."""
    scales = ("k_scale", "q_scale", "g")
    forward = (
        ROUTING,
        Stage("prepare", (*CHUNK, "q", "k", "g"), ("P", "k_scale", "q_scale"), lambda p, c: 2 * c * p.key_dim),
        Stage(
            "scan",
            (*WALK, *QKV, "P", *scales, "initial_state"),
            ("o_rows", "final_state"),
            lambda p, c: 4 * key_value(p) + 2 * c * p.value_dim,
            walks=1.0,
        ),
        COMBINE,
    )
    if not problem.trains:
        return forward
    return (
        *forward,
        Stage(
            "recompute",
            (*WALK, "k", "v", "k_scale", "g", "initial_state"),
            ("h",),
            lambda p, c: 2 * key_value(p),
            backward=True,
            walks=1.0,
        ),
        Stage(
            "state_gradient",
            (*WALK, "q", "k", "do", "P", *scales, "d_final_state"),
            ("dh", "dv_rows", "d_initial_state"),
            lambda p, c: 4 * key_value(p) + 2 * c * p.value_dim,
            backward=True,
            walks=1.0,
        ),
        _gla_gradients(problem),
        combine_gradients(problem),
    )


GLA_GRAPHS = {"recompute": _gla_recomputed, "store": _gla_stored, "joint": _gla_joint}
