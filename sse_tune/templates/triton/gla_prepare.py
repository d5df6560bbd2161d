"""GLA prepare: the in-chunk scores of every chunk and head, and the row scales of k and q.

    P_ij = c_i a_j Σ_d q_id k_jd e^(b_id - b_jd),   j <= i

with b the in-chunk sum of log-gates; the pairs i > j are taken by halves (gla_common). One block per chunk and head
walks over K.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import common, gla_common
from sse_tune.templates.triton.common import chunk_entry, chunk_rows, key_tile, load_rows, row_scale, store_rows
from sse_tune.templates.triton.gla_common import (
    MIDPOINT_LEVELS,
    MIDPOINT_NATS,
    gate_parts,
    half_exponent,
    half_pairs,
    in_second,
    wide_operand,
)

if TYPE_CHECKING:
    import torch


def smem_bytes(problem: Problem, config: Config) -> int:
    """q, k and g in flight, then two dot operands and the scores."""
    c, item = int(config["chunk_size"]), common.item_bytes(problem)
    bk = int(config["block_k"])
    wide = max(item, 4 if problem.dtype == "fp16" and config["diagonal"] == "midpoint" else 0)
    return (int(config["num_stages"]) - 1) * (2 * item + 4) * c * bk + 2 * wide * c * bk + 4 * c * c + 4096


SPACE = Space(
    params=(
        Param("block_k", (32, 64, 128), 64, "columns of K at a time"),
        Param("diagonal", ("exact", "midpoint"), "midpoint",
              "blocks of 16 rows: by halves, or about their middle where the gates allow"),
        Param("num_warps", (2, 4, 8), 4, "warps per block"),
        Param("num_stages", (1, 2, 3), 2, "tiles of K in flight"),
    ),
    constraints=(
        common.tile_width("block_k", key_tile),
        Constraint("num_stages = 1 when one block covers K",
                   lambda p, c, d: c["num_stages"] == 1 or c["block_k"] < key_tile(p)),
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
def gla_prepare_kernel(
    q, k, g, shared_q, shared_k, shared_g, P, k_scale, q_scale, perm, weights, chunk_table, scale, M, n_shared,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, MIDPOINT: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(0) % H
    i_seg, first_row, n_rows, _, _ = chunk_entry(chunk_table, tl.program_id(0) // H)
    if i_seg < 0:
        return
    p_q = tl.where(i_seg < n_shared, shared_q, q)
    p_k = tl.where(i_seg < n_shared, shared_k, k)
    p_g = tl.where(i_seg < n_shared, shared_g, g)
    o_c = tl.arange(0, C)
    b_row, b_slot, b_token, b_lane, m_row = chunk_rows(perm, first_row, n_rows, C, L)
    b_head = b_token * H + i_h
    b_at = i_h.to(tl.int64) * M + b_row
    m_write = m_row & (b_lane < WRITERS)
    m_read = m_row & (b_lane < READERS)

    b_P = tl.zeros((C, C), tl.float32)
    b_own = tl.zeros((C,), tl.float32)  # scores of pairs i = j
    b_qq = tl.zeros((C,), tl.float32)
    b_kk = tl.zeros((C,), tl.float32)
    for i_k in range((K + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_q = load_rows(p_q, b_head, m_row, o_k, K, BK)  # [C, BK]
        b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)  # [C, BK]
        b_high, b_low = gate_parts(p_g, b_head, m_write, o_k, K, BK)  # [C, BK]
        b_q32, b_k32 = b_q.to(tl.float32), b_k.to(tl.float32)
        b_own += tl.sum(b_q32 * b_k32, 1)
        if NORM != "none":
            b_qq += tl.sum(b_q32 * b_q32, 1)
            b_kk += tl.sum(b_k32 * b_k32, 1)
        i_first = 0
        if MIDPOINT:
            b_x = half_exponent(b_high, b_low, MIDPOINT_LEVELS - 1, C)
            is_near = tl.min(b_x) >= -MIDPOINT_NATS
            i_first = tl.where(is_near, MIDPOINT_LEVELS, 0)
            if is_near:
                b_x = tl.where(in_second(MIDPOINT_LEVELS - 1, C), b_x, -b_x)
                b_qe = wide_operand(b_q32 * tl.exp(b_x), b_q.dtype)
                b_ke = wide_operand(b_k32 * tl.exp(-b_x), b_q.dtype)
                m_block = (o_c >> MIDPOINT_LEVELS)[:, None] == (o_c >> MIDPOINT_LEVELS)[None, :]
                b_P += tl.where(m_block, tl.dot(b_qe, tl.trans(b_ke), input_precision=PRECISION), 0.0)
        for i_half in range(i_first, LEVELS):
            # entries above the diagonal are wrong; the mask at the end drops them
            b_e = tl.exp(half_exponent(b_high, b_low, i_half, C))
            b_qe = (b_q * b_e).to(b_q.dtype)
            b_ke = (b_k * b_e).to(b_k.dtype)
            b_level = tl.dot(b_qe, tl.trans(b_ke), input_precision=PRECISION)
            b_P += tl.where(half_pairs(i_half, C), b_level, 0.0)

    b_e = tl.load(weights + b_slot, mask=m_row, other=0.0)
    b_a = tl.where(m_write, row_scale(b_kk, b_e, NORM), 0.0)
    b_c = tl.where(m_read, row_scale(b_qq, b_e, NORM), 0.0) * scale
    tl.store(k_scale + b_at, b_a, mask=m_row)
    tl.store(q_scale + b_at, b_c, mask=m_row)
    b_P = tl.where(o_c[:, None] > o_c[None, :], b_P, 0.0)
    b_P = tl.where(o_c[:, None] == o_c[None, :], b_own[:, None], b_P) * b_c[:, None] * b_a[None, :]
    store_rows(P, b_P, b_at, m_row, o_c, C, C)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem = call.sizes.problem
    call.launch(
        gla_prepare_kernel,
        (call.sizes.chunks * problem.num_heads,),
        dict(
            **common.streams(tensors, "q", "k", "g"),
            **common.row_arguments(call, tensors),
            **gla_common.split_arguments(call),
            **{name: tensors[name] for name in ("P", "k_scale", "q_scale", "chunk_table")},
            scale=call.scale,
            BK=int(call.config["block_k"]),
        ),
        num_warps=int(call.config["num_warps"]),
        num_stages=int(call.config["num_stages"]),
    )


TEMPLATE = Template(
    "triton", "gla_prepare", "prepare", ("gla",), SPACE, run, (__name__, common.MODULE, gla_common.MODULE)
)
