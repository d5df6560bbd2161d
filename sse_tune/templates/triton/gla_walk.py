"""GLA's walk along a segment: the state at each boundary, or backwards its gradient; one kernel for both.

With x and y the rows of a chunk, (kg, v) forwards and (qg, dO) backwards:

    S <- e^(b_C) S + xᵀ y

A block keeps a tile of one head's state in registers: rows and columns of a state do not meet, so both can be cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.registry import Call
from sse_tune.templates.triton import common
from sse_tune.templates.triton.common import key_tile, load_rows, load_state, store_state, value_tile, walk_block

if TYPE_CHECKING:
    import torch

MODULE = "sse_tune.templates.triton.gla_walk"


def smem_bytes(problem: Problem, config: Config) -> int:
    """The rows in flight, and the state on its way to the layout it is stored in."""
    c, bk, bv = int(config["chunk_size"]), int(config["block_k"]), int(config["block_v"])
    return int(config["num_stages"]) * common.item_bytes(problem) * c * (bk + bv) + 4 * bk * bv + 4096


SPACE = Space(
    params=(
        Param("block_k", (64, 128), 64, "rows of the state one block keeps"),
        Param("block_v", (64, 128), 64, "columns of the state one block keeps"),
        Param("num_warps", (4, 8), 4, "warps per block"),
        Param("num_stages", (1, 2, 3, 4), 3, "chunks in flight"),
    ),
    constraints=(
        common.tile_width("block_k", key_tile),
        common.tile_width("block_v", value_tile),
        # beyond 128 fp32 a thread the state alone spills
        Constraint("block_k * block_v / (32 * num_warps) <= 64",
                   lambda p, c, d: c["block_k"] * c["block_v"] <= 64 * 32 * c["num_warps"]),
        Constraint("the tiles in flight fit in shared memory",
                   lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
        common.FP32_ON_BLACKWELL,
    ),
)


@triton.jit
def chunk_ahead(
    perm, decay, i_step, n_inner, first_row, n_left, first_chunk, i_h, o_k,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Slots and decay of the chunk of a step, or of none, carried from the step before. In one step with the loads that
    need them, slots are copied asynchronously and waited for with all copies issued before: nothing stays in flight."""
    i = n_inner - i_step if REVERSE else i_step
    o_c = tl.arange(0, C)
    m_chunk = i_step <= n_inner
    b_slot = tl.load(
        perm + tl.cast(first_row + i * C, tl.int64) + o_c, mask=m_chunk & (o_c < n_left - i * C), other=0
    )
    p_decay = decay + (tl.cast(first_chunk + i, tl.int64) * H + i_h) * K
    return b_slot, tl.load(p_decay + o_k, mask=m_chunk & (o_k < K), other=0.0)


@triton.jit
def gla_walk_kernel(
    x, y, decay, perm, segment_rows, segment_chunks, segment_boundaries, at_boundaries, first_state, last_state, M,
    n_sequences,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PARTITIONS: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    i_tile, i_h, i_seg, first_row, n_left, first_boundary, i_state = walk_block(
        segment_rows, segment_boundaries, n_sequences, H, PARTITIONS, HAS_SHARED, NK * NV
    )
    first_chunk = tl.load(segment_chunks + i_seg)
    o_k = (i_tile // NV) * BK + tl.arange(0, BK)
    o_v = (i_tile % NV) * BV + tl.arange(0, BV)
    o_c = tl.arange(0, C)

    b_state = tl.zeros((BK, BV), tl.float32)
    if HAS_FIRST:
        b_state = load_state(first_state, i_state, o_k, o_v, True, K, V)
    n_chunks = tl.cdiv(n_left, C)
    n_inner = n_chunks - 1  # what follows the last chunk is no boundary
    b_slot, b_decay = chunk_ahead(
        perm, decay, 0, n_inner, first_row, n_left, first_chunk, i_h, o_k, H, K, C, REVERSE
    )  # fmt: skip
    for i_step in range(n_chunks if HAS_LAST else n_inner):
        i = n_inner - i_step if REVERSE else i_step
        m_row = o_c < n_left - i * C
        b_row = tl.cast(first_row + i * C, tl.int64) + o_c
        b_x = load_rows(x, i_h.to(tl.int64) * M + b_row, m_row, o_k, K, BK)  # [C, BK]
        b_y = load_rows(y, (b_slot // L).to(tl.int64) * H + i_h, m_row, o_v, V, BV)  # [C, BV]
        b_scaled = b_state * b_decay[:, None]
        b_slot, b_decay = chunk_ahead(
            perm, decay, i_step + 1, n_inner, first_row, n_left, first_chunk, i_h, o_k, H, K, C, REVERSE
        )  # fmt: skip
        b_state = tl.dot(tl.trans(b_x), b_y, b_scaled, input_precision=PRECISION)
        i_boundary = first_boundary + i - (1 if REVERSE else 0)
        store_state(
            at_boundaries, b_state, tl.cast(i_boundary, tl.int64) * H + i_h, o_k, o_v, i_step < n_inner, K, V
        )
    if HAS_LAST:
        store_state(last_state, b_state, i_state, o_k, o_v, True, K, V)


def run(
    call: Call, tensors: Mapping[str, torch.Tensor], x: str, y: str, states: str, ends: tuple[str, str], reverse: bool
) -> None:
    """Walks with the tensors of these names; `ends`: those of the state it starts from and of the one it leaves."""
    problem = call.sizes.problem
    block_k, block_v = int(call.config["block_k"]), int(call.config["block_v"])
    tiles = triton.cdiv(problem.key_dim, block_k) * triton.cdiv(problem.value_dim, block_v)
    call.launch(
        gla_walk_kernel,
        (call.sizes.segments * problem.num_heads * tiles,),
        dict(
            **arguments(call, tensors, x, y, states, ends, reverse),
            segment_rows=tensors["segment_rows"],
            segment_chunks=tensors["segment_chunks"],
            segment_boundaries=tensors["segment_boundaries"],
            decay=tensors["decay"],
            BK=block_k,
            BV=block_v,
        ),
        num_warps=int(call.config["num_warps"]),
        num_stages=int(call.config["num_stages"]),
    )


def arguments(
    call: Call, tensors: Mapping[str, torch.Tensor], x: str, y: str, states: str, ends: tuple[str, str], reverse: bool
) -> dict[str, object]:
    """What all kernels take that add xᵀy to states."""
    problem = call.sizes.problem
    stand_in = tensors["perm"]  # never read: a pointer must be some tensor's
    return dict(
        x=tensors[x],
        y=tensors[y],
        perm=tensors["perm"],
        at_boundaries=tensors[states],
        first_state=tensors.get(ends[0], stand_in),
        last_state=tensors.get(ends[1], stand_in),
        M=call.sizes.rows,
        n_sequences=problem.sequences,
        H=problem.num_heads,
        K=problem.key_dim,
        V=problem.value_dim,
        C=call.sizes.chunk_size,
        L=problem.lanes,
        PARTITIONS=problem.partitions,
        HAS_SHARED=problem.shared,
        HAS_FIRST=ends[0] in tensors,
        HAS_LAST=ends[1] in tensors,
        REVERSE=reverse,
        PRECISION=common.dot_precision(problem),
    )
