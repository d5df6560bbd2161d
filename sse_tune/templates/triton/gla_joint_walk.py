"""GLA's walk along a segment with the rows that its states give; one kernel for both passes.

With S the state on a chunk's near side, and x, z and y the rows of the chunk, (qg, kg, v) forwards and (kg, qg, dO)
backwards:

    O = x S + P y (backwards Pᵀ y)        S <- e^(b_C) S + zᵀ y

A block keeps block_v columns of one head's state in registers: states are written for a later stage, and none is read.
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
    key_tile,
    load_rows,
    load_state,
    store_rows,
    store_state,
    value_tile,
    walk_block,
)
from sse_tune.templates.triton.gla_walk import chunk_ahead

if TYPE_CHECKING:
    import torch

MODULE = "sse_tune.templates.triton.gla_joint_walk"
SOURCES = (MODULE, common.MODULE, gla_walk.MODULE)


def smem_bytes(problem: Problem, config: Config) -> int:
    """The rows and scores in flight, and the state as an operand."""
    c, bk, bv = int(config["chunk_size"]), key_tile(problem), int(config["block_v"])
    flight = int(config["num_stages"]) * (2 * c * bk + c * c + c * bv)
    return common.item_bytes(problem) * (flight + bk * bv) + 4096


SPACE = Space(
    params=(
        Param("block_v", (64, 128), 64, "columns of the state one block keeps"),
        Param("num_warps", (4, 8), 4, "warps per block"),
        Param("num_stages", (1, 2, 3), 3, "chunks in flight"),
    ),
    constraints=(
        common.tile_width("block_v", value_tile),
        # beyond 64 fp32 a thread the state and the product beside it spill
        Constraint("K * block_v / (32 * num_warps) <= 64",
                   lambda p, c, d: key_tile(p) * c["block_v"] <= 64 * 32 * c["num_warps"]),
        Constraint("the tiles in flight fit in shared memory",
                   lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
        common.FP32_ON_BLACKWELL,
    ),
)


@triton.jit
def gla_joint_walk_kernel(
    x, z, y, P, decay, perm, segment_rows, segment_chunks, segment_boundaries, at_boundaries, first_state, last_state,
    out, M, n_sequences,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PARTITIONS: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, KEEPS: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v, i_h, i_seg, first_row, n_left, first_boundary, i_state = walk_block(
        segment_rows, segment_boundaries, n_sequences, H, PARTITIONS, HAS_SHARED, NV
    )
    first_chunk = tl.load(segment_chunks + i_seg)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    o_c = tl.arange(0, C)

    b_state = tl.zeros((BK, BV), tl.float32)
    if HAS_FIRST:
        b_state = load_state(first_state, i_state, o_k, o_v, True, K, V)
    n_chunks = tl.cdiv(n_left, C)
    n_inner = n_chunks - 1  # what follows the last chunk is no boundary
    b_slot, b_decay = chunk_ahead(
        perm, decay, 0, n_inner, first_row, n_left, first_chunk, i_h, o_k, H, K, C, REVERSE
    )  # fmt: skip
    for i_step in range(n_chunks):
        i = n_inner - i_step if REVERSE else i_step
        m_row = o_c < n_left - i * C
        b_row = tl.cast(first_row + i * C, tl.int64) + o_c
        b_at = i_h.to(tl.int64) * M + b_row
        b_x = load_rows(x, b_at, m_row, o_k, K, BK)  # [C, BK]
        b_z = load_rows(z, b_at, m_row, o_k, K, BK)  # [C, BK]
        b_P = load_rows(P, b_at, m_row, o_c, C, C)  # [C, C]
        b_y = load_rows(y, (b_slot // L).to(tl.int64) * H + i_h, m_row, o_v, V, BV)  # [C, BV]
        b_low = b_state.to(b_x.dtype)
        b_scaled = b_state * b_decay[:, None]
        b_slot, b_decay = chunk_ahead(
            perm, decay, i_step + 1, n_inner, first_row, n_left, first_chunk, i_h, o_k, H, K, C, REVERSE
        )  # fmt: skip
        b_out = tl.dot(b_x, b_low, input_precision=PRECISION)
        b_out = tl.dot(tl.trans(b_P) if REVERSE else b_P, b_y, b_out, input_precision=PRECISION)
        store_rows(out, b_out, b_row * H + i_h, m_row, o_v, V, BV)
        b_state = tl.dot(tl.trans(b_z), b_y, b_scaled, input_precision=PRECISION)
        if KEEPS:
            i_boundary = tl.cast(first_boundary + i - (1 if REVERSE else 0), tl.int64)
            store_state(at_boundaries, b_state, i_boundary * H + i_h, o_k, o_v, i_step < n_inner, K, V)
    if HAS_LAST:
        store_state(last_state, b_state, i_state, o_k, o_v, True, K, V)


def run(
    call: Call, tensors: Mapping[str, torch.Tensor], rows: tuple[str, str, str], states: str, ends: tuple[str, str],
    out: str, *, reverse: bool,
) -> None:  # fmt: skip
    """Walks with the tensors of these names: `rows` x, z and y; `states` is written where a backward pass follows;
    `ends` are the state it starts from and the one it leaves."""
    x, z, y = rows
    keeps = call.sizes.problem.trains
    arguments = dict(
        **gla_walk.arguments(call, tensors, x, y, states if keeps else x, ends, reverse),  # x, never written
        **{name: tensors[name] for name in ("P", "decay", "segment_rows", "segment_chunks", "segment_boundaries")},
        z=tensors[z],
        out=tensors[out],
        KEEPS=keeps,
    )
    common.launch_walk(call, gla_joint_walk_kernel, arguments)
