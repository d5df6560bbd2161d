"""Moves tokens to the rows of their segments and back, by gathers alone, in both directions of autograd.

Rows lie in chunks of C; the chunks are ordered by step, their index within the segment, and in a step by the length
of the segment, longest first. So the chunks of one step are neighbours, and the states of a step are the first ones
of the step before: the scan over chunks (`scan.py`) needs no indices. Rows are stored head-major, `[chunks·H, C, ·]`,
ready for batched matrix products. A row that is padding, or does not write (read), takes its k, v, g, beta (q) from a
zero row put behind the tokens, so nothing is ever masked afterwards.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Indices between tokens and rows, for the lanes of one role (writing or reading).

    Args:
        sources: `[chunks·H·C]`, what each row takes of cat(shared tokens, sparse tokens, zero row), heads unrolled.
        values: the same into cat(tokens, zero row), for tensors that both streams share.
        places: `[R, lanes, H]`, the row of each token, lane and head.
    """

    sources: torch.Tensor
    values: torch.Tensor
    places: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Table:
    """Which rows there are and where they come from.

    Args:
        write, read: the lanes that write and those that read, the shared one first.
        slots: `[chunks·C]`, slot token·L + lane of each row, R·L for padding.
        step_sizes: chunks of each step; they fall from step to step.
        order: `[segments]`, the segments by length, longest first; `rank` is its inverse.
    """

    write: Lanes
    read: Lanes
    slots: torch.Tensor
    step_sizes: list[int]
    order: torch.Tensor
    rank: torch.Tensor


def build_table(
    cu_seqlens: torch.Tensor,
    tokens: int,
    partitions: torch.Tensor | None,
    *,
    num_partitions: int,
    shared: bool,
    top_k: int,
    read_k: int,
    heads: int,
    chunk_size: int,
    masked: bool,
) -> Table:
    """Lay out the segments of one call.

    Args:
        cu_seqlens: `[S + 1]`.
        tokens: R.
        partitions: `[R, J]`, the chosen partitions; None: there is the always-on stream only.
        masked: a partition's segment holds a row for every token, most of them zero, instead of its own tokens only.
    """
    device = cu_seqlens.device
    starts = cu_seqlens.to(torch.int64)
    lengths = starts.diff()
    sequences = len(lengths)
    token = torch.arange(tokens, device=device)
    sequence = torch.repeat_interleave(torch.arange(sequences, device=device), lengths, output_size=tokens)
    time = token - starts[sequence]
    segments, ranks, sizes = [], [], []  # of the lanes: [R, ·], [R, ·], and of the segments: [·]
    if shared:
        segments.append(sequence[:, None])
        ranks.append(time[:, None])
        sizes.append(lengths)
    if partitions is not None:
        sparse = sequence[:, None] * num_partitions + partitions
        if masked:
            rank = time[:, None].expand_as(sparse)
            size = lengths.repeat_interleave(num_partitions)
        else:
            rank, size = _ranks(sparse, sequences * num_partitions)
        segments.append(sparse + shared * sequences)
        ranks.append(rank)
        sizes.append(size)
    segment, rank, size = torch.cat(segments, 1), torch.cat(ranks, 1), torch.cat(sizes)

    chunks = (size + chunk_size - 1) // chunk_size
    order = chunks.argsort(descending=True, stable=True)
    place_of_segment = _inverse(order)
    steps = int(chunks.max())
    step_sizes = (chunks[:, None] > torch.arange(steps, device=device)).sum(0)
    step_starts = step_sizes.cumsum(0) - step_sizes
    chunk = step_starts[rank // chunk_size] + place_of_segment[segment]
    row = chunk * chunk_size + rank % chunk_size  # [R, L]
    head = torch.arange(heads, device=device)
    places = ((chunk[..., None] * heads + head) * chunk_size) + (rank % chunk_size)[..., None]  # [R, L, H]

    lanes = segment.shape[1]
    rows = int(step_sizes.sum()) * chunk_size
    slots = torch.full((rows,), tokens * lanes, device=device)
    slots[row.flatten()] = torch.arange(tokens * lanes, device=device)
    streams = int(shared) + int(partitions is not None)
    first_of_stream = torch.tensor([0] * shared + [tokens * (streams - 1)] * (lanes - shared), device=device)

    def role(count: int) -> Lanes:
        active = shared + count if partitions is not None else 1
        source = torch.full((rows,), streams * tokens, device=device)
        source[row[:, :active].flatten()] = (token[:, None] + first_of_stream[:active]).flatten()
        value = torch.full((rows,), tokens, device=device)
        value[row[:, :active].flatten()] = token.repeat_interleave(active)
        return Lanes(_by_head(source, heads, chunk_size), _by_head(value, heads, chunk_size), places[:, :active])

    write = role(top_k)
    return Table(write, write if read_k == top_k else role(read_k), slots, step_sizes.tolist(), order, place_of_segment)


def _ranks(segment: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How many rows of its segment come before each row, in time order; and the sizes of the `count` segments."""
    flat = segment.flatten()
    order = flat.argsort(stable=True)
    size = torch.bincount(flat, minlength=count)
    first = size.cumsum(0) - size
    rank = torch.empty_like(flat)
    rank[order] = torch.arange(len(flat), device=flat.device) - first[flat[order]]
    return rank.view_as(segment), size


def _inverse(order: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


def _by_head(rows: torch.Tensor, heads: int, chunk_size: int) -> torch.Tensor:
    unrolled = rows.view(-1, 1, chunk_size) * heads + torch.arange(heads, device=rows.device)[:, None]
    return unrolled.flatten()


def _rows_of(parts: list[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    """cat(parts, zero) `[·, H, D]`, one row of D per entry of `index`."""
    source = torch.cat([*parts, parts[0].new_zeros(1, *parts[0].shape[1:])])
    return source.flatten(0, 1).index_select(0, index)


class _Spread(torch.autograd.Function):
    """`[R, H, D]` of each stream -> rows `[chunks·H·C, D]`; the gradient sums a token's lanes, in their order."""

    @staticmethod
    def forward(ctx: Any, index: torch.Tensor, places: torch.Tensor, shared_lane: bool, *parts: torch.Tensor):
        ctx.save_for_backward(index, places)
        ctx.shared_lane, ctx.streams = shared_lane, len(parts)
        return _rows_of(list(parts), index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        _, places = ctx.saved_tensors
        split = [places] if ctx.streams == 1 else [places[:, :1], places[:, 1:]]
        return None, None, None, *(_sum_of_lanes(grads[0], part) for part in split)


class _Collect(torch.autograd.Function):
    """Rows `[chunks·H·C, D]` -> `[R, H, D]`, the sum of a token's lanes in their order."""

    @staticmethod
    def forward(ctx: Any, index: torch.Tensor, places: torch.Tensor, rows: torch.Tensor):
        ctx.save_for_backward(index)
        return _sum_of_lanes(rows, places)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        (index,) = ctx.saved_tensors
        return None, None, _rows_of([grads[0]], index)


def _sum_of_lanes(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    lanes = rows.index_select(0, places.flatten()).view(*places.shape, rows.shape[-1])
    return lanes[:, 0] if lanes.shape[1] == 1 else lanes.sum(1)


def spread(lanes: Lanes, shared: torch.Tensor | None, sparse: torch.Tensor | None) -> torch.Tensor:
    """Rows `[chunks·H·C, D]` of a tensor that each stream has its own of; `[R, H, D]`."""
    parts = [part for part in (shared, sparse) if part is not None]
    return _Spread.apply(lanes.sources, lanes.places, shared is not None, *parts)


def spread_values(lanes: Lanes, values: torch.Tensor) -> torch.Tensor:
    """Rows `[chunks·H·C, D]` of a tensor `[R, H, D]` that the streams share."""
    return _Spread.apply(lanes.values, lanes.places, False, values)


def collect(lanes: Lanes, rows: torch.Tensor) -> torch.Tensor:
    """`[R, H, D]` from the rows `[chunks·H·C, D]` of the lanes."""
    return _Collect.apply(lanes.values, lanes.places, rows)
