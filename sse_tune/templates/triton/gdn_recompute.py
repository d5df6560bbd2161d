"""GDN recompute: the state before each chunk and the values V' it takes in, again, for the backward pass.

The walk of `gdn_scan` without queries and outputs; nothing of size M·K·V lives from the forward to the backward.
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
    constraints=common.scan_constraints(row_tiles=1),
)


@triton.jit
def gdn_recompute_kernel(
    k, v, beta, shared_k, shared_beta, A, k_scale, g_cumsum, perm, weights, segment_chunks, initial_state, final_state,
    h, v_new, n_shared, n_sequences,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = (tl.program_id(0) // NV) % H
    i_seg = tl.program_id(0) // (NV * H)
    p_k = tl.where(i_seg < n_shared, shared_k, k)
    p_beta = tl.where(i_seg < n_shared, shared_beta, beta)
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
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
        b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)
        b_v = load_rows(v, b_head, m_row, o_v, V, BV)
        b_beta = tl.load(p_beta + b_head, mask=m_row & (b_lane < WRITERS), other=0.0).to(tl.float32)
        b_a = tl.load(k_scale + i_ch * C + o_c)
        b_b = tl.load(g_cumsum + i_ch * C + o_c)
        b_A = tl.load(A + i_ch * (C * C) + o_c[:, None] * C + o_c[None, :])
        b_last = tl.sum(tl.where(o_c == C - 1, b_b, 0.0), 0)
        store_state(h, b_state, i_ch, o_k, o_v, K, V)

        b_low = b_state.to(b_k.dtype)
        b_kept = (tl.exp(b_b.to(tl.float32)) * b_a)[:, None] * tl.dot(b_k, b_low, input_precision=PRECISION)
        b_W = b_v.to(tl.float32) - b_kept
        b_Ag = decay(b_b[:, None], b_b[None, :], m_causal) * b_A.to(tl.float32) * b_beta[None, :]
        b_new = tl.dot(b_Ag.to(b_k.dtype), b_W.to(b_k.dtype), input_precision=PRECISION)
        store_rows(v_new, b_new, i_ch * C + o_c, o_c >= 0, o_v, V, BV)
        b_in = (b_new * (b_a * tl.exp((b_last - b_b).to(tl.float32)))[:, None]).to(b_k.dtype)
        b_state = tl.exp(b_last.to(tl.float32)) * b_state + tl.dot(tl.trans(b_k), b_in, input_precision=PRECISION)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem = call.sizes.problem
    block_v = int(call.config["block_v"])
    call.launch(
        gdn_recompute_kernel,
        (call.sizes.segments * problem.num_heads * triton.cdiv(problem.value_dim, block_v),),
        dict(
            **common.streams(tensors, "k", "beta"),
            **common.row_arguments(call, tensors),
            **common.state_arguments(call, tensors),
            **{name: tensors[name] for name in ("v", "A", "k_scale", "g_cumsum", "h", "v_new")},
            V=problem.value_dim,
            BK=key_tile(problem),
            BV=block_v,
        ),
        num_warps=int(call.config["num_warps"]),
        num_stages=int(call.config["num_stages"]),
    )


TEMPLATE = Template("triton", "gdn_recompute", "recompute", ("gdn",), SPACE, run, (__name__, common.MODULE))
