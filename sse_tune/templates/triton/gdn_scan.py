"""GDN scan: the state of each segment from chunk to chunk, and the output of every row, in one kernel.

With S the state before the chunk, b the in-chunk cumsum of g, G_ij = e^(b_i - b_j), Ag = G∘A∘beta_col:

    W = V - diag(e^b a) K S        V' = Ag W        P = G∘c_i a_j (q_i·k_j)
    O = diag(c e^b) Q S + P V'     S <- e^(b_C) S + Kᵀ diag(a e^(b_C - b)) V'

A block keeps block_v columns of one head's state in registers and walks its segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.space import Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import common
from sse_tune.templates.triton.common import (
    chunk_rows,
    decay,
    key_tile,
    load_rows,
    load_state,
    row_scale,
    state_index,
    store_rows,
    store_state,
)

if TYPE_CHECKING:
    import torch

SPACE = Space(
    params=(
        Param("block_v", (32, 64, 128), 64, "columns of the state one block keeps"),
        Param("num_warps", (2, 4, 8), 4, "warps per block"),
        Param("num_stages", (1, 2, 3), 2, "chunks in flight"),
    ),
    constraints=common.scan_constraints(row_tiles=2),
)


@triton.jit
def gdn_scan_kernel(
    q, k, v, beta, shared_q, shared_k, shared_beta, A, k_scale, g_cumsum, perm, weights, segment_chunks,
    initial_state, o_rows, q_scale, final_state, scale, n_shared, n_sequences,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = (tl.program_id(0) // NV) % H
    i_seg = tl.program_id(0) // (NV * H)
    p_q = tl.where(i_seg < n_shared, shared_q, q)
    p_k = tl.where(i_seg < n_shared, shared_k, k)
    p_beta = tl.where(i_seg < n_shared, shared_beta, beta)
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_all = o_c >= 0
    m_causal = o_c[:, None] >= o_c[None, :]
    i_state = state_index(i_seg, n_sequences, P, HAS_SHARED).to(tl.int64) * H + i_h

    b_state = tl.zeros((BK, BV), tl.float32)
    if HAS_INITIAL:
        b_state = load_state(initial_state, i_state, o_k, o_v, K, V)
    first = tl.load(segment_chunks + i_seg)
    for i in range(0, tl.load(segment_chunks + i_seg + 1) - first):
        i_c = first + i
        b_slot, b_token, b_lane, m_row = chunk_rows(perm, i_c, C, L)
        b_head = b_token * H + i_h
        i_ch = i_c.to(tl.int64) * H + i_h
        b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)  # [C, BK]
        b_q = load_rows(p_q, b_head, m_row, o_k, K, BK)  # [C, BK]
        b_v = load_rows(v, b_head, m_row, o_v, V, BV)  # [C, BV]
        b_beta = tl.load(p_beta + b_head, mask=m_row & (b_lane < WRITERS), other=0.0).to(tl.float32)
        b_a = tl.load(k_scale + i_ch * C + o_c)
        b_b = tl.load(g_cumsum + i_ch * C + o_c)
        b_A = tl.load(A + i_ch * (C * C) + o_c[:, None] * C + o_c[None, :])  # [C, C]
        b_weight = tl.load(weights + b_slot, mask=m_row & (b_lane < READERS), other=0.0)
        b_q32 = b_q.to(tl.float32)
        b_c = tl.where(m_row, row_scale(tl.sum(b_q32 * b_q32, 1), b_weight, NORM), 0.0) * scale
        if i_v == 0:
            tl.store(q_scale + i_ch * C + o_c, b_c)
        b_last = tl.sum(tl.where(o_c == C - 1, b_b, 0.0), 0)
        b_G = decay(b_b[:, None], b_b[None, :], m_causal)

        b_low = b_state.to(b_k.dtype)
        b_kept = (tl.exp(b_b.to(tl.float32)) * b_a)[:, None] * tl.dot(b_k, b_low, input_precision=PRECISION)
        b_W = b_v.to(tl.float32) - b_kept
        b_Ag = b_G * b_A.to(tl.float32) * b_beta[None, :]
        b_new = tl.dot(b_Ag.to(b_k.dtype), b_W.to(b_k.dtype), input_precision=PRECISION)  # [C, BV]
        b_P = b_G * b_c[:, None] * b_a[None, :] * tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_o = (b_c * tl.exp(b_b.to(tl.float32)))[:, None] * tl.dot(b_q, b_low, input_precision=PRECISION)
        b_o += tl.dot(b_P.to(b_k.dtype), b_new.to(b_k.dtype), input_precision=PRECISION)
        store_rows(o_rows, b_o, (i_c.to(tl.int64) * C + o_c) * H + i_h, m_all, o_v, V, BV)
        b_in = (b_new * (b_a * tl.exp((b_last - b_b).to(tl.float32)))[:, None]).to(b_k.dtype)
        b_state = tl.exp(b_last.to(tl.float32)) * b_state + tl.dot(tl.trans(b_k), b_in, input_precision=PRECISION)
    if HAS_FINAL:
        store_state(final_state, b_state, i_state, o_k, o_v, K, V)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem = call.sizes.problem
    block_v = int(call.config["block_v"])
    blocks = triton.cdiv(problem.value_dim, block_v)
    call.launch(
        gdn_scan_kernel,
        (call.sizes.segments * problem.num_heads * blocks,),
        dict(
            **common.streams(tensors, "q", "k", "beta"),
            **common.row_arguments(call, tensors),
            **common.state_arguments(call, tensors),
            **{name: tensors[name] for name in ("v", "A", "k_scale", "g_cumsum", "o_rows", "q_scale")},
            scale=call.scale,
            V=problem.value_dim,
            BK=key_tile(problem),
            BV=block_v,
        ),
        num_warps=int(call.config["num_warps"]),
        num_stages=int(call.config["num_stages"]),
    )


TEMPLATE = Template("triton", "gdn_scan", "scan", ("gdn",), SPACE, run, (__name__, common.MODULE))
