"""GDN gradients: of q, k, g and the router weight, for each chunk and head on its own.

Given the states (h) before and their gradients (dh) after every chunk, and what `gdn_score_gradients` left of the
scores; the notation of `gdn_scan`, k̂ = a k, q̂ = c q, X the gradient of a scaled row, V' = Ag W taken again:

    Xq = e^b∘(dO hᵀ) + (G∘dP) K̂
    Xk = e^(b_C - b)∘(V' dhᵀ) - e^b∘(dW hᵀ) + (G∘dP)ᵀ Q̂ + (E + Eᵀ) K̂
    db += <q̂, e^b∘(dO hᵀ)> - <k̂, e^b∘(dW hᵀ)> - y,   y = <k̂, e^(b_C - b)∘(V' dhᵀ)>
    db_last += Σy + e^(b_C) <h, dh>;   dg = in-chunk reverse cumsum of db

The norm's and the gate's share comes last, in fp32. Sparse rows are stored sorted; shared rows at their token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.device import Device
from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.buffers import STATE_PRODUCT_COLUMNS
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import common
from sse_tune.templates.triton.common import (
    chunk_entry,
    chunk_rows,
    key_tile,
    load_gate_sums,
    load_rows,
    load_scalars,
    row_scale,
    row_scale_gradient,
    state_beside,
    state_index,
    store_rows,
    value_tile,
)

if TYPE_CHECKING:
    import torch


def smem_bytes(problem: Problem, config: Config, device: Device) -> int:
    """h, do and dW in flight; the operands made of them, or those of the rows at the end."""
    c, bk, bv = int(config["chunk_size"]), key_tile(problem), int(config["block_v"])
    item = common.item_bytes(problem)
    state = 4 if config["state_dtype"] == "fp32" else item
    flight = int(config["num_stages"]) * (state * bk * bv + 2 * item * c * bv)
    operands = item * bk * bv + 3 * item * c * bv
    # Blackwell's dots take both operands from shared memory
    operands += item * c * bk if device.capability >= 100 else 0
    return max(flight + operands, item * (3 * c * bk + 2 * c * c)) + 8192


SPACE = Space(
    params=(
        Param("block_v", (64, 128), 64, "columns of V taken at a time"),
        Param("num_warps", (4, 8), 8, "warps per block"),
        Param("num_stages", (1, 2, 3), 1, "blocks of V in flight"),
    ),
    constraints=(
        common.tile_width("block_v", value_tile),
        # two such tiles of fp32 are sums over V
        Constraint("chunk_size * K / (32 * num_warps) <= 64",
                   lambda p, c, d: c["chunk_size"] * key_tile(p) <= 64 * 32 * c["num_warps"]),
        Constraint("chunk_size^2 / (32 * num_warps) <= 64",
                   lambda p, c, d: c["chunk_size"] ** 2 <= 64 * 32 * c["num_warps"]),
        Constraint("the tiles fit in shared memory", lambda p, c, d: smem_bytes(p, c, d) <= d.smem_per_block_bytes),
        # beyond that Triton 3.6 asks for more than the 512 columns, or fails in its pass over them
        Constraint("sums over V fit in Blackwell's tensor memory in chunks of at most 32",
                   lambda p, c, d: d.capability < 100 or c["chunk_size"] <= 32),
    ),
)


@triton.jit
def gdn_gradients_kernel(
    q, k, shared_q, shared_k, do, Ag, k_scale, q_scale, g_cumsum, h, dh, initial_state,
    d_final_state, w, dv_rows, dp, dn, db, h_dh, dq_rows, dk_rows, dg_rows, de_rows, d_shared_q, d_shared_k,
    d_shared_g, perm, weights, chunk_table, scale, M, n_shared, n_shared_rows, n_sequences, n_chunks,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PARTITIONS: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(0) % H
    i_seg, first_row, n_rows, i_before, i_after = chunk_entry(chunk_table, tl.program_id(0) // H)
    if i_seg < 0:
        return
    is_shared = i_seg < n_shared
    p_q = tl.where(is_shared, shared_q, q)
    p_k = tl.where(is_shared, shared_k, k)
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    b_row, b_slot, b_token, b_lane, m_row = chunk_rows(perm, first_row, n_rows, C, L)
    m_write = m_row & (b_lane < WRITERS)
    m_read = m_row & (b_lane < READERS)
    b_head = b_token * H + i_h
    b_at = i_h.to(tl.int64) * M + b_row
    i_state = state_index(i_seg, n_sequences, PARTITIONS, HAS_SHARED).to(tl.int64) * H + i_h
    b_a = load_scalars(k_scale, b_at, m_row)
    b_c = load_scalars(q_scale, b_at, m_row)
    b_b, b_last = load_gate_sums(g_cumsum, b_at, m_row, n_rows, C)
    b_up = tl.exp(b_b.to(tl.float32))
    b_down = tl.exp((b_last - b_b).to(tl.float32))
    b_Ag = load_rows(Ag, b_at, m_row, o_c, C, C)

    NV: tl.constexpr = (V + BV - 1) // BV
    b_xk = tl.zeros((C, BK), tl.float32)
    for i_v in range(0, NV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_dh = state_beside(dh, d_final_state, i_after, i_state, i_h, o_k, o_v, H, K, V, HAS_FINAL)
        b_w = load_rows(w, b_at, m_row, o_v, V, BV)
        b_new = (b_down[:, None] * tl.dot(b_Ag, b_w, input_precision=PRECISION)).to(b_w.dtype)
        b_xk = tl.dot(b_new, tl.trans(b_dh.to(b_w.dtype)), b_xk, input_precision=PRECISION)
    b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)
    b_y = b_a * tl.sum(b_k.to(tl.float32) * b_xk, 1)
    b_xq = tl.zeros((C, BK), tl.float32)
    for i_v in range(0, NV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_h = state_beside(h, initial_state, i_before, i_state, i_h, o_k, o_v, H, K, V, HAS_INITIAL)
        b_do = load_rows(do, b_head, m_read, o_v, V, BV)
        b_dw = load_rows(dv_rows, b_row * H + i_h, m_row, o_v, V, BV)
        b_hT = tl.trans(b_h.to(b_do.dtype))
        b_erased = (-b_up[:, None] * b_dw.to(tl.float32)).to(b_do.dtype)
        b_xq = tl.dot(b_do, b_hT, b_xq, input_precision=PRECISION)
        b_xk = tl.dot(b_erased, b_hT, b_xk, input_precision=PRECISION)

    # in an order that lets each of the sums go as soon as it can: all of them at once are more than the registers
    b_k32 = b_k.to(tl.float32)
    # <k̂, Xk> holds y so far, and db wants what is erased less y
    b_db = load_scalars(db, b_at, m_row) + b_a * tl.sum(b_k32 * b_xk, 1) - 2.0 * b_y
    b_ka = (b_k32 * b_a[:, None]).to(dp.dtype.element_ty)

    b_q32 = load_rows(p_q, b_head, m_row, o_k, K, BK).to(tl.float32)
    b_xq *= b_up[:, None]
    b_db += b_c * tl.sum(b_q32 * b_xq, 1)
    b_dP = load_rows(dp, b_at, m_row, o_c, C, C)
    b_xq = tl.dot(b_dP, b_ka, b_xq, input_precision=PRECISION)
    b_weight = tl.load(weights + b_slot, mask=m_row, other=0.0)
    b_unit = tl.where(m_read, row_scale(tl.sum(b_q32 * b_q32, 1), b_weight, NORM), 0.0)
    b_dq, b_de_q = row_scale_gradient(b_xq * scale, b_q32, b_unit, b_weight, m_read, NORM)
    # rows of a shared segment are the tokens'; the sparse rows' buffers begin behind them
    b_out = (b_row - tl.where(is_shared, 0, n_shared_rows)) * H + i_h
    store_rows(tl.where(is_shared, d_shared_q, dq_rows), b_dq, b_out, m_row, o_k, K, BK)

    b_qc = (b_q32 * b_c[:, None]).to(dp.dtype.element_ty)
    b_xk = tl.dot(tl.trans(b_dP), b_qc, b_xk, input_precision=PRECISION)
    b_dN = load_rows(dn, b_at, m_row, o_c, C, C)
    b_xk = tl.dot(b_dN, b_ka, b_xk, input_precision=PRECISION)
    b_dk, b_de = row_scale_gradient(b_xk, b_k32, b_a, b_weight, m_write, NORM)
    store_rows(tl.where(is_shared, d_shared_k, dk_rows), b_dk, b_out, m_row, o_k, K, BK)

    b_through = tl.zeros((BK,), tl.float32)
    for i_part in tl.static_range(0, (V + PART - 1) // PART):
        p_product = h_dh + ((i_part * H + i_h).to(tl.int64) * n_chunks + tl.program_id(0) // H) * K
        b_through += tl.load(p_product + o_k, mask=o_k < K, other=0.0)
    b_end = tl.sum(b_y, 0) + tl.exp(b_last.to(tl.float32)) * tl.sum(b_through, 0)
    b_db += tl.where(o_c == n_rows - 1, b_end, 0.0)
    b_dg = tl.where(m_write, tl.cumsum(b_db, 0, reverse=True), 0.0)
    if is_shared:
        tl.store(d_shared_g + b_out, b_dg.to(d_shared_g.dtype.element_ty), mask=m_row)
    else:
        o_out = i_h.to(tl.int64) * (M - n_shared_rows) - n_shared_rows
        tl.store(dg_rows + o_out + b_row, b_dg, mask=m_row)
        tl.store(de_rows + o_out + b_row, b_de + b_de_q, mask=m_row)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem = call.sizes.problem
    names = (
        "do", "Ag", "k_scale", "q_scale", "g_cumsum", "h", "dh", "w", "dv_rows", "dp", "dn", "db", "h_dh", "de_rows",
    )  # fmt: skip
    call.launch(
        gdn_gradients_kernel,
        (call.sizes.chunks * problem.num_heads,),
        dict(
            **common.streams(tensors, "q", "k"),
            **common.row_arguments(call, tensors),
            **common.gradient_arguments(call, tensors, "q", "k", "g"),
            **common.end_states(tensors, "initial_state", "d_final_state"),
            **{name: tensors[name] for name in names},
            scale=call.scale,
            n_sequences=problem.sequences,
            n_chunks=call.sizes.chunks,
            PARTITIONS=problem.partitions,
            HAS_SHARED=problem.shared,
            V=problem.value_dim,
            BK=key_tile(problem),
            BV=int(call.config["block_v"]),
            PART=STATE_PRODUCT_COLUMNS,
        ),
        num_warps=int(call.config["num_warps"]),
        num_stages=int(call.config["num_stages"]),
    )


TEMPLATE = Template("triton", "gdn_gradients", "gradients", ("gdn",), SPACE, run, (__name__, common.MODULE))
