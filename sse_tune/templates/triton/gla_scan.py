"""GLA scan: the state of each segment from chunk to chunk, and the output of every row, in one kernel.

With S the state before the chunk and b the in-chunk sum of log-gates, per key dimension:

    O = (c Q e^b) S + A V        S <- e^(b_C) S + (a K e^(b_C - b))ᵀ V

A block keeps block_v columns of one head's state in registers and walks its segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.space import Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import common, gla_common
from sse_tune.templates.triton.common import (
    chunk_rows,
    key_tile,
    load_rows,
    load_state,
    state_index,
    store_rows,
    store_state,
)
from sse_tune.templates.triton.gla_common import walk_gates

if TYPE_CHECKING:
    import torch

SPACE = Space(
    params=(
        Param("block_v", (32, 64, 128), 64, "columns of the state one block keeps"),
        Param("num_warps", (2, 4, 8), 8, "warps per block"),
        Param("num_stages", (1, 2, 3), 2, "chunks in flight"),
    ),
    constraints=gla_common.walk_constraints(key_tiles=2),
)


@triton.jit
def gla_scan_kernel(
    q, k, v, g, shared_q, shared_k, shared_g, A, k_scale, q_scale, perm, weights, segment_chunks,
    initial_state, o_rows, final_state, n_shared, n_sequences,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = (tl.program_id(0) // NV) % H
    i_seg = tl.program_id(0) // (NV * H)
    p_q = tl.where(i_seg < n_shared, shared_q, q)
    p_k = tl.where(i_seg < n_shared, shared_k, k)
    p_g = tl.where(i_seg < n_shared, shared_g, g)
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_all = o_c >= 0
    i_state = state_index(i_seg, n_sequences, P, HAS_SHARED).to(tl.int64) * H + i_h

    b_state = tl.zeros((BK, BV), tl.float32)
    if HAS_INITIAL:
        b_state = load_state(initial_state, i_state, o_k, o_v, K, V)
    i_first = tl.load(segment_chunks + i_seg)
    for i in range(tl.load(segment_chunks + i_seg + 1) - i_first):
        i_c = i_first + i
        b_slot, b_token, b_lane, m_row = chunk_rows(perm, i_c, C, L)
        b_head = b_token * H + i_h
        i_ch = i_c.to(tl.int64) * H + i_h
        b_q = load_rows(p_q, b_head, m_row, o_k, K, BK)  # [C, BK]
        b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)  # [C, BK]
        b_v = load_rows(v, b_head, m_row, o_v, V, BV)  # [C, BV]
        m_write = m_row & (b_lane < WRITERS)
        b_b, b_rest, b_end = walk_gates(p_g, b_head, m_write, o_k, C, K, BK, EXACT)
        b_a = tl.load(k_scale + i_ch * C + o_c)
        b_c = tl.load(q_scale + i_ch * C + o_c)
        b_A = tl.load(A + i_ch * (C * C) + o_c[:, None] * C + o_c[None, :])  # [C, C]
        b_qe = (b_q * (b_c[:, None] * tl.exp(b_b))).to(b_q.dtype)
        b_ke = (b_k * (b_a[:, None] * tl.exp(b_rest))).to(b_k.dtype)

        b_o = tl.dot(b_qe, b_state.to(b_q.dtype), input_precision=PRECISION)
        b_o += tl.dot(b_A, b_v, input_precision=PRECISION)
        store_rows(o_rows, b_o, (i_c.to(tl.int64) * C + o_c) * H + i_h, m_all, o_v, V, BV)
        b_state *= tl.exp(b_end)[:, None]
        b_state += tl.dot(tl.trans(b_ke), b_v, input_precision=PRECISION)
    if HAS_FINAL:
        store_state(final_state, b_state, i_state, o_k, o_v, K, V)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem = call.sizes.problem
    block_v = int(call.config["block_v"])
    blocks = triton.cdiv(problem.value_dim, block_v)
    call.launch(
        gla_scan_kernel,
        (call.sizes.segments * problem.num_heads * blocks,),
        dict(
            **common.streams(tensors, "q", "k", "g"),
            **common.row_arguments(call, tensors),
            **common.state_arguments(call, tensors),
            **{name: tensors[name] for name in ("v", "A", "k_scale", "q_scale", "o_rows")},
            V=problem.value_dim,
            BK=key_tile(problem),
            BV=block_v,
            EXACT=problem.dtype == "fp32",
        ),
        num_warps=int(call.config["num_warps"]),
        num_stages=int(call.config["num_stages"]),
    )


TEMPLATE = Template("triton", "gla_scan", "scan", ("gla",), SPACE, run, (__name__, common.MODULE, gla_common.MODULE))
