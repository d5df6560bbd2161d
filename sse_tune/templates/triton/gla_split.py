"""GLA's states without a walk: what every chunk adds, all at once, then one pass of sums along each segment.

The walk of gla_walk keeps as many blocks busy as there are heads, segments and tiles of a state, one chunk after the
other; with few heads and long sequences that leaves a GPU idle. Here the products xᵀy of all chunks are made side by
side, each in the place of the state it leads to, and the second kernel turns them into the states:

    S <- e^(b_C) S + (xᵀy)

Exact, as the decay is diagonal. It reads and writes the states once more, in their stored dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.registry import Call
from sse_tune.templates.triton import common, gla_walk
from sse_tune.templates.triton.common import (
    chunk_entry,
    key_tile,
    load_rows,
    load_state,
    state_index,
    store_state,
    value_tile,
    walk_block,
)

if TYPE_CHECKING:
    import torch

MODULE = "sse_tune.templates.triton.gla_split"

SUM_ELEMENTS = 2048  # of a state, in one block of the second kernel
SUM_WARPS = 4


def smem_bytes(problem: Problem, config: Config) -> int:
    """The rows of a chunk, and the product on its way to the layout it is stored in; or the tiles in flight."""
    c, bk, bv = int(config["chunk_size"]), int(config["block_k"]), int(config["block_v"])
    product = common.item_bytes(problem) * c * (bk + bv) + 4 * bk * bv
    return max(product, 4 * int(config["num_stages"]) * (SUM_ELEMENTS + value_tile(problem))) + 4096


SPACE = Space(
    params=(
        Param("block_k", (64, 128), 64, "rows of a state in one block"),
        Param("block_v", (64, 128), 128, "columns of a state in one block"),
        Param("num_warps", (4, 8), 4, "warps per block"),
        Param("num_stages", (1, 2, 4, 8), 4, "states of the sums in flight"),
    ),
    constraints=(
        common.tile_width("block_k", key_tile),
        common.tile_width("block_v", value_tile),
        Constraint("block_k * block_v / (32 * num_warps) <= 128",
                   lambda p, c, d: c["block_k"] * c["block_v"] <= 128 * 32 * c["num_warps"]),
        Constraint("the tiles fit in shared memory",
                   lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
        common.FP32_ON_BLACKWELL,
    ),
)


@triton.jit
def gla_split_kernel(
    x, y, perm, chunk_table, at_boundaries, last_state, M, n_sequences,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PARTITIONS: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_LAST: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    i_tile = tl.program_id(0) % (NK * NV)
    i_h = (tl.program_id(0) // (NK * NV)) % H
    i_seg, first_row, n_rows, i_before, i_after = chunk_entry(chunk_table, tl.program_id(0) // (NK * NV * H))
    i_boundary = i_before if REVERSE else i_after
    is_wanted = i_seg >= 0
    if not HAS_LAST:
        is_wanted = is_wanted & (i_boundary >= 0)
    if not is_wanted:
        return
    o_k = (i_tile // NV) * BK + tl.arange(0, BK)
    o_v = (i_tile % NV) * BV + tl.arange(0, BV)
    o_c = tl.arange(0, C)
    m_row = o_c < n_rows
    b_row = tl.cast(first_row, tl.int64) + o_c
    b_token = (tl.load(perm + b_row, mask=m_row, other=0) // L).to(tl.int64)
    b_x = load_rows(x, i_h.to(tl.int64) * M + b_row, m_row, o_k, K, BK)  # [C, BK]
    b_y = load_rows(y, b_token * H + i_h, m_row, o_v, V, BV)  # [C, BV]
    b_product = tl.dot(tl.trans(b_x), b_y, input_precision=PRECISION)
    store_state(at_boundaries, b_product, i_boundary.to(tl.int64) * H + i_h, o_k, o_v, i_boundary >= 0, K, V)
    if HAS_LAST:
        i_state = state_index(i_seg, n_sequences, PARTITIONS, HAS_SHARED).to(tl.int64) * H + i_h
        store_state(last_state, b_product, i_state, o_k, o_v, i_boundary < 0, K, V)


@triton.jit
def gla_sums_kernel(
    decay, segment_rows, segment_chunks, segment_boundaries, at_boundaries, first_state, last_state, n_sequences,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, PARTITIONS: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, REVERSE: tl.constexpr,
    BR: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block sums BR rows of one head's state along a segment."""
    i_k, i_h, i_seg, _, n_left, first_boundary, i_state = walk_block(
        segment_rows, segment_boundaries, n_sequences, H, PARTITIONS, HAS_SHARED, (K + BR - 1) // BR
    )
    first_chunk = tl.load(segment_chunks + i_seg)
    o_k = i_k * BR + tl.arange(0, BR)
    o_v = tl.arange(0, BV)
    b_state = tl.zeros((BR, BV), tl.float32)
    if HAS_FIRST:
        b_state = load_state(first_state, i_state, o_k, o_v, True, K, V)
    n_inner = tl.cdiv(n_left, C) - 1
    for i_step in tl.range(n_inner, num_stages=STAGES):
        i = n_inner - i_step if REVERSE else i_step
        p_decay = decay + (tl.cast(first_chunk + i, tl.int64) * H + i_h) * K
        b_decay = tl.load(p_decay + o_k, mask=o_k < K, other=0.0)
        i_boundary = tl.cast(first_boundary + i - (1 if REVERSE else 0), tl.int64) * H + i_h
        b_added = load_state(at_boundaries, i_boundary, o_k, o_v, True, K, V).to(tl.float32)
        b_state = b_state * b_decay[:, None] + b_added
        store_state(at_boundaries, b_state, i_boundary, o_k, o_v, True, K, V)
    if HAS_LAST:
        if n_inner >= 0:
            i_last = 0 if REVERSE else n_inner
            p_decay = decay + (tl.cast(first_chunk + i_last, tl.int64) * H + i_h) * K
            b_decay = tl.load(p_decay + o_k, mask=o_k < K, other=0.0)
            b_state = b_state * b_decay[:, None] + load_state(last_state, i_state, o_k, o_v, True, K, V)
        store_state(last_state, b_state, i_state, o_k, o_v, True, K, V)


def run(
    call: Call, tensors: Mapping[str, torch.Tensor], x: str, y: str, states: str, ends: tuple[str, str], reverse: bool
) -> None:
    """The states from the tensors of these names; `ends`: those of the state before all chunks and of that after."""
    problem = call.sizes.problem
    block_k, block_v = int(call.config["block_k"]), int(call.config["block_v"])
    tiles = triton.cdiv(problem.key_dim, block_k) * triton.cdiv(problem.value_dim, block_v)
    taken = gla_walk.arguments(call, tensors, x, y, states, ends, reverse)
    call.launch(
        gla_split_kernel,
        (call.sizes.chunks * problem.num_heads * tiles,),
        dict(
            **{name: value for name, value in taken.items() if name not in ("first_state", "HAS_FIRST")},
            chunk_table=tensors["chunk_table"],
            BK=block_k,
            BV=block_v,
        ),
        num_warps=int(call.config["num_warps"]),
        num_stages=1,
    )
    rows = max(1, SUM_ELEMENTS // value_tile(problem))
    products = ("x", "y", "perm", "M", "L", "PRECISION")
    call.launch(
        gla_sums_kernel,
        (call.sizes.segments * problem.num_heads * triton.cdiv(problem.key_dim, rows),),
        dict(
            **{name: value for name, value in taken.items() if name not in products},
            segment_rows=tensors["segment_rows"],
            segment_chunks=tensors["segment_chunks"],
            segment_boundaries=tensors["segment_boundaries"],
            decay=tensors["decay"],
            BR=rows,
            BV=value_tile(problem),
            STAGES=int(call.config["num_stages"]),
        ),
        num_warps=SUM_WARPS,
        num_stages=int(call.config["num_stages"]),
    )
