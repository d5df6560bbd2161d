"""What the kernels of GLA's gradients share: one slice of K of a chunk's rows, and the rows of all slices.

    dg_i = Σ_(t >= i) db_t,  a product with a triangle of ones

Only the norm and the router's gradient need all of K: their sums over a slice are left in scratch, and a last small
kernel finishes the rows. One slice that covers K is finished at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sse_tune.templates.triton.common import chunk_entry, chunk_rows, load_rows, load_scalars, store_rows

MODULE = "sse_tune.templates.triton.gla_slices"


@triton.jit
def norm_terms(b_dot, b_square, b_weight, NORM: tl.constexpr):
    """The norm's part of the gradient of a row x with scale s: d_x = s (X - κ x); returns κ and the gradient of the
    router weight. `b_dot` is X·x, `b_square` x·x. Never divides by the weight, which may be 0."""
    if NORM == "none":
        return 0.0 * b_dot, b_dot
    elif NORM == "after":
        b_rho = tl.rsqrt(b_square + 1e-6)
        return b_rho * b_rho * b_dot, b_rho * b_dot
    else:
        b_rho = tl.rsqrt(b_weight * b_weight * b_square + 1e-6)
        return (b_weight * b_rho) * (b_weight * b_rho) * b_dot, b_dot * 1e-6 * b_rho * b_rho * b_rho


@triton.jit
def sums_from(b_x, C: tl.constexpr):
    """Row i: the sum of the rows j >= i of an fp32 tile, scaled to the range of fp16 and taken in two parts: 22 bits of
    each number down to 2**-28 of the largest, and the tensor cores add faster than a scan along rows."""
    o_c = tl.arange(0, C)
    b_ones = (o_c[:, None] <= o_c[None, :]).to(tl.float16)
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
    p_out, p_rows, b_x, b_scale, b_e, perm, first_row, n_rows, i_h, o_k,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of rows y with X, that of the scaled rows, and returns that of the router weight; where K has
    more slices, without the norm's part, and returns the slice's X·y."""
    b_head, m_row = token_rows(perm, first_row, n_rows, i_h, H, C, L)
    b_y = load_rows(p_rows, b_head, m_row, o_k, K, BK).to(tl.float32)
    b_dot = tl.sum(b_x * b_y, 1)
    if NORM != "none" and BK >= K:
        b_part, b_dot = norm_terms(b_dot, tl.sum(b_y * b_y, 1), b_e, NORM)
        b_x -= b_part[:, None] * b_y
    store_rows(p_out, b_scale[:, None] * b_x, tl.arange(0, C) * H, m_row, o_k, K, BK)
    return b_dot


@triton.jit
def store_slice(
    dg_rows, d_shared_g, de_rows, sums, b_db, b_last, b_qx, b_kx, perm, first_row, n_rows, i_h, i_k, is_shared,
    n_shared_rows, M, scale,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, L: tl.constexpr, WRITERS: tl.constexpr, READERS: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of the gates, and what there is of the router weight's."""
    o_k = i_k * BK + tl.arange(0, BK)
    b_row, _, _, b_lane, m_row = chunk_rows(perm, first_row, n_rows, C, L)
    m_write = m_row & (b_lane < WRITERS)
    b_dg = tl.where(m_write[:, None], sums_from(b_db, C) + b_last[None, :], 0.0)
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
