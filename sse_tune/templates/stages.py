"""The stage graph: which stages compute a problem, what each reads and writes, and the arithmetic it cannot avoid.

The buffers between them, and the words used here, are those of `buffers.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from sse_tune.errors import PlanError
from sse_tune.problem import Problem
from sse_tune.space import Config, Space
from sse_tune.templates.buffers import BUFFERS, Sizes
from sse_tune.templates.outer import STAGED_OUTER


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step: what it reads, what it writes, and the arithmetic it cannot avoid.

    `flops` is per row and head. `reads` and `writes` name buffers of `BUFFERS` or tensors of the call: its inputs,
    `o`, `final_state`, `do`, `d_final_state`, and `d_` + an input for gradients. Reading q, k, g or beta is reading
    `shared_q`, ... in shared segments. `walks`: its chunks are steps that wait for one another, along a segment or,
    where segments are split, a group.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    flops: Callable[[Problem, int], float]
    backward: bool = False
    walks: bool = False


_WALK = ("perm", "weights", "segment_rows", "segment_boundaries")
_CHUNK = ("perm", "weights", "chunk_table")
_QKV = ("q", "k", "v")
_BETWEEN_GROUPS = ("group_h", "transitions", "group_dh")
_ROW_GRADIENTS = ("dq_rows", "dk_rows", "dg_rows", "de_rows")


def _shared_gradients(problem: Problem, names: tuple[str, ...]) -> tuple[str, ...]:
    """The always-on stream's gradients, one row a token: written in place by the stage that has them."""
    return tuple(f"d_shared_{name}" for name in names) if problem.shared else ()


def _no_flops(p: Problem, c: int) -> float:
    return 0.0


def _key_value(p: Problem) -> float:
    return float(p.key_dim * p.value_dim)


def _carry(p: Problem, rows: int) -> float:
    """A group's transition times the state before it, in three products, to each of its rows."""
    return 6.0 * p.key_dim * _key_value(p) / rows


_ROUTING = Stage(
    "routing",
    ("router_logits", "cu_seqlens"),
    ("weights", "chosen", "perm", "inv", "segment_rows", "segment_chunks", "segment_boundaries", "chunk_table"),
    _no_flops,
)
_COMBINE = Stage("combine", ("inv", "o_rows"), ("o",), _no_flops)


def _combine_gradients(problem: Problem) -> Stage:
    gdn = problem.rule == "gdn"
    sparse = ("d_q", "d_k", "d_g", *(("d_beta",) if gdn else ()), "d_router_logits")
    return Stage(
        "combine_gradients",
        ("inv", "chosen", "router_logits", "dv_rows", *_ROW_GRADIENTS, *(("dbeta_rows",) if gdn else ())),
        ("d_v", *(sparse if problem.num_partitions else ())),
        _no_flops,
        backward=True,
    )


def _gla_gradients(problem: Problem) -> Stage:
    return Stage(
        "gradients",
        (*_CHUNK, *_QKV, "g", "do", "k_scale", "q_scale", "h", "dh", "initial_state", "d_final_state"),
        (*_ROW_GRADIENTS, *_shared_gradients(problem, ("q", "k", "g"))),
        lambda p, c: 4 * _key_value(p) + 2 * c * p.value_dim + 4 * c * p.key_dim,
        backward=True,
    )


def _gla_stored(problem: Problem) -> tuple[Stage, ...]:
    """States kept at boundaries. They meet rows decayed beforehand, so that all stages but the first and `gradients`
    are products of matrices, the same ones forward and backward, and every chunk is a block of its own."""
    walk = ("perm", "segment_rows", "segment_chunks", "segment_boundaries", "chunk_table", "decay")
    forward = (
        _ROUTING,
        Stage(
            "decay_rows",
            (*_CHUNK, "q", "k", "g"),
            ("P", "qg", "kg", "decay", "k_scale", "q_scale"),
            lambda p, c: 2 * c * p.key_dim,
        ),
        Stage(
            "states", (*walk, "v", "kg", "initial_state"), ("h", "final_state"), lambda p, c: 2 * _key_value(p)
        ),
        Stage(
            "output",
            ("perm", "chunk_table", "v", "P", "qg", "h", "initial_state"),
            ("o_rows",),
            lambda p, c: 2 * _key_value(p) + 2 * c * p.value_dim,
        ),
        _COMBINE,
    )  # fmt: skip
    if not problem.trains:
        return forward
    return (
        *forward,
        Stage(
            "states_backward",
            (*walk, "do", "qg", "d_final_state"),
            ("dh", "d_initial_state"),
            lambda p, c: 2 * _key_value(p),
            backward=True,
        ),
        Stage(
            "value_gradients",
            ("perm", "chunk_table", "do", "P", "kg", "dh", "d_final_state"),
            ("dv_rows",),
            lambda p, c: 2 * _key_value(p) + 2 * c * p.value_dim,
            backward=True,
        ),
        _gla_gradients(problem),
        _combine_gradients(problem),
    )


def _gla_recomputed(problem: Problem) -> tuple[Stage, ...]:
    """States stay in registers with the output, and are gone through once more for the gradients."""
    scales = ("k_scale", "q_scale", "g")
    forward = (
        _ROUTING,
        Stage("prepare", (*_CHUNK, "q", "k", "g"), ("P", "k_scale", "q_scale"), lambda p, c: 2 * c * p.key_dim),
        Stage(
            "scan",
            (*_WALK, *_QKV, "P", *scales, "initial_state"),
            ("o_rows", "final_state"),
            lambda p, c: 4 * _key_value(p) + 2 * c * p.value_dim,
            walks=True,
        ),
        _COMBINE,
    )
    if not problem.trains:
        return forward
    return (
        *forward,
        Stage(
            "recompute",
            (*_WALK, "k", "v", "k_scale", "g", "initial_state"),
            ("h",),
            lambda p, c: 2 * _key_value(p),
            backward=True,
            walks=True,
        ),
        Stage(
            "state_gradient",
            (*_WALK, "q", "k", "do", "P", *scales, "d_final_state"),
            ("dh", "dv_rows", "d_initial_state"),
            lambda p, c: 4 * _key_value(p) + 2 * c * p.value_dim,
            backward=True,
            walks=True,
        ),
        _gla_gradients(problem),
        _combine_gradients(problem),
    )


def scan_keeps_states(problem: Problem, outer: Config) -> bool:
    """Whether GDN's walk with the output writes h and w, which the backward pass then has without a walk of its own."""
    return problem.rule == "gdn" and problem.trains and outer["states"] == "store"


def _gdn_stages(problem: Problem, split: int, scan_keeps: bool) -> tuple[Stage, ...]:
    """With segments split, what each group adds and what it makes of the state before it come first: then all groups
    are walked side by side. The two more stages walk as well. h and w are those of `scan` if it keeps them, else made
    again by the first walk of the backward pass."""
    scales = ("k_scale", "q_scale", "g_cumsum")
    inverse = ("A",) if problem.trains else ()
    walk = (*_WALK, "chunk_table") if split else _WALK
    group_h, group_dh = (("group_h",), ("group_dh",)) if split else ((), ())
    kept = ("h", "w") if scan_keeps else ()
    group_states = Stage(
        "group_states",
        (*walk, "k", "v", "Ag", "k_scale", "g_cumsum", "initial_state"),
        ("group_h", "transitions"),
        lambda p, c: (4 * p.key_dim + 2 * c) * (p.key_dim + p.value_dim) + _carry(p, c * split),
        walks=True,
    )
    group_gradients = Stage(
        "group_gradients",
        (*walk, "q", "k", "do", "P", "Ag", *scales, "d_final_state", "transitions"),
        ("group_dh",),
        lambda p, c: 6 * _key_value(p) + 4 * c * p.value_dim + _carry(p, c * split),
        backward=True,
        walks=True,
    )
    forward = (
        _ROUTING,
        Stage(
            "prepare",
            (*_CHUNK, "q", "k", "g", "beta"),
            ("P", "k_scale", "q_scale", "Ag", "g_cumsum", *inverse),
            lambda p, c: 4 * c * p.key_dim + 2 / 3 * c * c,
        ),
        *((group_states,) if split else ()),
        Stage(
            "scan",
            (*walk, *_QKV, "P", "Ag", *scales, "initial_state", *group_h),
            ("o_rows", "final_state", *kept),
            lambda p, c: 6 * _key_value(p) + 4 * c * p.value_dim,
            walks=True,
        ),
        _COMBINE,
    )
    if not problem.trains:
        return forward
    recompute = Stage(
        "recompute",
        (*walk, "k", "v", "Ag", "k_scale", "g_cumsum", "initial_state", *group_h),
        ("h", "w"),
        lambda p, c: 4 * _key_value(p) + 2 * c * p.value_dim,
        backward=True,
        walks=True,
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
            lambda p, c: 6 * _key_value(p) + 4 * c * p.value_dim,
            backward=True,
            walks=True,
        ),
        Stage(
            "score_gradients",
            (*_CHUNK, "k", "do", "beta", "P", "Ag", "A", "k_scale", "g_cumsum", "w", "dv_new"),
            ("dp", "dn", "db", "dbeta_rows", *_shared_gradients(problem, ("beta",))),
            lambda p, c: 6 * c * p.value_dim + 2 * c * p.key_dim + 4 * c * c,
            backward=True,
        ),
        Stage(
            "gradients",
            (
                *_CHUNK, "q", "k", "do", *scales, "h", "dh", "initial_state", "d_final_state", "Ag", "w", "dv_rows",
                "dp", "dn", "db", "h_dh",
            ),
            (*_ROW_GRADIENTS, *_shared_gradients(problem, ("q", "k", "g"))),
            lambda p, c: 6 * _key_value(p) + 2 * c * p.value_dim + 6 * c * p.key_dim,
            backward=True,
        ),
        _combine_gradients(problem),
    )


def stages_of(problem: Problem, outer: Config) -> tuple[Stage, ...]:
    """The staged graph of a problem under a plan's outer choices, in the order the stages run.

    Raises PlanError when a choice that decides is missing: a plan written by another version."""
    for decides in ("states", "split") if problem.rule == "gdn" else ("states",):
        if decides not in outer:
            raise PlanError(f"a plan must choose `{decides}`", f"only {sorted(outer)}", "search again for this problem")
    if problem.rule == "gdn":
        return _gdn_stages(problem, int(outer["split"]), scan_keeps_states(problem, outer))
    return _gla_stored(problem) if outer["states"] == "store" else _gla_recomputed(problem)


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
