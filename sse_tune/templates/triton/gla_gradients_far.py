"""GLA gradients of the slices whose gates are not near: the pairs i > j by halves, as gla_gates says.

With dA of a level's pairs alone, and Z as in gla_gradients_sliced,

    Yq = dA Zk,  Yk = dAᵀ Zq,     Xq += E Yq,  Xk += F Yk,  db += Zq Yq - Zk Yk

Both sides of a pair so enter db with the same rounded factors and cancel where they must; pairs i = j, which have no
decay, stay out of it. A block looks after the flags of several slices and ends at once where none is set.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sse_tune.templates.triton.common import (
    chunk_entry,
    chunk_rows,
    load_rows,
    load_scalars,
    state_beside,
    state_index,
)
from sse_tune.templates.triton.gla_gates import (
    any_far,
    far_decays,
    gate_parts,
    half_exponent,
    halves_of_chunk,
    pair_factors,
    wide_operand,
)
from sse_tune.templates.triton.gla_slices import out_start, store_gradient, store_slice, token_rows

MODULE = "sse_tune.templates.triton.gla_gradients_far"


@triton.jit
def gla_far_kernel(
    q, k, v, g, do, shared_q, shared_k, shared_g, k_scale, q_scale, h, dh, initial_state, d_final_state, perm, weights,
    chunk_table, dq_rows, dk_rows, dg_rows, de_rows, d_shared_q, d_shared_k, d_shared_g, far, sums, scale, M, n_shared,
    n_shared_rows, n_sequences, n_flags,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PARTITIONS: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    if not any_far(far, n_flags, FLAGS):
        return
    for i in range(FLAGS):
        i_slice = tl.program_id(0) + i * tl.num_programs(0)
        if i_slice < n_flags:
            i_seg, first_row, n_rows, i_before, i_after = chunk_entry(chunk_table, i_slice // (tl.cdiv(K, BK) * H))
            if (i_seg >= 0) & (tl.load(far + i_slice) != 0):
                far_slice(
                    q, k, v, g, do, shared_q, shared_k, shared_g, k_scale, q_scale, h, dh, initial_state, d_final_state,
                    perm, weights, dq_rows, dk_rows, dg_rows, de_rows, d_shared_q, d_shared_k, d_shared_g, sums, scale,
                    M, n_shared, n_shared_rows, n_sequences, i_slice, i_seg, first_row, n_rows, i_before, i_after,
                    H, K, V, C, L, PARTITIONS, HAS_SHARED, HAS_INITIAL, HAS_FINAL, WRITERS, READERS, NORM, PRECISION,
                    BK, BV, LEVELS,
                )  # fmt: skip


@triton.jit
def far_slice(
    q, k, v, g, do, shared_q, shared_k, shared_g, k_scale, q_scale, h, dh, initial_state, d_final_state, perm, weights,
    dq_rows, dk_rows, dg_rows, de_rows, d_shared_q, d_shared_k, d_shared_g, sums, scale, M, n_shared, n_shared_rows,
    n_sequences, i_slice, i_seg, first_row, n_rows, i_before, i_after,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PARTITIONS: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    i_k = i_slice % NK
    i_h = (i_slice // NK) % H
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
    b_qx = store_gradient(p_dq, p_q, b_xq, b_c, b_e, perm, first_row, n_rows, i_h, o_k, H, K, C, L, BK, NORM)
    b_kx = store_gradient(p_dk, p_k, b_xk, b_a, b_e, perm, first_row, n_rows, i_h, o_k, H, K, C, L, BK, NORM)
    store_slice(
        dg_rows, d_shared_g, de_rows, sums, b_db, b_last, b_qx, b_kx, perm, first_row, n_rows, i_h, i_k, is_shared,
        n_shared_rows, M, scale, H, K, C, L, WRITERS, READERS, BK,
    )  # fmt: skip
