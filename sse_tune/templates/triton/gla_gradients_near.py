"""GLA gradients, near chunks in one step: of q, k, gates and router weight; a block per chunk and head walks over K.

With h the state before the chunk, dh the gradient of the one after, q̂ = c q, k̂ = a k, and Xq, Xk their gradients:

    dA = tril(dO Vᵀ)
    Xq = e^b (dO hᵀ) + Σ_j dA_ij k̂_j e^(b_i - b_j)      Xk = e^(b_C - b) (V dhᵀ) + Σ_i dA_ij q̂_i e^(b_i - b_j)
    db = q̂ Xq - k̂ Xk,  db_C += Σ_j k̂ e^(b_C - b) (V dhᵀ) + e^(b_C) Σ_v h dh,   dg_i = Σ_(t >= i) db_t

The pairs i > j are taken as gla_gates says: with E the decays that meet q and F those that meet k, Zq = E q̂,
Zk = F k̂, and dA of the level's pairs alone,

    Yq = dA Zk,  Yk = dAᵀ Zq,     Xq += E Yq,  Xk += F Yk,  db += Zq Yq - Zk Yk

Both sides of a pair so enter db with the same rounded factors and cancel where they must; pairs i = j, which have no
decay, stay out of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

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
    state_beside,
    state_index,
    store_rows,
    value_tile,
)
from sse_tune.templates.triton.gla_gates import (
    far_decays,
    gate_parts,
    half_exponent,
    halves_of_chunk,
    near_factors,
    pair_factors,
    wide_operand,
)
from sse_tune.templates.triton.gla_gradients import norm_terms

if TYPE_CHECKING:
    import torch


def smem_bytes(problem: Problem, config: Config) -> int:
    """do, v, h and dh in flight, or the dots' operands."""
    c, item = int(config["chunk_size"]), common.item_bytes(problem)
    bk = int(config["block_k"])
    bv = int(config["block_v"])
    state = 4 if config["state_dtype"] == "fp32" else item
    wide = max(item, 4 if problem.dtype == "fp16" else 0)
    tiles = 2 * item * c * bv + 2 * state * bk * bv
    return max(tiles, wide * (4 * c * bk + 2 * c * c)) + 9216


SPACE = Space(
    params=(
        Param("block_k", (64, 128), 64, "columns of K at a time"),
        Param("block_v", (64, 128), 128, "columns of V at a time"),
        Param("num_warps", (4, 8), 4, "warps per block"),
    ),
    constraints=(
        common.tile_width("block_k", key_tile),
        common.tile_width("block_v", value_tile),
        # Xq, Xk, db, E and Y are held at once, and on sm_80 the dots' operands as well
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
def gla_gradients_near_kernel(
    q, k, v, g, do, shared_q, shared_k, shared_g, k_scale, q_scale, h, dh, initial_state, d_final_state, perm, weights,
    chunk_table, dq_rows, dk_rows, dg_rows, de_rows, d_shared_q, d_shared_k, d_shared_g, scale, M, n_shared,
    n_shared_rows, n_sequences,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PARTITIONS: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    i_h = tl.program_id(0) % H
    i_seg, first_row, n_rows, i_before, i_after = chunk_entry(chunk_table, tl.program_id(0) // H)
    if i_seg < 0:
        return
    is_shared = i_seg < n_shared
    p_q = tl.where(is_shared, shared_q, q)
    p_k = tl.where(is_shared, shared_k, k)
    p_g = tl.where(is_shared, shared_g, g)
    p_dq = tl.where(is_shared, d_shared_q, dq_rows)
    p_dk = tl.where(is_shared, d_shared_k, dk_rows)
    o_c = tl.arange(0, C)
    b_row, b_slot, b_token, b_lane, m_row = chunk_rows(perm, first_row, n_rows, C, L)
    b_head = b_token * H + i_h
    b_at = i_h.to(tl.int64) * M + b_row
    i_state = state_index(i_seg, n_sequences, PARTITIONS, HAS_SHARED).to(tl.int64) * H + i_h
    m_write = m_row & (b_lane < WRITERS)
    m_read = m_row & (b_lane < READERS)
    # rows of a shared segment are the tokens'; the sparse rows' buffers begin behind them
    b_out = (b_row - tl.where(is_shared, 0, n_shared_rows)) * H + i_h
    b_a = load_scalars(k_scale, b_at, m_row)
    b_c = load_scalars(q_scale, b_at, m_row)

    b_dA = tl.zeros((C, C), tl.float32)
    b_qx = tl.zeros((C,), tl.float32)
    b_kx = tl.zeros((C,), tl.float32)
    b_qq = tl.zeros((C,), tl.float32)
    b_kk = tl.zeros((C,), tl.float32)
    for i_v in tl.static_range(NV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_do = load_rows(do, b_head, m_row, o_v, V, BV)  # [C, BV]
        b_v = load_rows(v, b_head, m_row, o_v, V, BV)  # [C, BV]
        b_dA = tl.dot(b_do, tl.trans(b_v), b_dA, input_precision=PRECISION)
    b_own = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_dA, 0.0), 1)
    b_lower = wide_operand(tl.where(o_c[:, None] > o_c[None, :], b_dA, 0.0), do.dtype.element_ty)
    for i_k in range(NK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_xq = tl.zeros((C, BK), tl.float32)
        b_xk = tl.zeros((C, BK), tl.float32)
        b_hdh = tl.zeros((BK,), tl.float32)
        for i_v in tl.static_range(NV):
            o_v = i_v * BV + tl.arange(0, BV)
            b_do = load_rows(do, b_head, m_row, o_v, V, BV)  # [C, BV]
            b_v = load_rows(v, b_head, m_row, o_v, V, BV)  # [C, BV]
            b_h = state_beside(h, initial_state, i_before, i_state, i_h, o_k, o_v, H, K, V, HAS_INITIAL)  # [BK, BV]
            b_dh = state_beside(dh, d_final_state, i_after, i_state, i_h, o_k, o_v, H, K, V, HAS_FINAL)  # [BK, BV]
            b_xq = tl.dot(b_do.to(b_h.dtype), tl.trans(b_h), b_xq, input_precision=PRECISION)
            b_xk = tl.dot(b_v.to(b_h.dtype), tl.trans(b_dh), b_xk, input_precision=PRECISION)
            b_hdh += tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 1)
        b_q = load_rows(p_q, b_head, m_row, o_k, K, BK)  # [C, BK]
        b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)  # [C, BK]
        b_high, b_low = gate_parts(p_g, b_head, m_write, o_k, K, BK)  # [C, BK]
        b_first, b_second = halves_of_chunk(b_high, b_low, C, LEVELS)
        b_hdh *= tl.exp(b_first + b_second)
        b_x, is_near = half_exponent(b_high, b_low, LEVELS - 1, C)
        if is_near:
            b_eq, b_ek = near_factors(b_x, C, LEVELS)
            b_zq = wide_operand(b_eq * (b_q * b_c[:, None]), b_q.dtype)
            b_zk = wide_operand(b_ek * (b_k * b_a[:, None]), b_k.dtype)
            b_xq *= tl.exp(b_first)[None, :]
            b_xk *= tl.exp(b_second)[None, :]
            b_last = tl.sum(b_zk.to(tl.float32) * b_xk, 0) + b_hdh
            b_xq = tl.dot(b_lower, b_zk, b_xq, input_precision=PRECISION)
            b_xk = tl.dot(tl.trans(b_lower), b_zq, b_xk, input_precision=PRECISION)
            b_db = b_zq.to(tl.float32) * b_xq - b_zk.to(tl.float32) * b_xk
            b_xq *= b_eq
            b_xk *= b_ek
        else:
            b_up, b_down = far_decays(b_high, b_low, C)
            b_xq *= b_up
            b_xk *= b_down
            b_y = b_xk * (b_k * b_a[:, None])
            b_last = tl.sum(b_y, 0) + b_hdh
            b_db = b_xq * (b_q * b_c[:, None]) - b_y
            i_half = LEVELS - 1
            while i_half >= 0:
                b_x, is_near = half_exponent(b_high, b_low, i_half, C)
                b_eq, b_ek, m_pairs = pair_factors(b_x, is_near, i_half, C)
                b_zq = wide_operand(b_eq * (b_q * b_c[:, None]), b_q.dtype)
                b_zk = wide_operand(b_ek * (b_k * b_a[:, None]), b_k.dtype)
                b_level = tl.where(m_pairs, b_lower, 0.0).to(b_lower.dtype)
                b_yq = tl.dot(b_level, b_zk, input_precision=PRECISION)
                b_yk = tl.dot(tl.trans(b_level), b_zq, input_precision=PRECISION)
                b_db += b_zq.to(tl.float32) * b_yq - b_zk.to(tl.float32) * b_yk
                b_xq += b_eq * b_yq
                b_xk += b_ek * b_yk
                i_half = tl.where(is_near, -1, i_half - 1)
        b_db += tl.where(o_c[:, None] == n_rows - 1, b_last[None, :], 0.0)
        b_dg = tl.where(m_write[:, None], tl.cumsum(b_db, 0, reverse=True), 0.0)
        if is_shared:
            store_rows(d_shared_g, b_dg, b_out, m_row, o_k, K, BK)
        else:
            store_rows(dg_rows, b_dg, b_out, m_row, o_k, K, BK)

        b_q32, b_k32 = b_q.to(tl.float32), b_k.to(tl.float32)
        b_xq += (b_own * b_a)[:, None] * b_k32
        b_xk += (b_own * b_c)[:, None] * b_q32
        b_qx += tl.sum(b_xq * b_q32, 1)
        b_kx += tl.sum(b_xk * b_k32, 1)
        if NORM != "none":
            b_qq += tl.sum(b_q32 * b_q32, 1)
            b_kk += tl.sum(b_k32 * b_k32, 1)
        if NORM == "none" or NK > 1:  # with a norm the rows are finished when all of K is known
            store_rows(p_dq, b_c[:, None] * b_xq, b_out, m_row, o_k, K, BK)
            store_rows(p_dk, b_a[:, None] * b_xk, b_out, m_row, o_k, K, BK)
        else:
            b_e = tl.load(weights + b_slot, mask=m_row, other=0.0)
            b_q_part, _ = norm_terms(b_qx, b_qq, b_e, NORM)
            b_k_part, _ = norm_terms(b_kx, b_kk, b_e, NORM)
            store_rows(p_dq, b_c[:, None] * (b_xq - b_q_part[:, None] * b_q32), b_out, m_row, o_k, K, BK)
            store_rows(p_dk, b_a[:, None] * (b_xk - b_k_part[:, None] * b_k32), b_out, m_row, o_k, K, BK)

    b_e = tl.load(weights + b_slot, mask=m_row, other=0.0)
    b_q_part, b_q_de = norm_terms(b_qx, b_qq, b_e, NORM)
    b_k_part, b_k_de = norm_terms(b_kx, b_kk, b_e, NORM)
    if NORM != "none" and NK > 1:
        tl.debug_barrier()  # other threads may have stored what this one reads
        for i_k in range(NK):
            o_k = i_k * BK + tl.arange(0, BK)
            b_q = load_rows(p_q, b_head, m_row, o_k, K, BK).to(tl.float32)
            b_k = load_rows(p_k, b_head, m_row, o_k, K, BK).to(tl.float32)
            b_dq = load_rows(p_dq, b_out, m_row, o_k, K, BK).to(tl.float32) - (b_c * b_q_part)[:, None] * b_q
            b_dk = load_rows(p_dk, b_out, m_row, o_k, K, BK).to(tl.float32) - (b_a * b_k_part)[:, None] * b_k
            store_rows(p_dq, b_dq, b_out, m_row, o_k, K, BK)
            store_rows(p_dk, b_dk, b_out, m_row, o_k, K, BK)
    if not is_shared:
        b_de = tl.where(m_read, b_q_de * scale, 0.0) + tl.where(m_write, b_k_de, 0.0)
        o_out = i_h.to(tl.int64) * (M - n_shared_rows) - n_shared_rows
        tl.store(de_rows + o_out + b_row, b_de, mask=m_row)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem = call.sizes.problem
    names = ("v", "do", "k_scale", "q_scale", "h", "dh", "de_rows")
    call.launch(
        gla_gradients_near_kernel,
        (call.sizes.chunks * problem.num_heads,),
        dict(
            **common.streams(tensors, "q", "k", "g"),
            **common.row_arguments(call, tensors),
            **gla_gates.levels(call),
            **{name: tensors[name] for name in names},
            **common.gradient_arguments(call, tensors, "q", "k", "g"),
            **common.end_states(tensors, "initial_state", "d_final_state"),
            scale=call.scale,
            n_sequences=problem.sequences,
            PARTITIONS=problem.partitions,
            HAS_SHARED=problem.shared,
            V=problem.value_dim,
            BK=int(call.config["block_k"]),
            BV=int(call.config["block_v"]),
        ),
        num_warps=int(call.config["num_warps"]),
        num_stages=1,  # h and dh are read by products and by <h, dh>: pipelined, Triton 3.6 overwrites them too early
    )


TEMPLATE = Template(
    "triton", "gla_gradients_near", "gradients", ("gla",), SPACE, run,
    (__name__, common.MODULE, gla_gates.MODULE, gla_gradients.__name__),
)  # fmt: skip
