"""GDN group states: the state between two groups of a segment, the groups side by side (gdn_groups).

The walk of `gdn_recompute`, which stores nothing on its way, over the columns of V and those of T beside them: T is
what the walk makes of the identity where the values are zero, and its columns mix as little as those of V. A segment's
first group starts from its initial state and has no T. Then the carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.space import Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import common, gdn_groups
from sse_tune.templates.triton.common import (
    chunk_slots,
    key_tile,
    load_gate_sums,
    load_rows,
    load_scalars,
    load_state,
    rows_of,
    store_state,
)
from sse_tune.templates.triton.gdn_groups import group_in_window, group_place

if TYPE_CHECKING:
    import torch

SPACE = Space(
    params=(
        Param("block_v", (32, 64, 128), 64, "columns of V or T one block keeps"),
        Param("num_warps", (2, 4, 8), 4, "warps per block"),
        Param("num_stages", (1, 2, 3), 3, "chunks in flight"),
    ),
    constraints=gdn_groups.constraints(row_tiles=1),
)


@triton.jit
def gdn_group_states_kernel(
    k, v, shared_k, Ag, k_scale, g_cumsum, perm, weights, segment_rows, segment_boundaries, chunk_table, initial_state,
    final_state, group_h, transitions, M, n_shared, n_segments, n_sequences, n_all_chunks,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PARTITIONS: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, SPLIT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    TILES: tl.constexpr = NV + (K + BV - 1) // BV
    i_tile = tl.program_id(0) % TILES
    i_h = (tl.program_id(0) // TILES) % H
    i_seg, i_chunk = group_in_window(
        chunk_table, segment_boundaries, tl.program_id(0) // (TILES * H), n_all_chunks, SPLIT, True
    )
    is_T = i_tile >= NV
    if (i_seg < 0) | (is_T & (i_chunk == 0)):
        return
    first_row, _, _, i_state, _, i_after = group_place(
        segment_rows, segment_boundaries, i_seg, i_chunk, n_sequences, H, C, PARTITIONS, HAS_SHARED, SPLIT
    )
    p_k = tl.where(i_seg < n_shared, shared_k, k)
    o_k = tl.arange(0, BK)
    o_c = tl.arange(0, C)
    o_v = (i_tile - (NV if is_T else 0)) * BV + tl.arange(0, BV)

    b_state = tl.where(is_T & (o_k[:, None] == o_v[None, :]), 1.0, 0.0)
    if HAS_INITIAL:
        b_state += load_state(initial_state, i_state + i_h, o_k, o_v, i_chunk == 0, K, V)
    b_slot = chunk_slots(perm, first_row, C, C)
    for i in range(0, SPLIT):  # a group that another one follows has no chunk that is not full
        b_row, b_token, b_lane, m_row = rows_of(b_slot, first_row + i * C, C, C, L)
        b_slot = chunk_slots(perm, first_row + (i + 1) * C, tl.where(i + 1 < SPLIT, C, 0), C)
        b_head = b_token * H + i_h
        b_at = i_h.to(tl.int64) * M + b_row
        b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)
        b_v = load_rows(v, b_head, m_row & (i_tile < NV), o_v, V, BV)
        b_a = load_scalars(k_scale, b_at, m_row)
        b_b, b_last = load_gate_sums(g_cumsum, b_at, m_row, C, C)
        b_Ag = load_rows(Ag, b_at, m_row, o_c, C, C)

        b_low = b_state.to(b_k.dtype)
        b_kept = (tl.exp(b_b.to(tl.float32)) * b_a)[:, None] * tl.dot(b_k, b_low, input_precision=PRECISION)
        b_W = (b_v.to(tl.float32) - b_kept).to(b_k.dtype)
        b_new = tl.dot(b_Ag, b_W, input_precision=PRECISION)
        b_in = (b_new * (b_a * tl.exp((b_last - b_b).to(tl.float32)))[:, None]).to(b_k.dtype)
        b_state = tl.exp(b_last.to(tl.float32)) * b_state + tl.dot(tl.trans(b_k), b_in, input_precision=PRECISION)
    i_slot = i_after.to(tl.int64) * H + i_h
    store_state(group_h, b_state, i_slot, o_k, o_v, i_tile < NV, K, V)
    store_state(transitions, b_state, i_slot, o_k, o_v, is_T, K, K)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem, block_v = call.sizes.problem, int(call.config["block_v"])
    tiles = triton.cdiv(problem.value_dim, block_v) + triton.cdiv(problem.key_dim, block_v)
    call.launch(
        gdn_group_states_kernel,
        (call.sizes.windows * problem.num_heads * tiles,),
        dict(
            **common.streams(tensors, "k"),
            **common.row_arguments(call, tensors),
            **common.segment_arguments(call, tensors),
            **common.end_states(tensors, "initial_state", "final_state"),
            **gdn_groups.arguments(call, tensors),
            **{name: tensors[name] for name in ("v", "Ag", "k_scale", "g_cumsum", "group_h", "transitions")},
            V=problem.value_dim,
            BK=key_tile(problem),
            BV=block_v,
        ),
        num_warps=int(call.config["num_warps"]),
        num_stages=int(call.config["num_stages"]),
    )
    gdn_groups.launch_carry(call, tensors, "group_h", reverse=False)


TEMPLATE = Template(
    "triton", "gdn_group_states", "group_states", ("gdn",), SPACE, run, (__name__, common.MODULE, gdn_groups.MODULE)
)
