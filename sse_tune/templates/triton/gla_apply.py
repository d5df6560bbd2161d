"""GLA's rows from a state: the output of a chunk, and the gradient of its values; one kernel for both.

With x the decayed rows, S the state on their side of the chunk, and y the values of the other rows:

    O = qg S + P V,  S before the chunk            dV = kg dS + Pᵀ dO,  dS after it

One block per chunk, head and block_v columns; it walks over K.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.device import Device
from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.registry import Call
from sse_tune.templates.triton import common
from sse_tune.templates.triton.common import (
    chunk_entry,
    key_tile,
    load_rows,
    state_beside,
    state_index,
    store_rows,
    value_tile,
)

if TYPE_CHECKING:
    import torch

MODULE = "sse_tune.templates.triton.gla_apply"


def smem_bytes(problem: Problem, config: Config, device: Device) -> int:
    """Rows and a state in flight, with the call's own state in fp32 or the scores and values; the result on its
    way to the layout of its store."""
    c, bk, bv = int(config["chunk_size"]), int(config["block_k"]), int(config["block_v"])
    item = common.item_bytes(problem)
    state = 4 if config["state_dtype"] == "fp32" else item
    # with tensor memory a product is waited for a step later, and its tiles with it
    stages = int(config["num_stages"]) + (device.capability >= 100)
    flight = stages * state * (c * bk + bk * bv)
    return max(flight + max(4 * bk * bv, item * (c * c + c * bv)), 4 * c * bv) + 9216


SPACE = Space(
    params=(
        Param("block_k", (64, 128), 64, "columns of K at a time"),
        Param("block_v", (64, 128), 128, "columns of V in one block"),
        Param("num_warps", (4, 8), 4, "warps per block"),
        Param("num_stages", (1, 2, 3), 2, "tiles of K in flight"),
    ),
    constraints=(
        common.tile_width("block_k", key_tile),
        common.tile_width("block_v", value_tile),
        Constraint("num_stages = 1 when one block covers K",
                   lambda p, c, d: c["num_stages"] == 1 or c["block_k"] < key_tile(p)),
        Constraint("chunk_size * block_v / (32 * num_warps) <= 64",
                   lambda p, c, d: c["chunk_size"] * c["block_v"] <= 64 * 32 * c["num_warps"]),
        Constraint("the tiles fit in shared memory",
                   lambda p, c, d: smem_bytes(p, c, d) <= d.smem_per_block_bytes),
    ),
)


@triton.jit
def gla_apply_kernel(
    x, y, P, states, end_state, out, perm, chunk_table, M, n_sequences,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PARTITIONS: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_END: tl.constexpr, AFTER: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    i_h = (tl.program_id(0) // NV) % H
    i_seg, first_row, n_rows, i_before, i_after = chunk_entry(chunk_table, tl.program_id(0) // (NV * H))
    if i_seg < 0:
        return
    i_boundary = i_after if AFTER else i_before
    i_state = state_index(i_seg, n_sequences, PARTITIONS, HAS_SHARED).to(tl.int64) * H + i_h
    o_v = (tl.program_id(0) % NV) * BV + tl.arange(0, BV)
    o_c = tl.arange(0, C)
    m_row = o_c < n_rows
    b_row = tl.cast(first_row, tl.int64) + o_c
    b_at = i_h.to(tl.int64) * M + b_row
    b_token = (tl.load(perm + b_row, mask=m_row, other=0) // L).to(tl.int64)

    b_out = tl.zeros((C, BV), tl.float32)
    for i_k in range((K + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_x = load_rows(x, b_at, m_row, o_k, K, BK)  # [C, BK]
        b_s = state_beside(states, end_state, i_boundary, i_state, i_h, o_k, o_v, H, K, V, HAS_END)  # [BK, BV]
        b_out = tl.dot(b_x.to(b_s.dtype), b_s, b_out, input_precision=PRECISION)
    b_P = load_rows(P, b_at, m_row, o_c, C, C)  # [C, C]
    b_y = load_rows(y, b_token * H + i_h, m_row, o_v, V, BV)  # [C, BV]
    if AFTER:
        b_P = tl.trans(b_P)
    b_out = tl.dot(b_P, b_y, b_out, input_precision=PRECISION)
    store_rows(out, b_out, b_row * H + i_h, m_row, o_v, V, BV)


def run(
    call: Call, tensors: Mapping[str, torch.Tensor], x: str, y: str, states: str, end: str, out: str, *, after: bool
) -> None:
    """Runs with the tensors of these names; `end`: the call's state at the segment's end, if it has one."""
    problem = call.sizes.problem
    block_v = int(call.config["block_v"])
    call.launch(
        gla_apply_kernel,
        (call.sizes.chunks * problem.num_heads * triton.cdiv(problem.value_dim, block_v),),
        dict(
            x=tensors[x],
            y=tensors[y],
            P=tensors["P"],
            states=tensors[states],
            end_state=tensors.get(end, tensors["perm"]),  # never read where there is none
            out=tensors[out],
            perm=tensors["perm"],
            chunk_table=tensors["chunk_table"],
            M=call.sizes.rows,
            n_sequences=problem.sequences,
            H=problem.num_heads,
            K=problem.key_dim,
            V=problem.value_dim,
            C=call.sizes.chunk_size,
            L=problem.lanes,
            PARTITIONS=problem.partitions,
            HAS_SHARED=problem.shared,
            HAS_END=end in tensors,
            AFTER=after,
            PRECISION=common.dot_precision(problem),
            BK=int(call.config["block_k"]),
            BV=block_v,
        ),
        num_warps=int(call.config["num_warps"]),
        num_stages=int(call.config["num_stages"]),
    )
