"""GDN prepare: what a chunk needs that no state enters, for each chunk and head on its own.

    N = strictLower(beta_i a_i a_j k_i·k_j)     A = (I + N)^-1     Ag = G∘A∘beta_col     P = G∘c_i a_j (q_i·k_j)

with the row scales a of k and c of q, the in-chunk cumsum b of g, and G_ij = e^(b_i - b_j). The walks along the
segments, whose steps wait for one another, then have products alone to do. A itself is for the backward pass.
The inverse goes from 16×16 diagonal blocks, by forward substitution, to twice the size again and again:
[[X, 0], [N21, Y]]^-1 = [[X', 0], [-Y' N21 X', Y']]. A doubling series from the start would be all matrix products,
but its powers of N grow beyond fp32 on repeated keys. The substitution reads rows of N from memory, where they go
first: taken out of registers they would cost a reduction over the warps each.
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
    chunk_entry,
    chunk_rows,
    decay,
    dot_fp32,
    key_tile,
    load_rows,
    log_gate,
    row_scale,
    store_rows,
)

if TYPE_CHECKING:
    import torch

SPACE = Space(
    params=(
        Param("block_k", (64, 128), 64, "columns of q and k loaded at a time"),
        Param("solve_precision", ("tf32x3", "bf16x3", "tf32"), "bf16x3", "of the products of the inverse"),
        Param("num_warps", (1, 2, 4, 8), 4, "warps per block"),
    ),
    constraints=(
        common.tile_width("block_k", key_tile),
        # a wider tile for each thread than this spills
        Constraint("chunk_size^2 / (32 * num_warps) <= 64",
                   lambda p, c, d: c["chunk_size"] ** 2 <= 64 * 32 * c["num_warps"]),
        common.FP32_SOLVE,
        Constraint("the tiles fit in shared memory", lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
    ),
)


def smem_bytes(problem, config) -> int:
    tile = config["chunk_size"] * config["block_k"] * common.item_bytes(problem)
    return 4 * tile + 3 * config["chunk_size"] ** 2 * 4 + 4096


@triton.jit
def diagonal_inverses(p_rows, n_rows, C: tl.constexpr):
    """(I + N)^-1 of the 16×16 blocks on the diagonal of N, transposed: [column of N, row within its block]. N's rows
    within their block are 16 numbers each from p_rows on.

    Each column takes its own row of N, although sixteen take the same one: a tile of that size is loaded four numbers a
    thread, and the sum over them is for the most part a thread's own."""
    o_c = tl.arange(0, C)
    o_i = tl.arange(0, 16)
    b_XT = tl.where((o_c & 15)[:, None] == o_i[None, :], 1.0, 0.0)
    for i in tl.static_range(1, 16):
        o_row = (o_c >> 4) * 16 + i
        b_N = tl.load(p_rows + o_row[:, None] * 16 + o_i[None, :], mask=(o_row < n_rows)[:, None], other=0.0)
        b_sum = tl.sum(b_N * b_XT, 1)  # row i of the product, by column
        b_XT = tl.where((o_i == i)[None, :], b_XT - b_sum[:, None], b_XT)
    return b_XT


@triton.jit
def unit_lower_inverse(b_N, p_rows, m_row, n_rows, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + N)^-1 of a strictly lower [C, C] fp32 tile; p_rows: scratch of this block's own, 16 fp32 numbers a row."""
    o_c = tl.arange(0, C)
    m_block = (o_c >> 4)[:, None] == (o_c >> 4)[None, :]
    o_i = tl.arange(0, 16)
    o_n = tl.arange(0, C // 16)
    # a warp of the product that b_N comes from has whole rows: the sum over blocks is a thread's own
    m_own = o_n[:, None, None, None] == o_n[None, None, :, None]
    b_own = tl.sum(tl.where(m_own, tl.reshape(b_N, (C // 16, 16, C // 16, 16)), 0.0), 2)
    tl.store(p_rows + o_c[:, None] * 16 + o_i[None, :], tl.reshape(b_own, (C, 16)), mask=m_row[:, None])
    tl.debug_barrier()  # other threads stored what this one reads
    b_XT = tl.broadcast_to(diagonal_inverses(p_rows, n_rows, C)[:, None, :], (C, C // 16, 16))
    # N's own zeros: they are laid out as a product's result, as every use of b_A wants it
    b_zero = tl.where(o_c[:, None] > o_c[None, :], 0.0, b_N)
    b_A = tl.where(m_block, tl.trans(tl.reshape(b_XT, (C, C))), b_zero)
    for level in tl.static_range(4, 7):
        if (C >> level) > 1:
            b_i = o_c >> level
            m_off = ((b_i[:, None] >> 1) == (b_i[None, :] >> 1)) & (b_i[:, None] > b_i[None, :])
            b_off = tl.where(m_off, b_N, 0.0)
            b_A -= dot_fp32(b_A, dot_fp32(b_off, b_A, PRECISION), PRECISION)
    return b_A


@triton.jit
def gdn_prepare_kernel(
    q, k, g, beta, shared_q, shared_k, shared_g, shared_beta, P, Ag, A, k_scale, q_scale, g_cumsum, scratch, perm,
    weights, chunk_table, scale, M, n_shared,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, L: tl.constexpr, WRITERS: tl.constexpr, READERS: tl.constexpr,
    NORM: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr, TRAINS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(0) % H
    i_seg, first_row, n_rows, _, _ = chunk_entry(chunk_table, tl.program_id(0) // H)
    if i_seg < 0:
        return
    p_q = tl.where(i_seg < n_shared, shared_q, q)
    p_k = tl.where(i_seg < n_shared, shared_k, k)
    p_g = tl.where(i_seg < n_shared, shared_g, g)
    p_beta = tl.where(i_seg < n_shared, shared_beta, beta)
    o_c = tl.arange(0, C)
    b_row, b_slot, b_token, b_lane, m_row = chunk_rows(perm, first_row, n_rows, C, L)
    m_write = m_row & (b_lane < WRITERS)
    b_head = b_token * H + i_h
    b_at = i_h.to(tl.int64) * M + b_row
    b_kk = tl.zeros((C, C), tl.float32)
    b_qk = tl.zeros((C, C), tl.float32)
    b_q_square = tl.zeros((C,), tl.float32)
    # unrolled: Triton 3.6 pipelines this loop into one buffer that it fills again while the tensor core reads it
    for i_k in tl.static_range(0, (K + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)
        b_q = load_rows(p_q, b_head, m_row, o_k, K, BK)
        b_q32 = b_q.to(tl.float32)
        b_q_square += tl.sum(b_q32 * b_q32, 1)
        b_kk = tl.dot(b_k, tl.trans(b_k), b_kk, input_precision=PRECISION)
        b_qk = tl.dot(b_q, tl.trans(b_k), b_qk, input_precision=PRECISION)
    b_weight = tl.load(weights + b_slot, mask=m_row, other=0.0)
    # |k|² lies on the diagonal
    b_k_square = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_kk, 0.0), 1)
    b_a = tl.where(m_write, row_scale(b_k_square, b_weight, NORM), 0.0)
    b_c = tl.where(m_row & (b_lane < READERS), row_scale(b_q_square, b_weight, NORM), 0.0) * scale
    b_beta = tl.load(p_beta + b_head, mask=m_write, other=0.0).to(tl.float32)
    b_g = log_gate(tl.load(p_g + b_head, mask=m_write, other=0.0), m_write)
    b_b = tl.cumsum(b_g.to(g_cumsum.dtype.element_ty), 0)
    tl.store(k_scale + b_at, b_a, mask=m_row)
    tl.store(q_scale + b_at, b_c, mask=m_row)
    tl.store(g_cumsum + b_at, b_b, mask=m_row)
    b_G = decay(b_b[:, None], b_b[None, :], o_c[:, None] >= o_c[None, :])
    store_rows(P, b_G * b_c[:, None] * b_a[None, :] * b_qk, b_at, m_row, o_c, C, C)
    m_lower = o_c[:, None] > o_c[None, :]
    b_N = tl.where(m_lower, (b_beta * b_a)[:, None] * b_a[None, :] * b_kk, 0.0)
    p_rows = scratch + (i_h.to(tl.int64) * M + first_row) * 16
    b_A = unit_lower_inverse(b_N, p_rows, m_row, n_rows, C, SOLVE)
    if TRAINS:
        store_rows(A, b_A, b_at, m_row, o_c, C, C)
    store_rows(Ag, b_G * b_A * b_beta[None, :], b_at, m_row, o_c, C, C)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem = call.sizes.problem
    call.launch(
        gdn_prepare_kernel,
        (call.sizes.chunks * problem.num_heads,),
        dict(
            **common.streams(tensors, "q", "k", "g", "beta"),
            **common.row_arguments(call, tensors),
            **{name: tensors[name] for name in ("P", "Ag", "k_scale", "q_scale", "g_cumsum", "chunk_table")},
            A=tensors.get("A", tensors["Ag"]),  # not written when nothing is trained
            scratch=tensors["k_scale"].new_empty((*tensors["k_scale"].shape, 16)),
            scale=call.scale,
            SOLVE=call.config["solve_precision"],
            TRAINS=problem.trains,
            BK=int(call.config["block_k"]),
        ),
        num_warps=int(call.config["num_warps"]),
        num_stages=1,
    )


TEMPLATE = Template("triton", "gdn_prepare", "prepare", ("gdn",), SPACE, run, (__name__, common.MODULE))
