"""GDN prepare: for each chunk and head the inverse A = (I + N)^-1, N = strictLower(beta_i a_i a_j k_i·k_j).

Also the row scale a of k and the in-chunk cumsum b of g. A holds no gates: the scans multiply them in.
The inverse goes from 16×16 diagonal blocks, by forward substitution, to twice the size again and again:
[[X, 0], [N21, Y]]^-1 = [[X', 0], [-Y' N21 X', Y']]. A doubling series from the start would be all matrix products,
but its powers of N grow beyond fp32 on repeated keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.space import Constraint, Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import common
from sse_tune.templates.triton.common import chunk_rows, key_tile, load_rows, log_gate, row_scale

if TYPE_CHECKING:
    import torch

SPACE = Space(
    params=(
        Param("block_k", (32, 64, 128), 64, "columns of k loaded at a time"),
        Param("solve_precision", ("ieee", "tf32x3", "tf32"), "tf32x3", "of the fp32 products of the inverse"),
        Param("num_warps", (1, 2, 4, 8), 4, "warps per block"),
        Param("num_stages", (1, 2, 3), 2, "k tiles in flight"),
    ),
    constraints=(
        common.tile_width("block_k", key_tile),
        # a wider tile for each thread than this spills
        Constraint("chunk_size^2 / (32 * num_warps) <= 64",
                   lambda p, c, d: c["chunk_size"] ** 2 <= 64 * 32 * c["num_warps"]),
        # tf32 keeps ten bits: on nearly parallel keys the inverse loses what is left of them
        Constraint("fp32 needs an fp32 solve", lambda p, c, d: p.dtype != "fp32" or c["solve_precision"] != "tf32"),
        Constraint("the tiles fit in shared memory", lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
    ),
)


def smem_bytes(problem, config) -> int:
    tile = config["chunk_size"] * config["block_k"] * common.item_bytes(problem)
    return config["num_stages"] * tile + tile + 3 * config["chunk_size"] ** 2 * 4 + 4096


@triton.jit
def unit_lower_inverse(b_N, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + N)^-1 of a strictly lower [C, C] fp32 tile."""
    NB: tl.constexpr = C // 16
    o_n = tl.arange(0, NB)
    o_i = tl.arange(0, 16)
    m_diagonal = o_n[:, None, None, None] == o_n[None, None, :, None]
    b_D = tl.sum(tl.where(m_diagonal, tl.reshape(b_N, (NB, 16, NB, 16)), 0.0), 2)  # [NB, 16, 16]
    b_X = tl.where(o_i[None, :, None] == o_i[None, None, :], 1.0, 0.0) + tl.zeros((NB, 16, 16), tl.float32)
    for i in range(1, 16):
        m_i = (o_i == i)[None, :, None]
        b_row = tl.sum(tl.where(m_i, b_D, 0.0), 1)  # [NB, 16]: row i of every diagonal block
        b_sum = tl.sum(b_row[:, :, None] * b_X, 1)  # [NB, 16]
        b_X = tl.where(m_i, b_X - b_sum[:, None, :], b_X)
    b_A = tl.reshape(tl.where(m_diagonal, b_X[:, :, None, :], 0.0), (C, C))
    o_c = tl.arange(0, C)
    for level in tl.static_range(4, 7):
        if (C >> level) > 1:
            b_i = o_c >> level
            m_off = ((b_i[:, None] >> 1) == (b_i[None, :] >> 1)) & (b_i[:, None] > b_i[None, :])
            b_off = tl.where(m_off, b_N, 0.0)
            b_right = tl.dot(b_off, b_A, input_precision=PRECISION)
            b_A -= tl.dot(b_A, b_right, input_precision=PRECISION)
    return b_A


@triton.jit
def gdn_prepare_kernel(
    k, g, beta, shared_k, shared_g, shared_beta, A, k_scale, g_cumsum, perm, weights, chunk_segment, n_shared,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, L: tl.constexpr, WRITERS: tl.constexpr, READERS: tl.constexpr,
    NORM: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H
    i_seg = tl.load(chunk_segment + i_c)
    if i_seg < 0:
        return
    p_k = tl.where(i_seg < n_shared, shared_k, k)
    p_g = tl.where(i_seg < n_shared, shared_g, g)
    p_beta = tl.where(i_seg < n_shared, shared_beta, beta)
    o_c = tl.arange(0, C)
    b_slot, b_token, b_lane, m_row = chunk_rows(perm, i_c, C, L)
    m_write = m_row & (b_lane < WRITERS)
    b_head = b_token * H + i_h
    b_kk = tl.zeros((C, C), tl.float32)
    b_square = tl.zeros((C,), tl.float32)
    for i_k in range(0, tl.cdiv(K, BK)):
        b_k = load_rows(p_k, b_head, m_row, i_k * BK + tl.arange(0, BK), K, BK)
        b_k32 = b_k.to(tl.float32)
        b_square += tl.sum(b_k32 * b_k32, 1)
        b_kk = tl.dot(b_k, tl.trans(b_k), b_kk, input_precision=PRECISION)
    b_weight = tl.load(weights + b_slot, mask=m_write, other=0.0)
    b_a = tl.where(m_write, row_scale(b_square, b_weight, NORM), 0.0)
    b_beta = tl.load(p_beta + b_head, mask=m_write, other=0.0).to(tl.float32)
    b_g = log_gate(tl.load(p_g + b_head, mask=m_write, other=0.0), m_write)
    m_lower = o_c[:, None] > o_c[None, :]
    b_N = tl.where(m_lower, (b_beta * b_a)[:, None] * b_a[None, :] * b_kk, 0.0)
    b_A = unit_lower_inverse(b_N, C, SOLVE)

    i_ch = i_c.to(tl.int64) * H + i_h
    tl.store(k_scale + i_ch * C + o_c, b_a)
    tl.store(g_cumsum + i_ch * C + o_c, tl.cumsum(b_g.to(g_cumsum.dtype.element_ty), 0))
    tl.store(A + i_ch * (C * C) + o_c[:, None] * C + o_c[None, :], b_A.to(A.dtype.element_ty))


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem = call.sizes.problem
    call.launch(
        gdn_prepare_kernel,
        (call.sizes.chunks * problem.num_heads,),
        dict(
            **common.streams(tensors, "k", "g", "beta"),
            **common.row_arguments(call, tensors),
            **{name: tensors[name] for name in ("A", "k_scale", "g_cumsum", "chunk_segment")},
            SOLVE=call.config["solve_precision"],
            BK=int(call.config["block_k"]),
        ),
        num_warps=int(call.config["num_warps"]),
        num_stages=int(call.config["num_stages"]),
    )


TEMPLATE = Template("triton", "gdn_prepare", "prepare", ("gdn",), SPACE, run, (__name__, common.MODULE))
