"""GDN's segments in groups of `split` chunks, side by side: which group a block walks, and the states between groups.

What a chunk makes of the state is affine, and so is what a group makes of it, exactly:

    S_after = T S_before + S_local       T = Π (e^(b_C) I - Kᵀ diag(a e^(b_C - b)) Ag diag(a e^b) K)

with S_local what the group leaves where S_before is zero. Once both are there, a block goes from group to group with
one product each (`launch_carry`), in fp32 accuracy, and all groups can be walked at once. Backwards dS_before = Tᵀ
dS_after + dS_local. A segment's first group starts from the call's own state and its last one ends with it, so neither
needs a T, and segments of up to two groups no product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from sse_tune.problem import Problem
from sse_tune.space import Constraint
from sse_tune.templates.registry import Call
from sse_tune.templates.triton import common
from sse_tune.templates.triton.common import dot_fp32, key_tile, load_state, state_index, store_state, walk_block

if TYPE_CHECKING:
    import torch

MODULE = "sse_tune.templates.triton.gdn_groups"

CARRY_COLUMNS = 64  # of V, in one block of the carry
CARRY_WARPS = 8


def carry_smem_bytes(problem: Problem) -> int:
    """The halves of a transition and of the state, and the state on its way to the layout it is stored in."""
    bk = key_tile(problem)
    return 4 * bk * bk + 4 * bk * CARRY_COLUMNS + 4096


CARRY_FITS = Constraint(
    "the transitions fit in shared memory", lambda p, c, d: carry_smem_bytes(p) <= d.smem_per_block_bytes
)


@triton.jit
def group_in_window(chunk_table, segment_boundaries, i_window, n_all_chunks, SPLIT: tl.constexpr, BY_END: tl.constexpr):
    """Segment and first chunk, counted within it, of the group that starts in a window of the chunk table, first groups
    of segments left aside; or of the one that ends there, last groups aside. Segment -1: there is none."""
    o_chunk = i_window * SPLIT + tl.arange(0, SPLIT)
    p_entry = chunk_table + o_chunk.to(tl.int64) * 5
    b_seg = tl.load(p_entry, mask=(i_window >= 0) & (o_chunk < n_all_chunks), other=-1)
    b_boundary = tl.load(p_entry + (4 if BY_END else 3), mask=b_seg >= 0, other=-1)
    m_inner = b_boundary >= 0
    b_number = b_boundary + 1 - tl.load(segment_boundaries + b_seg, mask=m_inner, other=0)  # of the chunk behind it
    m_group = m_inner & (b_number % SPLIT == 0)
    i_seg = tl.max(tl.where(m_group, b_seg, -1), 0)
    return i_seg, tl.sum(tl.where(m_group, b_number, 0), 0) - (SPLIT if BY_END else 0)


@triton.jit
def group_place(
    segment_rows, segment_boundaries, i_seg, i_chunk, n_sequences,
    H: tl.constexpr, C: tl.constexpr, PARTITIONS: tl.constexpr, HAS_SHARED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Of a group: its first row, its rows, its first boundary, the number of the segment's end states for head 0, and
    the slots before and after it, -1 at an end of the segment."""
    first_row = tl.load(segment_rows + i_seg) + i_chunk * C
    n_left = tl.load(segment_rows + i_seg + 1) - first_row
    first_boundary = tl.load(segment_boundaries + i_seg) + i_chunk
    i_before = tl.where(i_chunk > 0, (first_boundary - 1) // SPLIT, -1)
    i_after = tl.where(n_left > SPLIT * C, (first_boundary + SPLIT - 1) // SPLIT, -1)
    i_state = state_index(i_seg, n_sequences, PARTITIONS, HAS_SHARED).to(tl.int64) * H
    return first_row, tl.minimum(n_left, SPLIT * C), first_boundary, i_state, i_before, i_after


@triton.jit
def walk_part(
    segment_rows, segment_boundaries, chunk_table, n_segments, n_sequences, n_all_chunks,
    H: tl.constexpr, C: tl.constexpr, PARTITIONS: tl.constexpr, HAS_SHARED: tl.constexpr, NV: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """What a block of `launch_walk` is: its tile of V, head, segment and first chunk; the first row, the rows and the
    first boundary of what it walks; where the segment's end states lie; and the slots before and after, -1 at its ends.
    A block that has nothing to walk gets no rows and no ends."""
    if SPLIT == 0:
        i_v, i_h, i_seg, first_row, n_rows, first_boundary, i_state = walk_block(
            segment_rows, segment_boundaries, n_sequences, H, PARTITIONS, HAS_SHARED, NV
        )
        return i_v, i_h, i_seg, 0, first_row, n_rows, first_boundary, i_state, -1, -1
    else:
        i_v = tl.program_id(0) % NV
        i_h = (tl.program_id(0) // NV) % H
        i_part = tl.program_id(0) // (NV * H)
        i_found, i_inner = group_in_window(
            chunk_table, segment_boundaries, i_part - n_segments, n_all_chunks, SPLIT, False
        )
        i_seg = tl.where(i_part < n_segments, i_part, i_found)
        is_there = i_seg >= 0
        i_seg = tl.where(is_there, i_seg, 0)
        i_chunk = tl.where(i_part < n_segments, 0, i_inner)
        first_row, n_rows, first_boundary, i_state, i_before, i_after = group_place(
            segment_rows, segment_boundaries, i_seg, i_chunk, n_sequences, H, C, PARTITIONS, HAS_SHARED, SPLIT
        )
        n_rows = tl.where(is_there, n_rows, 0)
        i_before = tl.where(is_there, i_before, 0)
        i_after = tl.where(is_there, i_after, 0)
        return i_v, i_h, i_seg, i_chunk, first_row, n_rows, first_boundary, i_state + i_h, i_before, i_after


@triton.jit
def gdn_carry_kernel(
    states, transitions, segment_rows, segment_boundaries,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What groups add becomes the states between them, in place: a block for each segment, head and BV columns."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_h = (tl.program_id(0) // NV) % H
    i_seg = tl.program_id(0) // (NV * H)
    o_k = tl.arange(0, BK)
    o_v = (tl.program_id(0) % NV) * BV + tl.arange(0, BV)
    n_rows = tl.load(segment_rows + i_seg + 1) - tl.load(segment_rows + i_seg)
    n_slots = tl.cdiv(n_rows, SPLIT * C) - 1
    if n_slots < 2:  # the one there is was made from the segment's own end
        return
    first_slot = (tl.load(segment_boundaries + i_seg) + SPLIT - 1) // SPLIT
    i_start = first_slot + (n_slots - 1 if REVERSE else 0)
    b_state = load_state(states, tl.cast(i_start, tl.int64) * H + i_h, o_k, o_v, True, K, V)
    for i in range(1, n_slots):
        i_T = tl.cast(first_slot + (n_slots - i if REVERSE else i), tl.int64) * H + i_h
        i_slot = i_T - (H if REVERSE else 0)
        b_T = load_state(transitions, i_T, o_k, o_k, True, K, K)
        b_local = load_state(states, i_slot, o_k, o_v, True, K, V)
        b_state = b_local + dot_fp32(tl.trans(b_T) if REVERSE else b_T, b_state, PRECISION)
        store_state(states, b_state, i_slot, o_k, o_v, True, K, V)


@triton.jit
def store_boundary(
    h, b_state, first_boundary, i, n_left, i_after, i_h, o_k, o_v,
    H: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """The state after chunk i of a walk over n_left rows, unless the segment ends there: it has no boundary then."""
    i_boundary = tl.cast(first_boundary + i, tl.int64) * H + i_h
    is_inner = (n_left > (i + 1) * C) | (i_after >= 0)
    store_state(h, b_state, i_boundary, o_k, o_v, is_inner, K, V)


def arguments(call: Call, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What `walk_part` takes beside the table of segments; the chunk table is read by plans that split alone."""
    return dict(
        chunk_table=tensors["chunk_table"] if call.sizes.split else tensors["segment_rows"],
        n_segments=call.sizes.segments,
        n_all_chunks=call.sizes.chunks,
        SPLIT=call.sizes.split,
    )


def launch_carry(call: Call, tensors: Mapping[str, torch.Tensor], states: str, *, reverse: bool) -> None:
    problem = call.sizes.problem
    call.launch(
        gdn_carry_kernel,
        (call.sizes.segments * problem.num_heads * triton.cdiv(problem.value_dim, CARRY_COLUMNS),),
        dict(
            states=tensors[states],
            transitions=tensors["transitions"],
            segment_rows=tensors["segment_rows"],
            segment_boundaries=tensors["segment_boundaries"],
            H=problem.num_heads,
            K=problem.key_dim,
            V=problem.value_dim,
            C=call.sizes.chunk_size,
            SPLIT=call.sizes.split,
            REVERSE=reverse,
            PRECISION="tf32x3" if problem.dtype == "fp32" else "bf16x3",
            BK=key_tile(problem),
            BV=CARRY_COLUMNS,
        ),
        num_warps=CARRY_WARPS,
        num_stages=1,
    )


def constraints(row_tiles: int) -> tuple[Constraint, ...]:
    """Those of a stage that walks groups and carries what they add."""
    return (*common.scan_constraints(row_tiles=row_tiles), CARRY_FITS)
