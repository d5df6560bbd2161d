"""A stage of the graph, and the stages and lists of tensors that both rules' graphs are made of.

The buffers between stages, and the words used here, are those of `buffers.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from sse_tune.problem import Problem


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step: what it reads, what it writes, and the arithmetic it cannot avoid.

    `flops` is per row and head. `reads` and `writes` name buffers of `BUFFERS` or tensors of the call: its inputs,
    `o`, `final_state`, `do`, `d_final_state`, and `d_` + an input for gradients. Reading q, k, g or beta is reading
    `shared_q`, ... in shared segments. `walks`: not 0 where its chunks are steps that wait for one another, along a
    segment or, where segments are split, a group: how long a step is beside GDN's.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    flops: Callable[[Problem, int], float]
    backward: bool = False
    walks: float = 0.0


WALK = ("perm", "weights", "segment_rows", "segment_boundaries")
CHUNK = ("perm", "weights", "chunk_table")
QKV = ("q", "k", "v")
ROW_GRADIENTS = ("dq_rows", "dk_rows", "dg_rows", "de_rows")


def shared_gradients(problem: Problem, names: tuple[str, ...]) -> tuple[str, ...]:
    """The always-on stream's gradients, one row a token: written in place by the stage that has them."""
    return tuple(f"d_shared_{name}" for name in names) if problem.shared else ()


def _no_flops(p: Problem, c: int) -> float:
    return 0.0


def key_value(p: Problem) -> float:
    return float(p.key_dim * p.value_dim)


ROUTING = Stage(
    "routing",
    ("router_logits", "cu_seqlens"),
    ("weights", "chosen", "perm", "inv", "segment_rows", "segment_chunks", "segment_boundaries", "chunk_table"),
    _no_flops,
)
COMBINE = Stage("combine", ("inv", "o_rows"), ("o",), _no_flops)


def combine_gradients(problem: Problem) -> Stage:
    gdn = problem.rule == "gdn"
    sparse = ("d_q", "d_k", "d_g", *(("d_beta",) if gdn else ()), "d_router_logits")
    return Stage(
        "combine_gradients",
        ("inv", "chosen", "router_logits", "dv_rows", *ROW_GRADIENTS, *(("dbeta_rows",) if gdn else ())),
        ("d_v", *(sparse if problem.num_partitions else ())),
        _no_flops,
        backward=True,
    )
