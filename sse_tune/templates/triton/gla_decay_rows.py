"""GLA decay rows: the in-chunk scores of every chunk and head, and the rows of k and q as they meet the state.

    P_ij = c_i a_j Σ_d q_id k_jd e^(b_id - b_jd),  j <= i        qg = c q e^b        kg = a k e^(b_C - b)

with b the in-chunk sum of log-gates; the pairs i > j are taken as gla_gates says. A chunk leaves `decay`, e^(b_C), of
the state before it. One block per chunk and head walks over K. Chunks whose gates are near throughout have a kernel of
their own, with a third of the code. It flags the others, which a second launch of as many blocks takes by halves: those
that find no flag end at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import common, gla_gates
from sse_tune.templates.triton.common import chunk_entry, chunk_rows, key_tile, load_rows, row_scale, store_rows
from sse_tune.templates.triton.gla_gates import (
    any_far,
    far_decays,
    gate_parts,
    half_exponent,
    halves_of_chunk,
    in_second,
    pair_factors,
    wide_operand,
)

if TYPE_CHECKING:
    import torch


def smem_bytes(problem: Problem, config: Config) -> int:
    """The gates' two parts, dot operands on their way from one layout to another, and the scores."""
    c, bk = int(config["chunk_size"]), int(config["block_k"])
    wide = 4 if problem.dtype == "fp16" else common.item_bytes(problem)
    return (4 + 3 * wide) * c * bk + 4 * c * c + 4096


SPACE = Space(
    params=(
        Param("block_k", (64, 128), 64, "columns of K at a time"),
        Param("num_warps", (2, 4, 8), 4, "warps per block"),
    ),
    constraints=(
        common.tile_width("block_k", key_tile),
        # b, an exponential and two operands are held at once
        Constraint("chunk_size * block_k / (32 * num_warps) <= 64",
                   lambda p, c, d: c["chunk_size"] * c["block_k"] <= 64 * 32 * c["num_warps"]),
        Constraint("chunk_size * chunk_size / (32 * num_warps) <= 64",
                   lambda p, c, d: c["chunk_size"] ** 2 <= 64 * 32 * c["num_warps"]),
        Constraint("the tiles fit in shared memory",
                   lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
    ),
)


@triton.jit
def row_scales(
    p_q, p_k, b_head, p_weight, m_row, m_write, m_read, scale,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """What multiplies the rows of k and those of q."""
    b_qq = tl.zeros((C,), tl.float32)
    b_kk = tl.zeros((C,), tl.float32)
    if NORM != "none":
        for i_k in range((K + BK - 1) // BK):
            o_k = i_k * BK + tl.arange(0, BK)
            b_q = load_rows(p_q, b_head, m_row, o_k, K, BK).to(tl.float32)
            b_k = load_rows(p_k, b_head, m_row, o_k, K, BK).to(tl.float32)
            b_qq += tl.sum(b_q * b_q, 1)
            b_kk += tl.sum(b_k * b_k, 1)
    b_e = tl.load(p_weight, mask=m_row, other=0.0)
    b_a = tl.where(m_write, row_scale(b_kk, b_e, NORM), 0.0)
    return b_a, tl.where(m_read, row_scale(b_qq, b_e, NORM), 0.0) * scale


@triton.jit
def gla_decay_near_rows_kernel(
    q, k, g, shared_q, shared_k, shared_g, P, qg, kg, decay, k_scale, q_scale, far, perm, weights, chunk_table, scale,
    M, n_shared,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Chunks whose gates are near; what it makes of the others is without meaning, and flagged."""
    i_c = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_seg, first_row, n_rows, _, _ = chunk_entry(chunk_table, i_c)
    if i_seg < 0:
        return
    p_q = tl.where(i_seg < n_shared, shared_q, q)
    p_k = tl.where(i_seg < n_shared, shared_k, k)
    p_g = tl.where(i_seg < n_shared, shared_g, g)
    p_decay = decay + (i_c.to(tl.int64) * H + i_h) * K
    # a chunk's rows lie one behind the other where stages hand them on
    i_at = i_h.to(tl.int64) * M + first_row
    o_c = tl.arange(0, C)
    _, b_slot, b_token, b_lane, m_row = chunk_rows(perm, first_row, n_rows, C, L)
    b_head = b_token * H + i_h
    m_write = m_row & (b_lane < WRITERS)
    b_a, b_c = row_scales(
        p_q, p_k, b_head, weights + b_slot, m_row, m_write, m_row & (b_lane < READERS), scale, H, K, C, NORM, BK
    )  # fmt: skip
    tl.store(k_scale + i_at + o_c, b_a, mask=m_row)
    tl.store(q_scale + i_at + o_c, b_c, mask=m_row)

    b_P = tl.zeros((C, C), tl.float32)
    is_far = 0
    for i_k in tl.static_range((K + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        # read anew: held through the loop, rows and masks would take registers for which there is better use
        _, _, b_token, b_lane, m_row = chunk_rows(perm, first_row, n_rows, C, L)
        b_head = b_token * H + i_h
        b_q = load_rows(p_q, b_head, m_row, o_k, K, BK)  # [C, BK]
        b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)  # [C, BK]
        b_high, b_low = gate_parts(p_g, b_head, m_row & (b_lane < WRITERS), o_k, K, BK)  # [C, BK]
        b_first, b_second = halves_of_chunk(b_high, b_low, C, LEVELS)
        tl.store(p_decay + o_k, tl.exp(b_first + b_second), mask=o_k < K)
        b_x, is_near = half_exponent(b_high, b_low, LEVELS - 1, C)
        is_far += tl.where(is_near, 0, 1)
        b_x = tl.where(in_second(LEVELS - 1, C), b_x, -b_x) * 1.4426950408889634
        b_qe, b_ke = b_q * tl.exp2(b_x), b_k * tl.exp2(-b_x)
        b_P = tl.dot(
            wide_operand(b_qe, b_q.dtype), tl.trans(wide_operand(b_ke, b_k.dtype)), b_P, input_precision=PRECISION
        )
        b_qe *= b_c[:, None] * tl.exp(b_first)[None, :]
        b_ke *= b_a[:, None] * tl.exp(b_second)[None, :]
        store_rows(qg + i_at * K, b_qe, o_c, m_row, o_k, K, BK)
        store_rows(kg + i_at * K, b_ke, o_c, m_row, o_k, K, BK)
    tl.store(far + tl.program_id(0), is_far)
    b_P = tl.where(o_c[:, None] >= o_c[None, :], b_P, 0.0) * b_c[:, None] * b_a[None, :]
    store_rows(P + i_at * C, b_P, o_c, m_row, o_c, C, C)


@triton.jit
def gla_decay_far_rows_kernel(
    q, k, g, shared_q, shared_k, shared_g, P, qg, kg, decay, k_scale, q_scale, far, perm, weights, chunk_table, scale,
    M, n_shared, n_flags,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, LEVELS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """The chunks that are flagged."""
    if not any_far(far, n_flags, FLAGS):
        return
    for i in range(FLAGS):
        i_flag = tl.program_id(0) + i * tl.num_programs(0)
        if i_flag < n_flags:
            i_seg, first_row, n_rows, _, _ = chunk_entry(chunk_table, i_flag // H)
            if (i_seg >= 0) & (tl.load(far + i_flag) != 0):
                far_rows(
                    q, k, g, shared_q, shared_k, shared_g, P, qg, kg, decay, k_scale, q_scale, perm, weights, scale, M,
                    n_shared, i_flag, i_seg, first_row, n_rows, H, K, C, L, WRITERS, READERS, NORM, PRECISION, BK,
                    LEVELS,
                )  # fmt: skip


@triton.jit
def far_rows(
    q, k, g, shared_q, shared_k, shared_g, P, qg, kg, decay, k_scale, q_scale, perm, weights, scale, M, n_shared,
    i_flag, i_seg, first_row, n_rows,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    i_c = i_flag // H
    i_h = i_flag % H
    p_q = tl.where(i_seg < n_shared, shared_q, q)
    p_k = tl.where(i_seg < n_shared, shared_k, k)
    p_g = tl.where(i_seg < n_shared, shared_g, g)
    p_decay = decay + (i_c.to(tl.int64) * H + i_h) * K
    o_c = tl.arange(0, C)
    b_row, b_slot, b_token, b_lane, m_row = chunk_rows(perm, first_row, n_rows, C, L)
    b_head = b_token * H + i_h
    b_at = i_h.to(tl.int64) * M + b_row
    m_write = m_row & (b_lane < WRITERS)
    m_read = m_row & (b_lane < READERS)

    b_a, b_c = row_scales(
        p_q, p_k, b_head, weights + b_slot, m_row, m_write, m_read, scale, H, K, C, NORM, BK
    )  # fmt: skip
    tl.store(k_scale + b_at, b_a, mask=m_row)
    tl.store(q_scale + b_at, b_c, mask=m_row)

    b_P = tl.zeros((C, C), tl.float32)
    b_own = tl.zeros((C,), tl.float32)  # scores of pairs i = j
    for i_k in range((K + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_q = load_rows(p_q, b_head, m_row, o_k, K, BK)  # [C, BK]
        b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)  # [C, BK]
        b_high, b_low = gate_parts(p_g, b_head, m_write, o_k, K, BK)  # [C, BK]
        b_own += tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32), 1)
        b_first, b_second = halves_of_chunk(b_high, b_low, C, LEVELS)
        tl.store(p_decay + o_k, tl.exp(b_first + b_second), mask=o_k < K)
        b_up, b_down = far_decays(b_high, b_low, C)
        store_rows(qg, b_q * (b_c[:, None] * b_up), b_at, m_row, o_k, K, BK)
        store_rows(kg, b_k * (b_a[:, None] * b_down), b_at, m_row, o_k, K, BK)
        i_half = LEVELS - 1
        while i_half >= 0:
            b_x, is_near = half_exponent(b_high, b_low, i_half, C)
            b_eq, b_ek, m_pairs = pair_factors(b_x, is_near, i_half, C)
            b_qe = wide_operand(b_q * b_eq, b_q.dtype)
            b_ke = wide_operand(b_k * b_ek, b_k.dtype)
            b_level = tl.dot(b_qe, tl.trans(b_ke), input_precision=PRECISION)
            b_P += tl.where(m_pairs, b_level, 0.0)
            i_half = tl.where(is_near, -1, i_half - 1)

    # what lies above the diagonal is of no pair
    b_P = tl.where(o_c[:, None] > o_c[None, :], b_P, 0.0)
    b_P = tl.where(o_c[:, None] == o_c[None, :], b_own[:, None], b_P) * b_c[:, None] * b_a[None, :]
    store_rows(P, b_P, b_at, m_row, o_c, C, C)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem = call.sizes.problem
    names = ("P", "qg", "kg", "decay", "k_scale", "q_scale", "chunk_table")
    blocks = call.sizes.chunks * problem.num_heads
    arguments = dict(
        **common.streams(tensors, "q", "k", "g"),
        **common.row_arguments(call, tensors),
        **gla_gates.levels(call),
        **{name: tensors[name] for name in names},
        far=tensors["perm"].new_empty(blocks),
        scale=call.scale,
        BK=int(call.config["block_k"]),
    )
    warps = int(call.config["num_warps"])
    call.launch(gla_decay_near_rows_kernel, (blocks,), arguments, num_warps=warps, num_stages=1)
    far_blocks, flags = gla_gates.far_launch(blocks)
    call.launch(gla_decay_far_rows_kernel, (far_blocks,), arguments | flags, num_warps=warps, num_stages=1)


TEMPLATE = Template(
    "triton", "gla_decay_rows", "decay_rows", ("gla",), SPACE, run, (__name__, common.MODULE, gla_gates.MODULE)
)
