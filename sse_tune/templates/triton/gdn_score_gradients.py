"""GDN score gradients: of a chunk's scores and key products, before the states come in; one block per chunk and head.

In the notation of `gdn_scan`, with dV' the gradient of V' and V' = Ag W taken again:

    dP = tril(dO V'ᵀ)      dAg = tril(dV' Wᵀ)      dN = -strictLower(Aᵀ (G∘dAg∘beta_col) Aᵀ)      E = beta_i dN
    dbeta_j = Σ_i G·dAg·A + Σ_t dN_jt a_j a_t k_j·k_t
    db = rowsum - colsum (dP∘P + dAg∘Ag)

Kept for `gdn_gradients` are G∘dP and E + Eᵀ, without the row scales: those go to the rows they multiply.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import common
from sse_tune.templates.triton.common import (
    chunk_entry,
    chunk_rows,
    decay,
    dot_fp32,
    halves,
    key_tile,
    load_gate_sums,
    load_rows,
    load_scalars,
    store_rows,
    value_tile,
)

if TYPE_CHECKING:
    import torch


def smem_bytes(problem: Problem, config: Config) -> int:
    """do, w and dV' in flight; the operands made of them; three fp32 tiles of the inverse's gradient."""
    c, item = int(config["chunk_size"]), common.item_bytes(problem)
    wide = max(int(config["block_v"]), int(config["block_k"]))
    return item * c * (3 * int(config["num_stages"]) * wide + 2 * wide + c) + 3 * 4 * c * c + 8192


SPACE = Space(
    params=(
        Param("block_v", (64, 128), 64, "columns of V taken at a time"),
        Param("block_k", (64, 128), 128, "columns of K taken at a time"),
        Param("solve_precision", ("tf32x3", "bf16x3"), "bf16x3", "of the products of the inverse's gradient"),
        Param("num_warps", (4, 8), 4, "warps per block"),
        Param("num_stages", (1, 2, 3), 2, "tiles in flight"),
    ),
    constraints=(
        common.tile_width("block_v", value_tile),
        common.tile_width("block_k", key_tile),
        # six such tiles of fp32 live at once
        Constraint("chunk_size^2 / (32 * num_warps) <= 32",
                   lambda p, c, d: c["chunk_size"] ** 2 <= 32 * 32 * c["num_warps"]),
        Constraint("the tiles fit in shared memory", lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
        common.FP32_SOLVE,
        common.FP32_ON_BLACKWELL,
    ),
)


@triton.jit
def gdn_score_gradients_kernel(
    k, beta, shared_k, shared_beta, do, P, Ag, A, k_scale, g_cumsum, w, dv_new, dp, dn, db,
    dbeta_rows, d_shared_beta, perm, weights, chunk_table, M, n_shared, n_shared_rows,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(0) % H
    i_seg, first_row, n_rows, _, _ = chunk_entry(chunk_table, tl.program_id(0) // H)
    if i_seg < 0:
        return
    is_shared = i_seg < n_shared
    p_k = tl.where(is_shared, shared_k, k)
    p_beta = tl.where(is_shared, shared_beta, beta)
    o_c = tl.arange(0, C)
    b_row, b_slot, b_token, b_lane, m_row = chunk_rows(perm, first_row, n_rows, C, L)
    m_write = m_row & (b_lane < WRITERS)
    m_read = m_row & (b_lane < READERS)
    b_head = b_token * H + i_h
    b_at = i_h.to(tl.int64) * M + b_row
    b_beta = tl.load(p_beta + b_head, mask=m_write, other=0.0).to(tl.float32)
    b_a = load_scalars(k_scale, b_at, m_row)
    b_b, _ = load_gate_sums(g_cumsum, b_at, m_row, n_rows, C)
    b_G = decay(b_b[:, None], b_b[None, :], o_c[:, None] >= o_c[None, :])
    b_Ag = load_rows(Ag, b_at, m_row, o_c, C, C)

    b_dP = tl.zeros((C, C), tl.float32)
    b_dAg = tl.zeros((C, C), tl.float32)
    for i_v in range(0, (V + BV - 1) // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_do = load_rows(do, b_head, m_read, o_v, V, BV)
        b_w = load_rows(w, b_at, m_row, o_v, V, BV)
        b_dnew = load_rows(dv_new, b_at, m_row, o_v, V, BV)
        b_new = tl.dot(b_Ag, b_w, input_precision=PRECISION).to(b_w.dtype)
        b_dP = tl.dot(b_do, tl.trans(b_new), b_dP, input_precision=PRECISION)
        b_dAg = tl.dot(b_dnew, tl.trans(b_w), b_dAg, input_precision=PRECISION)
    b_P = load_rows(P, b_at, m_row, o_c, C, C).to(tl.float32)
    b_M = b_dP * b_P + b_dAg * b_Ag.to(tl.float32)
    tl.store(db + b_at, tl.sum(b_M, 1) - tl.sum(b_M, 0), mask=m_row)
    b_dAg *= b_G
    store_rows(dp, b_dP * b_G, b_at, m_row, o_c, C, C)

    b_kk = tl.zeros((C, C), tl.float32)
    for i_k in tl.static_range(0, (K + BK - 1) // BK):
        b_k = load_rows(p_k, b_head, m_row, i_k * BK + tl.arange(0, BK), K, BK)
        b_kk = tl.dot(b_k, tl.trans(b_k), b_kk, input_precision=PRECISION)
    b_A = load_rows(A, b_at, m_row, o_c, C, C)
    b_dAA = b_dAg * b_A.to(tl.float32)

    # the inverse of nearly parallel keys cancels, and operands of ten bits would leave little of dbeta
    b_T = b_dAg * b_beta[None, :]
    if SOLVE == "bf16x3" and b_A.dtype == tl.bfloat16:  # A is a half without another one
        b_AT = tl.trans(b_A)
        b_high, b_low = halves(b_T)
        b_high, b_low = halves(tl.dot(b_high, b_AT, tl.dot(b_low, b_AT)))
        b_dN = tl.dot(b_AT, b_high, tl.dot(b_AT, b_low))
    else:
        b_AT = tl.trans(b_A.to(tl.float32))
        b_dN = dot_fp32(b_AT, dot_fp32(b_T, b_AT, SOLVE), SOLVE)
    b_dN = tl.where(o_c[:, None] > o_c[None, :], -b_dN, 0.0)
    b_dbeta = tl.sum(b_dAA, 0) + b_a * tl.sum(b_dN * b_a[None, :] * b_kk, 1)
    b_E = b_dN * b_beta[:, None]
    store_rows(dn, b_E + tl.trans(b_E), b_at, m_row, o_c, C, C)
    b_dbeta = tl.where(m_write, b_dbeta, 0.0)
    if is_shared:
        tl.store(d_shared_beta + b_head, b_dbeta.to(d_shared_beta.dtype.element_ty), mask=m_row)
    else:
        o_out = i_h.to(tl.int64) * (M - n_shared_rows) - n_shared_rows
        tl.store(dbeta_rows + o_out + b_row, b_dbeta, mask=m_row)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem = call.sizes.problem
    names = ("do", "P", "Ag", "A", "k_scale", "g_cumsum", "w", "dv_new", "dp", "dn", "db")
    call.launch(
        gdn_score_gradients_kernel,
        (call.sizes.chunks * problem.num_heads,),
        dict(
            **common.streams(tensors, "k", "beta"),
            **common.row_arguments(call, tensors),
            **common.gradient_arguments(call, tensors, "beta"),
            **{name: tensors[name] for name in names},
            V=problem.value_dim,
            SOLVE=call.config["solve_precision"],
            BK=int(call.config["block_k"]),
            BV=int(call.config["block_v"]),
        ),
        num_warps=int(call.config["num_warps"]),
        num_stages=int(call.config["num_stages"]),
    )


TEMPLATE = Template(
    "triton", "gdn_score_gradients", "score_gradients", ("gdn",), SPACE, run, (__name__, common.MODULE)
)
