"""GDN state gradient: the gradient of the state after each chunk, walking every segment backwards.

With dS the gradient of the state after the chunk (stored before it is used):

    dV' = PᵀdO + diag(a e^(b_C - b)) K dS       dW = Agᵀ dV' = dV
    dS <- e^(b_C) dS + Qᵀ diag(c e^b) dO - Kᵀ diag(a e^b) dW

The columns of V do not mix, so a block keeps block_v of them, as the forward scan does.
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
    constraints=common.scan_constraints(row_tiles=2),
)


@triton.jit
def gdn_state_gradient_kernel(
    q, k, beta, shared_q, shared_k, shared_beta, do, A, k_scale, q_scale, g_cumsum, perm, weights, segment_chunks,
    d_final_state, dh, dv_new, dv_rows, d_initial_state, n_shared, n_sequences,
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
    m_anti = o_c[:, None] <= o_c[None, :]
    i_state = state_index(i_seg, n_sequences, P, HAS_SHARED).to(tl.int64) * H + i_h

    b_ds = tl.zeros((BK, BV), tl.float32)
    if HAS_FINAL:
        b_ds = load_state(d_final_state, i_state, o_k, o_v, K, V)
    first = tl.load(segment_chunks + i_seg)
    count = tl.load(segment_chunks + i_seg + 1) - first
    for i_back in range(0, count):
        i_c = first + count - 1 - i_back
        b_slot, b_token, b_lane, m_row = chunk_rows(perm, i_c, C, L)
        b_head = b_token * H + i_h
        i_ch = i_c.to(tl.int64) * H + i_h
        b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)
        b_q = load_rows(p_q, b_head, m_row, o_k, K, BK)
        b_do = load_rows(do, b_head, m_row, o_v, V, BV)
        b_beta = tl.load(p_beta + b_head, mask=m_row & (b_lane < WRITERS), other=0.0).to(tl.float32)
        b_a = tl.load(k_scale + i_ch * C + o_c)
        b_c = tl.load(q_scale + i_ch * C + o_c)
        b_b = tl.load(g_cumsum + i_ch * C + o_c)
        b_A = tl.load(A + i_ch * (C * C) + o_c[:, None] * C + o_c[None, :])
        b_last = tl.sum(tl.where(o_c == C - 1, b_b, 0.0), 0)
        store_state(dh, b_ds, i_ch, o_k, o_v, K, V)

        b_PT = decay(b_b[None, :], b_b[:, None], m_anti) * b_c[None, :] * b_a[:, None]
        b_PT *= tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # row j of keys, column i of queries
        b_down = b_a * tl.exp((b_last - b_b).to(tl.float32))
        b_dnew = b_down[:, None] * tl.dot(b_k, b_ds.to(b_k.dtype), input_precision=PRECISION)
        b_dnew += tl.dot(b_PT.to(b_k.dtype), b_do, input_precision=PRECISION)
        b_Ag = decay(b_b[:, None], b_b[None, :], m_causal) * b_A.to(tl.float32) * b_beta[None, :]
        b_dw = tl.dot(tl.trans(b_Ag.to(b_k.dtype)), b_dnew.to(b_k.dtype), input_precision=PRECISION)
        store_rows(dv_new, b_dnew, i_ch * C + o_c, m_all, o_v, V, BV)
        store_rows(dv_rows, b_dw, (i_c.to(tl.int64) * C + o_c) * H + i_h, m_all, o_v, V, BV)
        b_read = ((b_c * tl.exp(b_b.to(tl.float32)))[:, None] * b_do.to(tl.float32)).to(b_k.dtype)
        b_erased = ((b_a * tl.exp(b_b.to(tl.float32)))[:, None] * b_dw).to(b_k.dtype)
        b_ds = tl.exp(b_last.to(tl.float32)) * b_ds + tl.dot(tl.trans(b_q), b_read, input_precision=PRECISION)
        b_ds -= tl.dot(tl.trans(b_k), b_erased, input_precision=PRECISION)
    if HAS_INITIAL:
        store_state(d_initial_state, b_ds, i_state, o_k, o_v, K, V)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem = call.sizes.problem
    block_v = int(call.config["block_v"])
    call.launch(
        gdn_state_gradient_kernel,
        (call.sizes.segments * problem.num_heads * triton.cdiv(problem.value_dim, block_v),),
        dict(
            **common.streams(tensors, "q", "k", "beta"),
            **common.row_arguments(call, tensors),
            **common.state_gradient_arguments(call, tensors),
            **{
                name: tensors[name]
                for name in ("do", "A", "k_scale", "q_scale", "g_cumsum", "dh", "dv_new", "dv_rows")
            },
            V=problem.value_dim,
            BK=key_tile(problem),
            BV=block_v,
        ),
        num_warps=int(call.config["num_warps"]),
        num_stages=int(call.config["num_stages"]),
    )


TEMPLATE = Template("triton", "gdn_state_gradient", "state_gradient", ("gdn",), SPACE, run, (__name__, common.MODULE))
