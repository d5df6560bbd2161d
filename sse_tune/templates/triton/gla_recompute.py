"""GLA recompute: the state before every chunk, which the forward pass does not keep.

    h_c = S,   then   S <- e^(b_C) S + (a K e^(b_C - b))ᵀ V

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
from sse_tune.templates.triton.common import chunk_rows, key_tile, load_rows, load_state, state_index, store_state
from sse_tune.templates.triton.gla_common import walk_gates

if TYPE_CHECKING:
    import torch

SPACE = Space(
    params=(
        Param("block_v", (32, 64, 128), 64, "columns of the state one block keeps"),
        Param("num_warps", (2, 4, 8), 8, "warps per block"),
        Param("num_stages", (1, 2, 3), 2, "chunks in flight"),
    ),
    constraints=gla_common.walk_constraints(key_tiles=1),
)


@triton.jit
def gla_recompute_kernel(
    k, v, g, shared_k, shared_g, k_scale, perm, segment_chunks, initial_state, h, n_shared, n_sequences,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
    WRITERS: tl.constexpr, PRECISION: tl.constexpr, HAS_SHARED: tl.constexpr, HAS_INITIAL: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = (tl.program_id(0) // NV) % H
    i_seg = tl.program_id(0) // (NV * H)
    p_k = tl.where(i_seg < n_shared, shared_k, k)
    p_g = tl.where(i_seg < n_shared, shared_g, g)
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)

    b_state = tl.zeros((BK, BV), tl.float32)
    if HAS_INITIAL:
        i_state = state_index(i_seg, n_sequences, P, HAS_SHARED).to(tl.int64) * H + i_h
        b_state = load_state(initial_state, i_state, o_k, o_v, K, V)
    i_first = tl.load(segment_chunks + i_seg)
    for i in range(tl.load(segment_chunks + i_seg + 1) - i_first):
        i_c = i_first + i
        b_slot, b_token, b_lane, m_row = chunk_rows(perm, i_c, C, L)
        b_head = b_token * H + i_h
        i_ch = i_c.to(tl.int64) * H + i_h
        store_state(h, b_state, i_ch, o_k, o_v, K, V)
        b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)  # [C, BK]
        b_v = load_rows(v, b_head, m_row, o_v, V, BV)  # [C, BV]
        m_write = m_row & (b_lane < WRITERS)
        _, b_rest, b_end = walk_gates(p_g, b_head, m_write, o_k, C, K, BK, EXACT)
        b_a = tl.load(k_scale + i_ch * C + o_c)
        b_ke = (b_k * (b_a[:, None] * tl.exp(b_rest))).to(b_k.dtype)
        b_state *= tl.exp(b_end)[:, None]
        b_state += tl.dot(tl.trans(b_ke), b_v, input_precision=PRECISION)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem = call.sizes.problem
    block_v = int(call.config["block_v"])
    blocks = triton.cdiv(problem.value_dim, block_v)
    rows, states = common.row_arguments(call, tensors), common.state_arguments(call, tensors)
    call.launch(
        gla_recompute_kernel,
        (call.sizes.segments * problem.num_heads * blocks,),
        dict(
            **common.streams(tensors, "k", "g"),
            **{name: rows[name] for name in ("perm", "n_shared", "H", "K", "C", "L", "WRITERS", "PRECISION")},
            **{name: states[name] for name in
               ("segment_chunks", "initial_state", "n_sequences", "P", "HAS_SHARED", "HAS_INITIAL")},
            **{name: tensors[name] for name in ("v", "k_scale", "h")},
            V=problem.value_dim,
            BK=key_tile(problem),
            BV=block_v,
            EXACT=problem.dtype == "fp32",
        ),
        num_warps=int(call.config["num_warps"]),
        num_stages=int(call.config["num_stages"]),
    )


TEMPLATE = Template(
    "triton", "gla_recompute", "recompute", ("gla",), SPACE, run, (__name__, common.MODULE, gla_common.MODULE)
)
