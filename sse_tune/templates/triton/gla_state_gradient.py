"""GLA state gradient: the gradient of the state at each boundary, and that of v, walking each segment backwards.

With dS the gradient of the state after the chunk:

    dV = Pᵀ dO + (a K e^(b_C - b)) dS,   then   dS <- e^(b_C) dS + (c Q e^b)ᵀ dO

A block keeps block_v columns of one head's dS in registers; it starts from the gradient of the final state, and leaves
that of the initial one.
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
    load_rows,
    load_scalars,
    load_state,
    store_rows,
    store_state,
    walk_block,
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
def gla_state_gradient_kernel(
    q, k, g, do, shared_q, shared_k, shared_g, P, k_scale, q_scale, perm, weights, segment_rows,
    segment_boundaries, d_final_state, dh, dv_rows, d_initial_state, M, n_shared, n_sequences,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PARTITIONS: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v, i_h, i_seg, first_row, n_left, first_boundary, i_state = walk_block(
        segment_rows, segment_boundaries, n_sequences, H, PARTITIONS, HAS_SHARED, NV
    )
    p_q = tl.where(i_seg < n_shared, shared_q, q)
    p_k = tl.where(i_seg < n_shared, shared_k, k)
    p_g = tl.where(i_seg < n_shared, shared_g, g)
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)

    b_ds = tl.zeros((BK, BV), tl.float32)
    if HAS_FINAL:
        b_ds = load_state(d_final_state, i_state, o_k, o_v, True, K, V)
    n_chunks = tl.cdiv(n_left, C)
    for i_back in range(n_chunks):
        i = n_chunks - 1 - i_back
        n_rows = tl.minimum(n_left - i * C, C)
        b_row, b_slot, b_token, b_lane, m_row = chunk_rows(perm, first_row + i * C, n_rows, C, L)
        b_head = b_token * H + i_h
        b_at = i_h.to(tl.int64) * M + b_row
        b_q = load_rows(p_q, b_head, m_row, o_k, K, BK)  # [C, BK]
        b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)  # [C, BK]
        b_do = load_rows(do, b_head, m_row, o_v, V, BV)  # [C, BV]
        m_write = m_row & (b_lane < WRITERS)
        b_b, b_rest, b_end = walk_gates(p_g, b_head, m_write, o_k, C, K, BK, EXACT)
        b_a = load_scalars(k_scale, b_at, m_row)
        b_c = load_scalars(q_scale, b_at, m_row)
        b_P = load_rows(P, b_at, m_row, o_c, C, C)  # [C, C]
        b_qe = (b_q * (b_c[:, None] * tl.exp(b_b))).to(b_q.dtype)
        b_ke = (b_k * (b_a[:, None] * tl.exp(b_rest))).to(b_k.dtype)

        b_dv = tl.dot(b_ke, b_ds.to(b_k.dtype), input_precision=PRECISION)
        b_dv += tl.dot(tl.trans(b_P), b_do, input_precision=PRECISION)
        store_rows(dv_rows, b_dv, b_row * H + i_h, m_row, o_v, V, BV)
        b_ds *= tl.exp(b_end)[:, None]
        b_ds += tl.dot(tl.trans(b_qe), b_do, input_precision=PRECISION)
        store_state(dh, b_ds, tl.cast(first_boundary + i - 1, tl.int64) * H + i_h, o_k, o_v, i > 0, K, V)
    if HAS_INITIAL:
        store_state(d_initial_state, b_ds, i_state, o_k, o_v, True, K, V)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    arguments = dict(
        **common.streams(tensors, "q", "k", "g"),
        **common.row_arguments(call, tensors),
        **common.segment_arguments(call, tensors),
        **common.end_states(tensors, "d_initial_state", "d_final_state"),
        **{name: tensors[name] for name in ("do", "P", "k_scale", "q_scale", "dh", "dv_rows")},
        EXACT=call.sizes.problem.dtype == "fp32",
    )
    common.launch_walk(call, gla_state_gradient_kernel, arguments)


TEMPLATE = Template(
    "triton", "gla_state_gradient", "state_gradient", ("gla",), SPACE, run,
    (__name__, common.MODULE, gla_common.MODULE),
)  # fmt: skip
