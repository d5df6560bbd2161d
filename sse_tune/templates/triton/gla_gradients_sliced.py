"""GLA gradients in slices of K: of q, k, gates and router weight; a block per chunk, head and slice.

The formulas are those of gla_gradients_near; what differs is who does what, so that two or three blocks fit on a
multiprocessor and nothing spills:

- Slices of K are blocks of their own. Only the norm and the router's gradient need all of K: their sums over a slice
  are left in scratch, and a last small kernel finishes the rows. One slice that covers K is finished at once.
- Slices whose gates are near, as gla_gates has it, are one kernel. It flags the others and leaves them to a second
  launch of as many blocks, of which those that find no flag end at once.
- Xq is done with before Xk is begun, and of the decays one tile is kept: the other is its reciprocal.
- dg, the sum of db from each row on, is a product with a triangle of ones; db is taken in two fp16 parts, as the
  gates are. What all rows share, Σ k̂ e^(b_C - b) (V dhᵀ) + e^(b_C) Σ_v h dh, is added after that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import common, gla_gates, gla_gradients
from sse_tune.templates.triton.common import (
    chunk_entry,
    chunk_rows,
    key_tile,
    load_rows,
    load_scalars,
    log_gate,
    state_beside,
    state_index,
    store_rows,
    value_tile,
)
from sse_tune.templates.triton.gla_gates import (
    NEAR_NATS,
    far_decays,
    gate_parts,
    half_exponent,
    halves_of_chunk,
    in_second,
    pair_factors,
    wide_operand,
)
from sse_tune.templates.triton.gla_gradients import norm_terms

if TYPE_CHECKING:
    import torch

FAR_WARPS = 8  # of the launch for gates that are not near: it holds more at once


def smem_bytes(problem: Problem, config: Config) -> int:
    """do, v and two states, and the dots' operands."""
    c, item = int(config["chunk_size"]), common.item_bytes(problem)
    bk, bv = int(config["block_k"]), int(config["block_v"])
    state = 4 if config["state_dtype"] == "fp32" else item
    wide = max(item, 4 if problem.dtype == "fp16" else 0)
    rows = 2 * max(item, state) * c * bv
    return rows + max(2 * state * bk * bv, 6 * c * bk) + wide * (2 * c * bk + 2 * c * c) + 9216


SPACE = Space(
    params=(
        Param("block_k", (64, 128), 64, "columns of K in one block"),
        Param("block_v", (64, 128), 64, "columns of V at a time"),
        Param("num_warps", (4, 8), 4, "warps per block"),
        Param("num_stages", (1, 2, 3), 3, "tiles of V in flight"),
    ),
    constraints=(
        common.tile_width("block_k", key_tile),
        common.tile_width("block_v", value_tile),
        # Xq or Xk, db, a decay and Z are held at once, and on sm_80 the dots' operands as well
        Constraint("chunk_size * block_k / (32 * num_warps) <= 32, or 16 before sm_90",
                   lambda p, c, d: c["chunk_size"] * min(c["block_k"], key_tile(p))
                   <= (32 if d.capability >= 90 else 16) * 32 * c["num_warps"]),
        Constraint("chunk_size * chunk_size / (32 * num_warps) <= 64",
                   lambda p, c, d: c["chunk_size"] ** 2 <= 64 * 32 * c["num_warps"]),
        Constraint("the tiles fit in shared memory",
                   lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
    ),
)


@triton.jit
def like_ones(b_x):
    """Ones in the layout of a product. The test is always true, which is found only after layouts have been chosen; what
    is derived from them becomes an operand without a way through shared memory."""
    return tl.where((b_x.to(tl.int32, bitcast=True) | 1) != 0, 1.0, 0.0)


@triton.jit
def sums_from(b_x, b_like, C: tl.constexpr):
    """Row i: the sum of the rows j >= i of an fp32 tile, scaled to the range of fp16 and taken in two parts: 22 bits of
    each number down to 2**-28 of the largest, and the tensor cores add faster than a scan along rows."""
    o_c = tl.arange(0, C)
    b_ones = tl.where(o_c[:, None] <= o_c[None, :], like_ones(b_like), 0.0).to(tl.float16)
    b_most = tl.maximum(tl.max(tl.abs(b_x)), 1e-30)
    b_x *= 16384.0 / b_most
    b_high = b_x.to(tl.float16)
    b_low = (b_x - b_high.to(tl.float32)).to(tl.float16)
    return tl.dot(b_ones, b_high, tl.dot(b_ones, b_low)) * (b_most * (1.0 / 16384.0))


@triton.jit
def token_rows(perm, first_row, n_rows, i_h, H: tl.constexpr, C: tl.constexpr, L: tl.constexpr):
    """Rows of a chunk in a tensor [R, H, *], and mask. Read anew where needed: held, they would take more registers."""
    o_c = tl.arange(0, C)
    m_row = o_c < n_rows
    b_slot = tl.load(perm + tl.cast(first_row, tl.int64) + o_c, mask=m_row, other=0)
    return (b_slot // L).to(tl.int64) * H + i_h, m_row


@triton.jit
def out_start(first_row, n_shared_rows, i_h, is_shared, H: tl.constexpr, K: tl.constexpr):
    """Where a chunk's gradients begin: rows of a shared segment are the tokens'; the sparse rows' buffers begin behind
    them."""
    return ((first_row - tl.where(is_shared, 0, n_shared_rows)).to(tl.int64) * H + i_h) * K


@triton.jit
def store_gradient(
    p_out, b_x, b_y, b_scale, b_e, n_rows, o_k,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of rows y with X, that of the scaled rows, and returns that of the router weight; where K has
    more slices, without the norm's part, and returns the slice's X·y."""
    o_c = tl.arange(0, C)
    b_y = b_y.to(tl.float32)
    b_dot = tl.sum(b_x * b_y, 1)
    if NORM != "none" and BK >= K:
        b_part, b_dot = norm_terms(b_dot, tl.sum(b_y * b_y, 1), b_e, NORM)
        b_x -= b_part[:, None] * b_y
    store_rows(p_out, b_scale[:, None] * b_x, o_c * H, o_c < n_rows, o_k, K, BK)
    return b_dot


@triton.jit
def decayed_rows(p_rows, b_decay, b_scale, perm, first_row, n_rows, i_h, o_k,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, L: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows of q or k, and Z: the same bits whenever it is made, so that it need not be held."""
    b_head, m_row = token_rows(perm, first_row, n_rows, i_h, H, C, L)
    b_y = load_rows(p_rows, b_head, m_row, o_k, K, BK)  # [C, BK]
    return b_y, wide_operand(b_decay * (b_y * b_scale[:, None]), b_y.dtype)


@triton.jit
def store_slice(
    dg_rows, d_shared_g, de_rows, sums, b_db, b_dA, b_last, b_qx, b_kx, perm, first_row, n_rows, i_h, i_k, is_shared,
    n_shared_rows, M, scale,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, L: tl.constexpr, WRITERS: tl.constexpr, READERS: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of the gates, and what there is of the router weight's."""
    o_k = i_k * BK + tl.arange(0, BK)
    b_row, _, _, b_lane, m_row = chunk_rows(perm, first_row, n_rows, C, L)
    m_write = m_row & (b_lane < WRITERS)
    b_dg = tl.where(m_write[:, None], sums_from(b_db, b_dA, C) + b_last[None, :], 0.0)
    i_out = out_start(first_row, n_shared_rows, i_h, is_shared, H, K)
    if is_shared:
        store_rows(d_shared_g + i_out, b_dg, tl.arange(0, C) * H, m_row, o_k, K, BK)
    else:
        store_rows(dg_rows + i_out, b_dg, tl.arange(0, C) * H, m_row, o_k, K, BK)
        if BK >= K:
            b_de = tl.where(m_row & (b_lane < READERS), b_qx * scale, 0.0) + tl.where(m_write, b_kx, 0.0)
            tl.store(de_rows + i_h.to(tl.int64) * (M - n_shared_rows) - n_shared_rows + b_row, b_de, mask=m_row)
    if BK < K:
        NK: tl.constexpr = (K + BK - 1) // BK
        p_sums = sums + (i_k * H + i_h).to(tl.int64) * M + b_row
        tl.store(p_sums, b_qx, mask=m_row)
        tl.store(p_sums + tl.cast(NK * H, tl.int64) * M, b_kx, mask=m_row)


@triton.jit
def gla_slice_kernel(
    q, k, v, g, do, shared_q, shared_k, shared_g, k_scale, q_scale, h, dh, initial_state, d_final_state, perm, weights,
    chunk_table, dq_rows, dk_rows, dg_rows, de_rows, d_shared_q, d_shared_k, d_shared_g, far, sums, scale, M, n_shared,
    n_shared_rows, n_sequences,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PARTITIONS: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    i_k = tl.program_id(0) % NK
    i_h = (tl.program_id(0) // NK) % H
    i_seg, first_row, n_rows, i_before, i_after = chunk_entry(chunk_table, tl.program_id(0) // (NK * H))
    if i_seg < 0:
        return
    is_shared = i_seg < n_shared
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    i_state = state_index(i_seg, n_sequences, PARTITIONS, HAS_SHARED).to(tl.int64) * H + i_h

    b_dA = tl.zeros((C, C), tl.float32)
    b_xq = tl.zeros((C, BK), tl.float32)
    b_xk = tl.zeros((C, BK), tl.float32)
    b_hdh = tl.zeros((BK, BK), tl.float32)
    b_head, m_row = token_rows(perm, first_row, n_rows, i_h, H, C, L)
    for i_v in range(NV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_do = load_rows(do, b_head, m_row, o_v, V, BV)  # [C, BV]
        b_v = load_rows(v, b_head, m_row, o_v, V, BV)  # [C, BV]
        b_h = state_beside(h, initial_state, i_before, i_state, i_h, o_k, o_v, H, K, V, HAS_INITIAL)  # [BK, BV]
        b_dh = state_beside(dh, d_final_state, i_after, i_state, i_h, o_k, o_v, H, K, V, HAS_FINAL)  # [BK, BV]
        b_dA = tl.dot(b_do, tl.trans(b_v), b_dA, input_precision=PRECISION)
        b_xq = tl.dot(b_do.to(b_h.dtype), tl.trans(b_h), b_xq, input_precision=PRECISION)
        b_xk = tl.dot(b_v.to(b_dh.dtype), tl.trans(b_dh), b_xk, input_precision=PRECISION)
        b_hdh = tl.dot(b_h, tl.trans(b_dh), b_hdh, input_precision=PRECISION)
    b_last = tl.sum(tl.where(tl.arange(0, BK)[:, None] == tl.arange(0, BK)[None, :], b_hdh, 0.0), 1)
    # pairs i = j, which have no decay, give db the same product twice
    b_lower = wide_operand(tl.where(o_c[:, None] >= o_c[None, :], b_dA, 0.0), do.dtype.element_ty)

    b_row, b_slot, b_token, b_lane, m_row = chunk_rows(perm, first_row, n_rows, C, L)
    m_write = m_row & (b_lane < WRITERS)
    b_high, b_low = gate_parts(tl.where(is_shared, shared_g, g), b_token * H + i_h, m_write, o_k, K, BK)  # [C, BK]
    b_first, b_second = halves_of_chunk(b_high, b_low, C, LEVELS)
    # of half_exponent: rows j in (first, last] of row i
    o_first = tl.where(o_c >= C // 2, C // 2 - 1, o_c)
    o_last = tl.where(o_c >= C // 2, o_c, C // 2 - 1)
    b_ones = tl.where(o_c[None, :] > o_first[:, None], like_ones(b_dA), 0.0)
    b_ones = tl.where(o_c[None, :] <= o_last[:, None], b_ones, 0.0).to(tl.float16)
    b_x = tl.dot(b_ones, b_high) + tl.dot(b_ones, b_low)
    is_near = tl.min(b_x) >= -NEAR_NATS
    tl.store(far + tl.program_id(0), tl.where(is_near, 0, 1))  # what is made of a far slice is without meaning
    b_xq *= tl.exp(b_first)[None, :]
    b_xk *= tl.exp(b_second)[None, :]
    b_last *= tl.exp(b_first + b_second)
    p_q = tl.where(is_shared, shared_q, q)
    p_k = tl.where(is_shared, shared_k, k)
    b_at = i_h.to(tl.int64) * M + b_row
    b_a = load_scalars(k_scale, b_at, m_row)
    b_c = load_scalars(q_scale, b_at, m_row)
    b_x = tl.where(in_second(LEVELS - 1, C), b_x, -b_x) * 1.4426950408889634
    _, b_zq = decayed_rows(p_q, tl.exp2(b_x), b_c, perm, first_row, n_rows, i_h, o_k, H, K, C, L, BK)
    _, b_zk = decayed_rows(p_k, tl.exp2(-b_x), b_a, perm, first_row, n_rows, i_h, o_k, H, K, C, L, BK)
    b_last += tl.sum(b_zk.to(tl.float32) * b_xk, 0)
    b_xq = tl.dot(b_lower, b_zk, b_xq, input_precision=PRECISION)
    b_xk = tl.dot(tl.trans(b_lower), b_zq, b_xk, input_precision=PRECISION)

    i_out = out_start(first_row, n_shared_rows, i_h, is_shared, H, K)
    b_e = tl.load(weights + b_slot, mask=m_row, other=0.0)
    tl.debug_barrier()  # rows, decays and Z are made anew: held, they would spill
    b_x += tl.where(n_rows > 0, 0.0, 1.0)
    b_decay = tl.exp2(b_x)
    b_q, b_zq = decayed_rows(p_q, b_decay, b_c, perm, first_row, n_rows, i_h, o_k, H, K, C, L, BK)
    b_db = b_zq.to(tl.float32) * b_xq
    p_dq = tl.where(is_shared, d_shared_q, dq_rows) + i_out
    b_qx = store_gradient(p_dq, b_xq * b_decay, b_q, b_c, b_e, n_rows, o_k, H, K, C, BK, NORM)
    b_decay = tl.exp2(-b_x)
    b_k, b_zk = decayed_rows(p_k, b_decay, b_a, perm, first_row, n_rows, i_h, o_k, H, K, C, L, BK)
    b_db -= b_zk.to(tl.float32) * b_xk
    p_dk = tl.where(is_shared, d_shared_k, dk_rows) + i_out
    b_kx = store_gradient(p_dk, b_xk * b_decay, b_k, b_a, b_e, n_rows, o_k, H, K, C, BK, NORM)
    store_slice(
        dg_rows, d_shared_g, de_rows, sums, b_db, b_dA, b_last, b_qx, b_kx, perm, first_row, n_rows, i_h, i_k, is_shared,
        n_shared_rows, M, scale, H, K, C, L, WRITERS, READERS, BK,
    )  # fmt: skip


@triton.jit
def gla_far_slice_kernel(
    q, k, v, g, do, shared_q, shared_k, shared_g, k_scale, q_scale, h, dh, initial_state, d_final_state, perm, weights,
    chunk_table, dq_rows, dk_rows, dg_rows, de_rows, d_shared_q, d_shared_k, d_shared_g, far, sums, scale, M, n_shared,
    n_shared_rows, n_sequences,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PARTITIONS: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    i_k = tl.program_id(0) % NK
    i_h = (tl.program_id(0) // NK) % H
    i_seg, first_row, n_rows, i_before, i_after = chunk_entry(chunk_table, tl.program_id(0) // (NK * H))
    if i_seg < 0:
        return
    if tl.load(far + tl.program_id(0)) == 0:
        return
    is_shared = i_seg < n_shared
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    i_state = state_index(i_seg, n_sequences, PARTITIONS, HAS_SHARED).to(tl.int64) * H + i_h

    b_dA = tl.zeros((C, C), tl.float32)
    b_xq = tl.zeros((C, BK), tl.float32)
    b_xk = tl.zeros((C, BK), tl.float32)
    b_hdh = tl.zeros((BK,), tl.float32)
    b_head, m_row = token_rows(perm, first_row, n_rows, i_h, H, C, L)
    for i_v in range(NV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_do = load_rows(do, b_head, m_row, o_v, V, BV)  # [C, BV]
        b_v = load_rows(v, b_head, m_row, o_v, V, BV)  # [C, BV]
        b_h = state_beside(h, initial_state, i_before, i_state, i_h, o_k, o_v, H, K, V, HAS_INITIAL)  # [BK, BV]
        b_dh = state_beside(dh, d_final_state, i_after, i_state, i_h, o_k, o_v, H, K, V, HAS_FINAL)  # [BK, BV]
        b_dA = tl.dot(b_do, tl.trans(b_v), b_dA, input_precision=PRECISION)
        b_xq = tl.dot(b_do.to(b_h.dtype), tl.trans(b_h), b_xq, input_precision=PRECISION)
        b_xk = tl.dot(b_v.to(b_dh.dtype), tl.trans(b_dh), b_xk, input_precision=PRECISION)
        b_hdh += tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 1)
    b_own = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_dA, 0.0), 1)
    b_lower = wide_operand(tl.where(o_c[:, None] > o_c[None, :], b_dA, 0.0), do.dtype.element_ty)

    b_row, b_slot, b_token, b_lane, m_row = chunk_rows(perm, first_row, n_rows, C, L)
    b_at = i_h.to(tl.int64) * M + b_row
    b_a = load_scalars(k_scale, b_at, m_row)
    b_c = load_scalars(q_scale, b_at, m_row)
    b_e = tl.load(weights + b_slot, mask=m_row, other=0.0)
    p_q = tl.where(is_shared, shared_q, q)
    p_k = tl.where(is_shared, shared_k, k)
    b_q = load_rows(p_q, b_head, m_row, o_k, K, BK)  # [C, BK]
    b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)  # [C, BK]
    m_write = m_row & (b_lane < WRITERS)
    b_high, b_low = gate_parts(tl.where(is_shared, shared_g, g), b_head, m_write, o_k, K, BK)  # [C, BK]
    b_first, b_second = halves_of_chunk(b_high, b_low, C, LEVELS)
    b_up, b_down = far_decays(b_high, b_low, C)
    b_xq *= b_up
    b_xk *= b_down
    b_y = b_xk * (b_k * b_a[:, None])
    b_last = tl.sum(b_y, 0) + b_hdh * tl.exp(b_first + b_second)
    b_db = b_xq * (b_q * b_c[:, None]) - b_y
    i_half = LEVELS - 1
    while i_half >= 0:
        b_x, is_near = half_exponent(b_high, b_low, i_half, C)
        b_eq, b_ek, m_level = pair_factors(b_x, is_near, i_half, C)
        b_zq = wide_operand(b_eq * (b_q * b_c[:, None]), b_q.dtype)
        b_zk = wide_operand(b_ek * (b_k * b_a[:, None]), b_k.dtype)
        b_level = tl.where(m_level, b_lower, 0.0).to(b_lower.dtype)
        b_yq = tl.dot(b_level, b_zk, input_precision=PRECISION)
        b_yk = tl.dot(tl.trans(b_level), b_zq, input_precision=PRECISION)
        b_db += b_zq.to(tl.float32) * b_yq - b_zk.to(tl.float32) * b_yk
        b_xq += b_eq * b_yq
        b_xk += b_ek * b_yk
        i_half = tl.where(is_near, -1, i_half - 1)
    b_xq += (b_own * b_a)[:, None] * b_k.to(tl.float32)
    b_xk += (b_own * b_c)[:, None] * b_q.to(tl.float32)
    i_out = out_start(first_row, n_shared_rows, i_h, is_shared, H, K)
    p_dq = tl.where(is_shared, d_shared_q, dq_rows) + i_out
    p_dk = tl.where(is_shared, d_shared_k, dk_rows) + i_out
    b_qx = store_gradient(p_dq, b_xq, b_q, b_c, b_e, n_rows, o_k, H, K, C, BK, NORM)
    b_kx = store_gradient(p_dk, b_xk, b_k, b_a, b_e, n_rows, o_k, H, K, C, BK, NORM)
    store_slice(
        dg_rows, d_shared_g, de_rows, sums, b_db, b_dA, b_last, b_qx, b_kx, perm, first_row, n_rows, i_h, i_k, is_shared,
        n_shared_rows, M, scale, H, K, C, L, WRITERS, READERS, BK,
    )  # fmt: skip


@triton.jit
def gla_slice_sums_kernel(
    q, k, shared_q, shared_k, k_scale, q_scale, perm, weights, chunk_table, sums, dq_rows, dk_rows, de_rows, d_shared_q,
    d_shared_k, scale, M, n_shared, n_shared_rows,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, L: tl.constexpr, WRITERS: tl.constexpr, READERS: tl.constexpr,
    NORM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The norm's part of a chunk's rows, and the gradient of their router weight, from the sums of the slices."""
    NK: tl.constexpr = (K + BK - 1) // BK
    i_h = tl.program_id(0) % H
    i_seg, first_row, n_rows, _, _ = chunk_entry(chunk_table, tl.program_id(0) // H)
    is_shared = (i_seg >= 0) & (i_seg < n_shared)
    if (i_seg < 0) | (is_shared & (NORM == "none")):
        return
    b_row, b_slot, b_token, b_lane, m_row = chunk_rows(perm, first_row, n_rows, C, L)
    b_head = b_token * H + i_h
    b_at = i_h.to(tl.int64) * M + b_row
    b_out = (b_row - tl.where(is_shared, 0, n_shared_rows)) * H + i_h
    b_qx = tl.zeros((C,), tl.float32)
    b_kx = tl.zeros((C,), tl.float32)
    b_qq = tl.zeros((C,), tl.float32)
    b_kk = tl.zeros((C,), tl.float32)
    for i_k in range(NK):
        p_sums = sums + tl.cast(i_k * H, tl.int64) * M + b_at
        b_qx += tl.load(p_sums, mask=m_row, other=0.0)
        b_kx += tl.load(p_sums + tl.cast(NK * H, tl.int64) * M, mask=m_row, other=0.0)
    p_q = tl.where(is_shared, shared_q, q)
    p_k = tl.where(is_shared, shared_k, k)
    if NORM != "none":
        for i_k in range(NK):
            o_k = i_k * BK + tl.arange(0, BK)
            b_q = load_rows(p_q, b_head, m_row, o_k, K, BK).to(tl.float32)
            b_k = load_rows(p_k, b_head, m_row, o_k, K, BK).to(tl.float32)
            b_qq += tl.sum(b_q * b_q, 1)
            b_kk += tl.sum(b_k * b_k, 1)
    b_e = tl.load(weights + b_slot, mask=m_row, other=0.0)
    b_q_part, b_q_de = norm_terms(b_qx, b_qq, b_e, NORM)
    b_k_part, b_k_de = norm_terms(b_kx, b_kk, b_e, NORM)
    if NORM != "none":
        b_a = load_scalars(k_scale, b_at, m_row)
        b_c = load_scalars(q_scale, b_at, m_row)
        p_dq = tl.where(is_shared, d_shared_q, dq_rows)
        p_dk = tl.where(is_shared, d_shared_k, dk_rows)
        for i_k in range(NK):
            o_k = i_k * BK + tl.arange(0, BK)
            b_q = load_rows(p_q, b_head, m_row, o_k, K, BK).to(tl.float32)
            b_k = load_rows(p_k, b_head, m_row, o_k, K, BK).to(tl.float32)
            b_dq = load_rows(p_dq, b_out, m_row, o_k, K, BK).to(tl.float32) - (b_c * b_q_part)[:, None] * b_q
            b_dk = load_rows(p_dk, b_out, m_row, o_k, K, BK).to(tl.float32) - (b_a * b_k_part)[:, None] * b_k
            store_rows(p_dq, b_dq, b_out, m_row, o_k, K, BK)
            store_rows(p_dk, b_dk, b_out, m_row, o_k, K, BK)
    if not is_shared:
        b_de = tl.where(m_row & (b_lane < READERS), b_q_de * scale, 0.0)
        b_de += tl.where(m_row & (b_lane < WRITERS), b_k_de, 0.0)
        tl.store(de_rows + i_h.to(tl.int64) * (M - n_shared_rows) - n_shared_rows + b_row, b_de, mask=m_row)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem, sizes = call.sizes.problem, call.sizes
    block_k, warps = int(call.config["block_k"]), int(call.config["num_warps"])
    slices, blocks = triton.cdiv(problem.key_dim, block_k), sizes.chunks * problem.num_heads
    k_scale = tensors["k_scale"]
    arguments: dict[str, Any] = dict(
        **common.streams(tensors, "q", "k", "g"),
        **common.row_arguments(call, tensors),
        **gla_gates.levels(call),
        **{name: tensors[name] for name in ("v", "do", "k_scale", "q_scale", "h", "dh", "de_rows")},
        **common.gradient_arguments(call, tensors, "q", "k", "g"),
        **common.end_states(tensors, "initial_state", "d_final_state"),
        far=tensors["perm"].new_empty(blocks * slices),
        sums=k_scale.new_empty((2, slices, *k_scale.shape)) if slices > 1 else k_scale,
        scale=call.scale,
        n_sequences=problem.sequences,
        PARTITIONS=problem.partitions,
        HAS_SHARED=problem.shared,
        V=problem.value_dim,
        BK=block_k,
        BV=int(call.config["block_v"]),
    )
    stages = int(call.config["num_stages"])
    call.launch(gla_slice_kernel, (blocks * slices,), arguments, num_warps=warps, num_stages=stages)
    # num_stages=1: h and dh are read by products and by <h, dh>: pipelined, Triton 3.6 overwrites them too early
    call.launch(gla_far_slice_kernel, (blocks * slices,), arguments, num_warps=FAR_WARPS, num_stages=1)
    if slices > 1:
        unused = (
            "g", "shared_g", "v", "do", "h", "dh", "initial_state", "d_final_state", "far", "dg_rows", "d_shared_g",
            "n_sequences", "PARTITIONS", "HAS_SHARED", "HAS_INITIAL", "HAS_FINAL", "V", "BV", "LEVELS", "PRECISION",
        )  # fmt: skip
        call.launch(
            gla_slice_sums_kernel,
            (blocks,),
            {name: value for name, value in arguments.items() if name not in unused},
            num_warps=4,
            num_stages=1,
        )


TEMPLATE = Template(
    "triton", "gla_gradients_sliced", "gradients", ("gla",), SPACE, run,
    (__name__, common.MODULE, gla_gates.MODULE, gla_gradients.__name__),
)  # fmt: skip
