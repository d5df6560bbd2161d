"""GDN state gradient: the gradient of the state at each boundary, walking every segment backwards.

With dS the gradient of the state after the chunk:

    dV' = PᵀdO + diag(a e^(b_C - b)) K dS       dW = Agᵀ dV' = dV
    dS <- e^(b_C) dS + Qᵀ diag(c e^b) dO - Kᵀ diag(a e^b) dW

and <h, dS> with the state h before the chunk, of which the gates' gradient is made: here dS is at hand in fp32.
The columns of V do not mix, so a block keeps block_v of them, as the forward scan does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.space import Param, Space
from sse_tune.templates.buffers import STATE_PRODUCT_COLUMNS
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
    store_state,
)
from sse_tune.templates.triton.gdn_groups import walk_part

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
def gdn_state_gradient_kernel(
    q, k, shared_q, shared_k, do, P, Ag, k_scale, q_scale, g_cumsum, perm, weights, segment_rows,
    segment_chunks, segment_boundaries, chunk_table, h, initial_state, d_final_state, group_dh, dh, h_dh, dv_new,
    dv_rows, d_initial_state, M, n_shared, n_segments, n_sequences, n_all_chunks,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PARTITIONS: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, SPLIT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v, i_h, i_seg, i_chunk, first_row, n_left, first_boundary, i_state, i_first, i_after = walk_part(
        segment_rows, segment_boundaries, chunk_table, n_segments, n_sequences, n_all_chunks, H, C, PARTITIONS,
        HAS_SHARED, NV, SPLIT,
    )  # fmt: skip
    p_q = tl.where(i_seg < n_shared, shared_q, q)
    p_k = tl.where(i_seg < n_shared, shared_k, k)
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)

    b_ds = tl.zeros((BK, BV), tl.float32)
    if SPLIT > 0:
        b_ds = state_beside(group_dh, d_final_state, i_after, i_state, i_h, o_k, o_v, H, K, V, HAS_FINAL)
    elif HAS_FINAL:
        b_ds = load_state(d_final_state, i_state, o_k, o_v, True, K, V)
    n_chunks = tl.cdiv(n_left, C)
    first_chunk = tl.load(segment_chunks + i_seg) + i_chunk
    last = tl.maximum(n_chunks - 1, 0) * C  # 0 where there is no row either
    b_slot = chunk_slots(perm, first_row + last, n_left - last, C)
    for i in range(0, n_chunks):  # the whole of <h, dh> is in the first part; beside the products this would spill
        for i_part in tl.static_range(1, BV // PART):
            o_product = tl.cast(i_v * (BV // PART) + i_part, tl.int64) * H + i_h
            p_product = h_dh + (o_product * n_all_chunks + first_chunk + i) * K + o_k
            tl.store(p_product, tl.zeros((BK,), tl.float32), mask=(i_v * BV + i_part * PART < V) & (o_k < K))
    for i_back in range(0, n_chunks):
        i = n_chunks - 1 - i_back
        n_rows = tl.minimum(n_left - i * C, C)
        b_row, b_token, b_lane, m_row = rows_of(b_slot, first_row + i * C, n_rows, C, L)
        b_slot = chunk_slots(perm, first_row + (i - 1) * C, tl.where(i > 0, C, 0), C)
        b_head = b_token * H + i_h
        b_at = i_h.to(tl.int64) * M + b_row
        b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)
        b_q = load_rows(p_q, b_head, m_row, o_k, K, BK)
        b_do = load_rows(do, b_head, m_row, o_v, V, BV)
        b_a = load_scalars(k_scale, b_at, m_row)
        b_c = load_scalars(q_scale, b_at, m_row)
        b_b, b_last = load_gate_sums(g_cumsum, b_at, m_row, n_rows, C)
        b_Ag = load_rows(Ag, b_at, m_row, o_c, C, C)
        b_P = load_rows(P, b_at, m_row, o_c, C, C)

        has_before = (i > 0) | (i_first >= 0)
        i_before = tl.where(has_before, first_boundary + i - 1, -1)
        b_h = state_beside(h, initial_state, i_before, i_state, i_h, o_k, o_v, H, K, V, HAS_INITIAL)
        b_product = tl.sum(b_h.to(tl.float32) * b_ds, 1)  # [BK]
        o_product = tl.cast(i_v * (BV // PART), tl.int64) * H + i_h
        p_product = h_dh + (o_product * n_all_chunks + first_chunk + i) * K + o_k
        tl.store(p_product, b_product, mask=(i_v * BV < V) & (o_k < K))

        b_up = tl.exp(b_b.to(tl.float32))
        b_down = b_a * tl.exp((b_last - b_b).to(tl.float32))
        b_dnew = b_down[:, None] * tl.dot(b_k, b_ds.to(b_k.dtype), input_precision=PRECISION)
        b_dnew += tl.dot(tl.trans(b_P), b_do, input_precision=PRECISION)
        b_dw = tl.dot(tl.trans(b_Ag), b_dnew.to(b_k.dtype), input_precision=PRECISION)
        store_rows(dv_new, b_dnew, b_at, m_row, o_v, V, BV)
        store_rows(dv_rows, b_dw, b_row * H + i_h, m_row, o_v, V, BV)
        b_read = ((b_c * b_up)[:, None] * b_do.to(tl.float32)).to(b_k.dtype)
        b_erased = ((b_a * b_up)[:, None] * b_dw).to(b_k.dtype)
        b_ds = tl.exp(b_last.to(tl.float32)) * b_ds + tl.dot(tl.trans(b_q), b_read, input_precision=PRECISION)
        b_ds -= tl.dot(tl.trans(b_k), b_erased, input_precision=PRECISION)
        i_boundary = tl.cast(first_boundary + i - 1, tl.int64) * H + i_h
        store_state(dh, b_ds, i_boundary, o_k, o_v, has_before, K, V)
    if HAS_INITIAL:
        store_state(d_initial_state, b_ds, i_state, o_k, o_v, i_first < 0, K, V)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    names = (
        "do", "P", "Ag", "k_scale", "q_scale", "g_cumsum", "segment_chunks", "h", "dh", "h_dh", "dv_new", "dv_rows",
    )  # fmt: skip
    arguments = dict(
        **common.streams(tensors, "q", "k"),
        **common.row_arguments(call, tensors),
        **common.segment_arguments(call, tensors),
        **gdn_groups.arguments(call, tensors),
        **common.end_states(tensors, "d_initial_state", "d_final_state", "initial_state", "group_dh"),
        **{name: tensors[name] for name in names},
    )
    arguments["PART"] = STATE_PRODUCT_COLUMNS
    common.launch_walk(call, gdn_state_gradient_kernel, arguments)


TEMPLATE = Template(
    "triton", "gdn_state_gradient", "state_gradient", ("gdn",), SPACE, run, (__name__, common.MODULE, gdn_groups.MODULE)
)
