"""GDN recompute: the state at each boundary and the values W that a chunk solves for, again, for the backward pass.

The walk of `gdn_scan` without queries and outputs; nothing of size M·K·V lives from the forward to the backward. W is
kept rather than V' = Ag W: it is an operand of 16 bits already, so a product gives V' again with the bits it had here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.space import Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import common, gdn_groups
from sse_tune.templates.triton.common import (
    chunk_slots,
    load_gate_sums,
    load_rows,
    load_scalars,
    load_state,
    rows_of,
    state_beside,
    store_rows,
)
from sse_tune.templates.triton.gdn_groups import store_boundary, walk_part

if TYPE_CHECKING:
    import torch

SPACE = Space(
    params=(
        Param("block_v", (32, 64, 128), 64, "columns of the state one block keeps"),
        Param("num_warps", (2, 4, 8), 4, "warps per block"),
        Param("num_stages", (1, 2, 3), 3, "chunks in flight"),
    ),
    constraints=common.scan_constraints(row_tiles=1),
)


@triton.jit
def gdn_recompute_kernel(
    k, v, shared_k, Ag, k_scale, g_cumsum, perm, weights, segment_rows, segment_boundaries,
    chunk_table, initial_state, group_h, final_state, h, w, M, n_shared, n_segments, n_sequences, n_all_chunks,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PARTITIONS: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, SPLIT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v, i_h, i_seg, _, first_row, n_left, first_boundary, i_state, i_before, i_after = walk_part(
        segment_rows, segment_boundaries, chunk_table, n_segments, n_sequences, n_all_chunks, H, C, PARTITIONS,
        HAS_SHARED, NV, SPLIT,
    )  # fmt: skip
    p_k = tl.where(i_seg < n_shared, shared_k, k)
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)

    b_state = tl.zeros((BK, BV), tl.float32)
    if SPLIT > 0:
        b_state = state_beside(group_h, initial_state, i_before, i_state, i_h, o_k, o_v, H, K, V, HAS_INITIAL)
    elif HAS_INITIAL:
        b_state = load_state(initial_state, i_state, o_k, o_v, True, K, V)
    b_slot = chunk_slots(perm, first_row, n_left, C)
    for i in range(0, tl.cdiv(n_left, C)):
        n_rows = tl.minimum(n_left - i * C, C)
        b_row, b_token, b_lane, m_row = rows_of(b_slot, first_row + i * C, n_rows, C, L)
        b_slot = chunk_slots(perm, first_row + (i + 1) * C, n_left - (i + 1) * C, C)
        b_head = b_token * H + i_h
        b_at = i_h.to(tl.int64) * M + b_row
        b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)
        b_v = load_rows(v, b_head, m_row, o_v, V, BV)
        b_a = load_scalars(k_scale, b_at, m_row)
        b_b, b_last = load_gate_sums(g_cumsum, b_at, m_row, n_rows, C)
        b_Ag = load_rows(Ag, b_at, m_row, o_c, C, C)

        b_low = b_state.to(b_k.dtype)
        b_kept = (tl.exp(b_b.to(tl.float32)) * b_a)[:, None] * tl.dot(b_k, b_low, input_precision=PRECISION)
        b_W = (b_v.to(tl.float32) - b_kept).to(b_k.dtype)
        store_rows(w, b_W, b_at, m_row, o_v, V, BV)
        b_new = tl.dot(b_Ag, b_W, input_precision=PRECISION)
        b_in = (b_new * (b_a * tl.exp((b_last - b_b).to(tl.float32)))[:, None]).to(b_k.dtype)
        b_state = tl.exp(b_last.to(tl.float32)) * b_state + tl.dot(tl.trans(b_k), b_in, input_precision=PRECISION)
        store_boundary(h, b_state, first_boundary, i, n_left, i_after, i_h, o_k, o_v, H, C, K, V)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    arguments = dict(
        **common.streams(tensors, "k"),
        **common.row_arguments(call, tensors),
        **common.segment_arguments(call, tensors),
        **gdn_groups.arguments(call, tensors),
        **common.end_states(tensors, "initial_state", "final_state", "group_h"),
        **{name: tensors[name] for name in ("v", "Ag", "k_scale", "g_cumsum", "h", "w")},
    )
    common.launch_walk(call, gdn_recompute_kernel, arguments)


TEMPLATE = Template(
    "triton", "gdn_recompute", "recompute", ("gdn",), SPACE, run, (__name__, common.MODULE, gdn_groups.MODULE)
)
