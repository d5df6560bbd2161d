"""The stages of GDN, by the outer choices `states` and `split`."""

from __future__ import annotations

from sse_tune.problem import Problem
from sse_tune.space import Config
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


def _carry(p: Problem, rows: int) -> float:
    """A group's transition times the state before it, in three products, to each of its rows."""
    return 6.0 * p.key_dim * key_value(p) / rows


def scan_keeps_states(problem: Problem, outer: Config) -> bool:
    """Whether GDN's walk with the output writes h and w, which the backward pass then has without a walk of its own."""
    return problem.rule == "gdn" and problem.trains and outer["states"] == "store"


def gdn_stages(problem: Problem, split: int, scan_keeps: bool) -> tuple[Stage, ...]:
    """With segments split, what each group adds and what it makes of the state before it come first: then all groups
    are walked side by side. The two more stages walk as well. h and w are those of `scan` if it keeps them, else made
    again by the first walk of the backward pass."""
    scales = ("k_scale", "q_scale", "g_cumsum")
    inverse = ("A",) if problem.trains else ()
    walk = (*WALK, "chunk_table") if split else WALK
    group_h, group_dh = (("group_h",), ("group_dh",)) if split else ((), ())
    kept = ("h", "w") if scan_keeps else ()
    group_states = Stage(
        "group_states",
        (*walk, "k", "v", "Ag", "k_scale", "g_cumsum", "initial_state"),
        ("group_h", "transitions"),
        lambda p, c: (4 * p.key_dim + 2 * c) * (p.key_dim + p.value_dim) + _carry(p, c * split),
        walks=1.0,
    )
    group_gradients = Stage(
        "group_gradients",
        (*walk, "q", "k", "do", "P", "Ag", *scales, "d_final_state", "transitions"),
        ("group_dh",),
        lambda p, c: 6 * key_value(p) + 4 * c * p.value_dim + _carry(p, c * split),
        backward=True,
        walks=1.0,
    )
    forward = (
        ROUTING,
        Stage(
            "prepare",
            (*CHUNK, "q", "k", "g", "beta"),
            ("P", "k_scale", "q_scale", "Ag", "g_cumsum", *inverse),
            lambda p, c: 4 * c * p.key_dim + 2 / 3 * c * c,
        ),
        *((group_states,) if split else ()),
        Stage(
            "scan",
            (*walk, *QKV, "P", "Ag", *scales, "initial_state", *group_h),
            ("o_rows", "final_state", *kept),
            lambda p, c: 6 * key_value(p) + 4 * c * p.value_dim,
            walks=1.0,
        ),
        COMBINE,
    )
    if not problem.trains:
        return forward
    recompute = Stage(
        "recompute",
        (*walk, "k", "v", "Ag", "k_scale", "g_cumsum", "initial_state", *group_h),
        ("h", "w"),
        lambda p, c: 4 * key_value(p) + 2 * c * p.value_dim,
        backward=True,
        walks=1.0,
    )
    return (
        *forward,
        *(() if scan_keeps else (recompute,)),
        *((group_gradients,) if split else ()),
        Stage(
            "state_gradient",
            (
                *walk, "segment_chunks", "q", "k", "do", "P", "Ag", *scales, "d_final_state", "h", "initial_state",
                *group_dh,
            ),
            ("dh", "dv_rows", "d_initial_state", "dv_new", "h_dh"),
            lambda p, c: 6 * key_value(p) + 4 * c * p.value_dim,
            backward=True,
            walks=1.0,
        ),
        Stage(
            "score_gradients",
            (*CHUNK, "k", "do", "beta", "P", "Ag", "A", "k_scale", "g_cumsum", "w", "dv_new"),
            ("dp", "dn", "db", "dbeta_rows", *shared_gradients(problem, ("beta",))),
            lambda p, c: 6 * c * p.value_dim + 2 * c * p.key_dim + 4 * c * c,
            backward=True,
        ),
        Stage(
            "gradients",
            (
                *CHUNK, "q", "k", "do", *scales, "h", "dh", "initial_state", "d_final_state", "Ag", "w", "dv_rows",
                "dp", "dn", "db", "h_dh",
            ),
            (*ROW_GRADIENTS, *shared_gradients(problem, ("q", "k", "g"))),
            lambda p, c: 6 * key_value(p) + 2 * c * p.value_dim + 6 * c * p.key_dim,
            backward=True,
        ),
        combine_gradients(problem),
    )
