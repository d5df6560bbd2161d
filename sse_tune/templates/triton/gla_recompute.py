"""GLA recompute: the state at each boundary, which the forward pass does not keep.

    S <- e^(b_C) S + (a K e^(b_C - b))ᵀ V

A block keeps block_v columns of one head's state in registers and walks its segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.space import Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import common, gla_common
from sse_tune.templates.triton.common import chunk_rows, load_rows, load_scalars, load_state, store_state, walk_block
from sse_tune.templates.triton.gla_common import walk_gates

if TYPE_CHECKING:
    import torch

SPACE = Space(
    params=(
        Param("block_v", (32, 64, 128), 64, "columns of the state one block keeps"),
        Param("num_warps", (2, 4, 8), 8, "warps per block"),
        Param("num_stages", (1, 2, 3), 3, "chunks in flight"),
    ),
    constraints=gla_common.walk_constraints(key_tiles=1),
)


@triton.jit
def gla_recompute_kernel(
    k, v, g, shared_k, shared_g, k_scale, perm, weights, segment_rows, segment_boundaries, initial_state, final_state,
    h, M, n_shared, n_sequences,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PARTITIONS: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v, i_h, i_seg, first_row, n_left, first_boundary, i_state = walk_block(
        segment_rows, segment_boundaries, n_sequences, H, PARTITIONS, HAS_SHARED, NV
    )
    p_k = tl.where(i_seg < n_shared, shared_k, k)
    p_g = tl.where(i_seg < n_shared, shared_g, g)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)

    b_state = tl.zeros((BK, BV), tl.float32)
    if HAS_INITIAL:
            b_state = load_state(initial_state, i_state, o_k, o_v, True, K, V)
    # the state after the last chunk is no boundary
    for i in range(tl.cdiv(n_left, C) - 1):
        n_rows = tl.minimum(n_left - i * C, C)
        b_row, b_slot, b_token, b_lane, m_row = chunk_rows(perm, first_row + i * C, n_rows, C, L)
        b_head = b_token * H + i_h
        b_at = i_h.to(tl.int64) * M + b_row
        b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)  # [C, BK]
        b_v = load_rows(v, b_head, m_row, o_v, V, BV)  # [C, BV]
        m_write = m_row & (b_lane < WRITERS)
        _, b_rest, b_end = walk_gates(p_g, b_head, m_write, o_k, C, K, BK, EXACT)
        b_a = load_scalars(k_scale, b_at, m_row)
        b_ke = (b_k * (b_a[:, None] * tl.exp(b_rest))).to(b_k.dtype)
        b_state *= tl.exp(b_end)[:, None]
        b_state += tl.dot(tl.trans(b_ke), b_v, input_precision=PRECISION)
        store_state(h, b_state, tl.cast(first_boundary + i, tl.int64) * H + i_h, o_k, o_v, True, K, V)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    arguments = dict(
        **common.streams(tensors, "k", "g"),
        **common.row_arguments(call, tensors),
        **common.segment_arguments(call, tensors),
        **common.end_states(tensors, "initial_state", "final_state"),
        **{name: tensors[name] for name in ("v", "k_scale", "h")},
        EXACT=call.sizes.problem.dtype == "fp32",
    )
    common.launch_walk(call, gla_recompute_kernel, arguments)


TEMPLATE = Template(
    "triton", "gla_recompute", "recompute", ("gla",), SPACE, run, (__name__, common.MODULE, gla_common.MODULE)
)
