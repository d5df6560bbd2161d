"""GDN gradients: of q, k, g, beta and the router weight, for each chunk and head on its own.

Given the states before (h) and the state gradients after (dh) every chunk; the notation of `gdn_scan`, X the gradient
of a scaled row, P and Ag as there:

    dAg = tril(dV' Wᵀ)   dP = tril(dO V'ᵀ)   dN = -strictLower(Aᵀ (G∘dAg∘beta_col) Aᵀ)   E = beta_i dN
    Xq = e^b∘(dO hᵀ) + (G∘dP∘a_j) K
    Xk = e^(b_C - b)∘(V' dhᵀ) - e^b∘(dW hᵀ) + (G∘dP∘c_i)ᵀ Q + (E∘a_j) K + (E∘a_i)ᵀ K
    dbeta_j = Σ_i G·dAg·A + Σ_t dN_jt a_j a_t k_j·k_t
    db = rowsum - colsum (dP∘P + dAg∘Ag) + <cq, Xq_inter> - <dW, e^b a K h> - y,  y = <ak, e^(b_C - b) V' dhᵀ>
    db_last += Σy + e^(b_C) <h, dh>;  dg = in-chunk reverse cumsum of db

The norm's and the gate's share comes last, in fp32. Sparse rows are stored sorted; shared rows at their token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.space import Constraint, Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import common
from sse_tune.templates.triton.common import (
    chunk_rows,
    decay,
    key_tile,
    load_rows,
    load_state,
    row_scale,
    row_scale_gradient,
    store_rows,
    value_tile,
)

if TYPE_CHECKING:
    import torch


def smem_bytes(problem, config) -> int:
    c, bk = config["chunk_size"], key_tile(problem)
    bv, item = config["block_v"], common.item_bytes(problem)
    state = 4 if config["state_dtype"] == "fp32" else item
    flight = config["num_stages"] * (2 * state * bk * bv + 5 * item * c * bv)
    return flight + item * (2 * c * bk + c * c) + 2 * c * c * 4 + 8192


SPACE = Space(
    params=(
        Param("block_v", (32, 64, 128), 64, "columns of V taken at a time"),
        Param("num_warps", (4, 8), 8, "warps per block"),
        Param("num_stages", (1, 2), 1, "blocks of V in flight"),
    ),
    constraints=(
        common.tile_width("block_v", value_tile),
        # two such tiles of fp32 are sums over V: more of them a thread spills
        Constraint("chunk_size * K / (32 * num_warps) <= 128",
                   lambda p, c, d: c["chunk_size"] * key_tile(p) <= 128 * 32 * c["num_warps"]),
        Constraint("chunk_size^2 / (32 * num_warps) <= 64",
                   lambda p, c, d: c["chunk_size"] ** 2 <= 64 * 32 * c["num_warps"]),
        Constraint("the tiles fit in shared memory", lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
        # beyond that Triton 3.6 asks for more than the 512 columns, or fails in its pass over them
        Constraint("chunks above 32 fit in tensor memory (sm_100) with 16-bit operands, K <= 128, block_v 64, 1 stage",
                   lambda p, c, d: d.capability < 100 or c["chunk_size"] <= 32
                   or (p.dtype != "fp32" and p.head_dim <= 128 and c["block_v"] == 64 and c["num_stages"] == 1)),
    ),
)


@triton.jit
def gdn_gradients_kernel(
    q, k, v, beta, shared_q, shared_k, shared_beta, do, A, k_scale, q_scale, g_cumsum, h, dh, v_new, dv_new, dv_rows,
    dq_rows, dk_rows, dg_rows, dbeta_rows, de_rows, d_shared_q, d_shared_k, d_shared_g, d_shared_beta,
    perm, weights, chunk_segment, scale, n_shared,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H
    i_seg = tl.load(chunk_segment + i_c)
    if i_seg < 0:
        return
    is_shared = i_seg < n_shared
    p_q = tl.where(is_shared, shared_q, q)
    p_k = tl.where(is_shared, shared_k, k)
    p_beta = tl.where(is_shared, shared_beta, beta)
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    m_all = o_c >= 0
    b_slot, b_token, b_lane, m_row = chunk_rows(perm, i_c, C, L)
    m_write = m_row & (b_lane < WRITERS)
    m_read = m_row & (b_lane < READERS)
    b_head = b_token * H + i_h
    i_ch = i_c.to(tl.int64) * H + i_h
    b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)
    b_beta = tl.load(p_beta + b_head, mask=m_write, other=0.0).to(tl.float32)
    b_a = tl.load(k_scale + i_ch * C + o_c)
    b_c = tl.load(q_scale + i_ch * C + o_c)
    b_b = tl.load(g_cumsum + i_ch * C + o_c)
    b_last = tl.sum(tl.where(o_c == C - 1, b_b, 0.0), 0)
    b_up = tl.exp(b_b.to(tl.float32))
    b_down = tl.exp((b_last - b_b).to(tl.float32))

    b_xq = tl.zeros((C, BK), tl.float32)
    b_xk = tl.zeros((C, BK), tl.float32)
    b_dP = tl.zeros((C, C), tl.float32)
    b_dAg = tl.zeros((C, C), tl.float32)
    b_db = tl.zeros((C,), tl.float32)
    b_y = tl.zeros((C,), tl.float32)
    b_through = 0.0
    for i_v in range(0, (V + BV - 1) // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        # <h, dh> is a small sum of large terms: in 16 bits dg would lose it
        b_h32 = load_state(h, i_ch, o_k, o_v, K, V).to(tl.float32)
        b_dh32 = load_state(dh, i_ch, o_k, o_v, K, V).to(tl.float32)
        b_h = b_h32.to(b_k.dtype)
        b_dh = b_dh32.to(b_k.dtype)
        b_v = load_rows(v, b_head, m_row, o_v, V, BV)
        b_do = load_rows(do, b_head, m_read, o_v, V, BV)
        b_new32 = load_rows(v_new, i_ch * C + o_c, m_all, o_v, V, BV)
        b_new = b_new32.to(b_k.dtype)
        b_dnew = load_rows(dv_new, i_ch * C + o_c, m_all, o_v, V, BV)
        b_dw = load_rows(dv_rows, (i_c.to(tl.int64) * C + o_c) * H + i_h, m_all, o_v, V, BV)
        b_kept = (b_up * b_a)[:, None] * tl.dot(b_k, b_h, input_precision=PRECISION)
        b_W = (b_v.to(tl.float32) - b_kept).to(b_k.dtype)
        b_db -= tl.sum(b_dw.to(tl.float32) * b_kept, 1)
        b_kdh = tl.dot(b_k, b_dh, input_precision=PRECISION)
        b_y += tl.sum(b_new32 * b_kdh, 1)
        b_through += tl.sum(tl.sum(b_h32 * b_dh32, 1), 0)
        b_dP = tl.dot(b_do, tl.trans(b_new), b_dP, input_precision=PRECISION)
        b_dAg = tl.dot(b_dnew, tl.trans(b_W), b_dAg, input_precision=PRECISION)
        b_xq = tl.dot(b_do, tl.trans(b_h), b_xq, input_precision=PRECISION)
        b_taken = (b_down[:, None] * b_new32).to(b_k.dtype)
        b_erased = (-b_up[:, None] * b_dw.to(tl.float32)).to(b_k.dtype)
        b_xk = tl.dot(b_taken, tl.trans(b_dh), b_xk, input_precision=PRECISION)
        b_xk = tl.dot(b_erased, tl.trans(b_h), b_xk, input_precision=PRECISION)

    b_q = load_rows(p_q, b_head, m_row, o_k, K, BK)
    b_q32 = b_q.to(tl.float32)
    b_xq *= b_up[:, None]
    b_db += b_c * tl.sum(b_q32 * b_xq, 1)
    b_y *= b_a * b_down
    b_db += tl.where(o_c == C - 1, tl.sum(b_y, 0) + tl.exp(b_last.to(tl.float32)) * b_through, 0.0) - b_y

    b_G = decay(b_b[:, None], b_b[None, :], o_c[:, None] >= o_c[None, :])
    b_A = tl.load(A + i_ch * (C * C) + o_c[:, None] * C + o_c[None, :])
    b_GdP = b_G * b_dP
    b_GdA = b_G * b_dAg
    b_M = b_GdP * b_c[:, None] * b_a[None, :] * tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_dAA = b_GdA * b_A.to(tl.float32)
    b_M += b_dAA * b_beta[None, :]
    b_db += tl.sum(b_M, 1) - tl.sum(b_M, 0)
    b_xq = tl.dot((b_GdP * b_a[None, :]).to(b_k.dtype), b_k, b_xq, input_precision=PRECISION)
    b_xk = tl.dot(tl.trans((b_GdP * b_c[:, None]).to(b_k.dtype)), b_q, b_xk, input_precision=PRECISION)

    # in fp32: the inverse of nearly parallel keys cancels, and operands of ten bits would leave little of dbeta
    b_AT = tl.trans(b_A.to(tl.float32))
    b_T = tl.dot(b_GdA * b_beta[None, :], b_AT, input_precision="tf32x3")
    b_dN = -tl.dot(b_AT, b_T, input_precision="tf32x3")
    b_dN = tl.where(o_c[:, None] > o_c[None, :], b_dN, 0.0)
    b_kk = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
    b_dbeta = tl.sum(b_dAA, 0) + b_a * tl.sum(b_dN * b_a[None, :] * b_kk, 1)
    b_E = b_dN * b_beta[:, None]
    b_xk = tl.dot((b_E * b_a[None, :]).to(b_k.dtype), b_k, b_xk, input_precision=PRECISION)
    b_xk = tl.dot(tl.trans((b_E * b_a[:, None]).to(b_k.dtype)), b_k, b_xk, input_precision=PRECISION)
    b_dg = tl.where(m_write, tl.cumsum(b_db, 0, reverse=True), 0.0)
    b_dbeta = tl.where(m_write, b_dbeta, 0.0)

    b_weight = tl.load(weights + b_slot, mask=m_row, other=0.0)
    b_dk, b_de = row_scale_gradient(b_xk, b_k.to(tl.float32), b_a, b_weight, m_write, NORM)
    b_square = tl.sum(b_q32 * b_q32, 1)
    b_unit = tl.where(m_read, row_scale(b_square, b_weight, NORM), 0.0)
    b_dq, b_de_q = row_scale_gradient(b_xq * scale, b_q32, b_unit, b_weight, m_read, NORM)
    if is_shared:
        store_rows(d_shared_q, b_dq, b_head, m_row, o_k, K, BK)
        store_rows(d_shared_k, b_dk, b_head, m_row, o_k, K, BK)
        tl.store(d_shared_g + b_head, b_dg.to(d_shared_g.dtype.element_ty), mask=m_row)
        tl.store(d_shared_beta + b_head, b_dbeta.to(d_shared_beta.dtype.element_ty), mask=m_row)
    else:
        b_row = (i_c.to(tl.int64) * C + o_c) * H + i_h
        store_rows(dq_rows, b_dq, b_row, m_all, o_k, K, BK)
        store_rows(dk_rows, b_dk, b_row, m_all, o_k, K, BK)
        tl.store(dg_rows + i_ch * C + o_c, b_dg)
        tl.store(dbeta_rows + i_ch * C + o_c, b_dbeta)
        tl.store(de_rows + i_ch * C + o_c, b_de + b_de_q)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem = call.sizes.problem
    names = (
        "v", "do", "A", "k_scale", "q_scale", "g_cumsum", "h", "dh", "v_new", "dv_new", "dv_rows", "dq_rows",
        "dk_rows", "dg_rows", "dbeta_rows", "de_rows", "chunk_segment",
    )  # fmt: skip
    call.launch(
        gdn_gradients_kernel,
        (call.sizes.chunks * problem.num_heads,),
        dict(
            **common.streams(tensors, "q", "k", "beta"),
            **common.row_arguments(call, tensors),
            **common.shared_gradients(tensors, "q", "k", "g", "beta"),
            **{name: tensors[name] for name in names},
            scale=call.scale,
            V=problem.value_dim,
            BK=key_tile(problem),
            BV=int(call.config["block_v"]),
        ),
        num_warps=int(call.config["num_warps"]),
        num_stages=int(call.config["num_stages"]),
    )


TEMPLATE = Template("triton", "gdn_gradients", "gradients", ("gdn",), SPACE, run, (__name__, common.MODULE))
