"""GDN scan: the state of each segment from chunk to chunk, and the output of every row, in one kernel.

With S the state before the chunk, b the in-chunk cumsum of g, and Ag and P of `gdn_prepare`:

    W = V - diag(e^b a) K S        V' = Ag W
    O = diag(c e^b) Q S + P V'     S <- e^(b_C) S + Kᵀ diag(a e^(b_C - b)) V'

A block keeps block_v columns of one head's state in registers and walks its segment, or a group of its chunks. Plans
that keep their states have it store S at each boundary and W, as `gdn_recompute` does in all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.space import Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.stages import scan_keeps_states
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
    store_state,
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
    constraints=common.scan_constraints(row_tiles=2),
)


@triton.jit
def gdn_scan_kernel(
    q, k, v, shared_q, shared_k, P, Ag, k_scale, q_scale, g_cumsum, perm, weights, segment_rows, segment_boundaries,
    chunk_table, initial_state, group_h, o_rows, final_state, h, w, M, n_shared, n_segments, n_sequences, n_all_chunks,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PARTITIONS: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, SPLIT: tl.constexpr,
    KEEPS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v, i_h, i_seg, _, first_row, n_left, first_boundary, i_state, i_before, i_after = walk_part(
        segment_rows, segment_boundaries, chunk_table, n_segments, n_sequences, n_all_chunks, H, C, PARTITIONS,
        HAS_SHARED, NV, SPLIT,
    )  # fmt: skip
    p_q = tl.where(i_seg < n_shared, shared_q, q)
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
        b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)  # [C, BK]
        b_q = load_rows(p_q, b_head, m_row, o_k, K, BK)  # [C, BK]
        b_v = load_rows(v, b_head, m_row, o_v, V, BV)  # [C, BV]
        b_a = load_scalars(k_scale, b_at, m_row)
        b_c = load_scalars(q_scale, b_at, m_row)
        b_b, b_last = load_gate_sums(g_cumsum, b_at, m_row, n_rows, C)
        b_Ag = load_rows(Ag, b_at, m_row, o_c, C, C)  # [C, C]
        b_P = load_rows(P, b_at, m_row, o_c, C, C)  # [C, C]

        b_up = tl.exp(b_b.to(tl.float32))
        b_low = b_state.to(b_k.dtype)
        b_kept = (b_up * b_a)[:, None] * tl.dot(b_k, b_low, input_precision=PRECISION)
        b_W = (b_v.to(tl.float32) - b_kept).to(b_k.dtype)
        if KEEPS:
            store_rows(w, b_W, b_at, m_row, o_v, V, BV)
        b_new = tl.dot(b_Ag, b_W, input_precision=PRECISION)  # [C, BV]
        b_o = (b_c * b_up)[:, None] * tl.dot(b_q, b_low, input_precision=PRECISION)
        b_o += tl.dot(b_P, b_new.to(b_k.dtype), input_precision=PRECISION)
        store_rows(o_rows, b_o, b_row * H + i_h, m_row, o_v, V, BV)
        b_in = (b_new * (b_a * tl.exp((b_last - b_b).to(tl.float32)))[:, None]).to(b_k.dtype)
        b_state = tl.exp(b_last.to(tl.float32)) * b_state + tl.dot(tl.trans(b_k), b_in, input_precision=PRECISION)
        if KEEPS:
            store_boundary(h, b_state, first_boundary, i, n_left, i_after, i_h, o_k, o_v, H, C, K, V)
    if HAS_FINAL:
        store_state(final_state, b_state, i_state, o_k, o_v, i_after < 0, K, V)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    keeps = scan_keeps_states(call.sizes.problem, call.config)
    arguments = dict(
        **common.streams(tensors, "q", "k"),
        **common.row_arguments(call, tensors),
        **common.segment_arguments(call, tensors),
        **gdn_groups.arguments(call, tensors),
        **common.end_states(tensors, "initial_state", "final_state", "group_h"),
        **{name: tensors[name] for name in ("v", "P", "Ag", "k_scale", "q_scale", "g_cumsum", "o_rows")},
        **{name: tensors[name if keeps else "weights"] for name in ("h", "w")},  # a stand-in is never written
        KEEPS=keeps,
    )
    common.launch_walk(call, gdn_scan_kernel, arguments)


TEMPLATE = Template("triton", "gdn_scan", "scan", ("gdn",), SPACE, run, (__name__, common.MODULE, gdn_groups.MODULE))
