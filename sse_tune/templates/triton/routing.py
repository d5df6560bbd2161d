"""Routing: which partitions each token takes, and where its rows lie once sorted by (sequence, partition, time).

    e = softmax(logits) in fp32;  slots = the largest logits, ties to the lowest partition
    row of a slot = first row of its segment + how many earlier tokens of its sequence chose the same partition

Segments follow one another without padding; each is cut into chunks of C rows, which the chunk table lists.

The rank is a count, prefix[t, p] - prefix[start of the sequence, p], so it is stable in time and needs N counters, not
S·N, and no atomics. Nothing here looks at the data from the host: all sizes are static bounds. Infinite logits count
as the largest finite ones; NaN logits as the smallest for the choice, and their weights are NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.space import Constraint, Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import common

if TYPE_CHECKING:
    import torch

SPACE = Space(
    params=(
        Param("block_t", (16, 32, 64, 128, 256), 128, "tokens per block"),
        Param("num_warps", (1, 2, 4, 8), 4, "warps per block"),
    ),
    constraints=(
        Constraint("block_t * N / (32 * num_warps) <= 128, or the smallest block_t",
                   lambda p, c, d: c["block_t"] == 16
                   or c["block_t"] * triton.next_power_of_2(max(p.num_partitions, 2)) <= 128 * 32 * c["num_warps"]),
    ),
)
SCAN_TILE = 1024
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def router_softmax(router_logits, o_t, m_t, N: tl.constexpr, BN: tl.constexpr):
    """Logits [BT, BN] in fp32, clamped to finite, and their softmax; columns past N are -inf and 0."""
    o_n = tl.arange(0, BN)
    b_raw = tl.load(
        router_logits + o_t.to(tl.int64)[:, None] * N + o_n[None, :],
        mask=m_t[:, None] & (o_n < N)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    b_x = tl.minimum(tl.maximum(b_raw, -FLOAT_MAX), FLOAT_MAX)
    b_x = tl.where(b_raw == b_raw, b_x, b_raw)  # keeps NaN
    b_x = tl.where((o_n < N)[None, :], b_x, float("-inf"))
    b_e = tl.exp(b_x - tl.max(b_x, 1)[:, None])
    b_e = b_e / tl.sum(b_e, 1)[:, None]
    # a NaN anywhere makes the row's weights NaN, as softmax does, whatever max() made of it
    m_nan = tl.sum((b_raw != b_raw).to(tl.int32), 1) > 0
    return b_raw, b_x, tl.where(m_nan[:, None], float("nan"), b_e)


@triton.jit
def next_partition(b_key, b_taken, N: tl.constexpr, BN: tl.constexpr):
    """The largest key not taken yet, the lowest partition among equal ones: its number, and where it stands."""
    o_n = tl.arange(0, BN)
    m_left = (b_taken == 0) & (o_n < N)[None, :]
    b_best = tl.max(tl.where(m_left, b_key, float("-inf")), 1)
    b_p = tl.min(tl.where(m_left & (b_key == b_best[:, None]), o_n[None, :], BN), 1)
    return b_p, o_n[None, :] == b_p[:, None]


@triton.jit
def choose_kernel(
    router_logits, weights, chosen, rank, block_counts, R,
    N: tl.constexpr, BN: tl.constexpr, L: tl.constexpr, HAS_SHARED: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Top partitions of each token, and its rank among the block's tokens in each of them."""
    i_t = tl.program_id(0)
    o_t = i_t * BT + tl.arange(0, BT)
    o_n = tl.arange(0, BN)
    m_t = o_t < R
    o_slot = o_t.to(tl.int64) * L
    if HAS_SHARED:
        tl.store(weights + o_slot, tl.full((BT,), 1.0, tl.float32), mask=m_t)
        tl.store(chosen + o_slot, tl.zeros((BT,), tl.int32), mask=m_t)
    if N > 0:
        b_raw, b_x, b_e = router_softmax(router_logits, o_t, m_t, N, BN)
        b_key = tl.where(b_x == b_x, b_x, -FLOAT_MAX)
        b_taken = tl.zeros((BT, BN), tl.int32)
        for lane in range(HAS_SHARED, L):
            b_p, m_p = next_partition(b_key, b_taken, N, BN)
            b_taken += m_p.to(tl.int32)
            tl.store(weights + o_slot + lane, tl.sum(tl.where(m_p, b_e, 0.0), 1), mask=m_t)
            tl.store(chosen + o_slot + lane, b_p, mask=m_t)
        b_taken = tl.where(m_t[:, None], b_taken, 0)
        b_before = tl.cumsum(b_taken, 0) - b_taken
        tl.store(block_counts + i_t.to(tl.int64) * N + o_n, tl.sum(b_taken, 0), mask=o_n < N)
        # the ranks need the counts of all lanes, so the choice is made a second time rather than kept
        b_taken = tl.zeros((BT, BN), tl.int32)
        for lane in range(HAS_SHARED, L):
            b_p, m_p = next_partition(b_key, b_taken, N, BN)
            b_taken += m_p.to(tl.int32)
            tl.store(rank + o_slot + lane, tl.sum(tl.where(m_p, b_before, 0), 1), mask=m_t)


@triton.jit
def block_offsets_kernel(block_counts, n_blocks, N: tl.constexpr, BLOCK: tl.constexpr):
    """In-place exclusive scan of each partition's counts over the blocks; row `n_blocks` becomes the total."""
    i_n = tl.program_id(0)
    total = 0
    for i in range(0, tl.cdiv(n_blocks, BLOCK)):
        o_b = i * BLOCK + tl.arange(0, BLOCK)
        b_count = tl.load(block_counts + o_b.to(tl.int64) * N + i_n, mask=o_b < n_blocks, other=0)
        b_before = total + tl.cumsum(b_count, 0) - b_count
        tl.store(block_counts + o_b.to(tl.int64) * N + i_n, b_before, mask=o_b < n_blocks)
        total += tl.sum(b_count, 0)
    tl.store(block_counts + n_blocks * N + i_n, total)


@triton.jit
def sequence_starts_kernel(
    chosen, block_counts, cu_seqlens, starts, R,
    N: tl.constexpr, BN: tl.constexpr, L: tl.constexpr, HAS_SHARED: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """prefix[cu_seqlens[s], p]: how many tokens before sequence s chose partition p."""
    i_s = tl.program_id(0)
    o_n = tl.arange(0, BN)
    start = tl.load(cu_seqlens + i_s).to(tl.int32)
    i_b = start // BT
    o_t = i_b * BT + tl.arange(0, BT)
    m_t = (o_t < start) & (o_t < R)
    b_count = tl.load(block_counts + i_b.to(tl.int64) * N + o_n, mask=o_n < N, other=0)
    for lane in range(HAS_SHARED, L):
        b_p = tl.load(chosen + o_t.to(tl.int64) * L + lane, mask=m_t, other=-1)
        b_count += tl.sum((b_p[:, None] == o_n[None, :]).to(tl.int32), 0)
    tl.store(starts + i_s.to(tl.int64) * N + o_n, b_count, mask=o_n < N)


@triton.jit
def segments_kernel(
    cu_seqlens, starts, segment_rows, segment_chunks, segment_boundaries, n_shared, n_segments,
    N: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First row, chunk and boundary of each segment: exclusive sums of its rows, ceil(rows / C), and one less than
    that, shared segments first."""
    n_rows = 0
    n_chunks = 0
    n_boundaries = 0
    for i in range(0, tl.cdiv(n_segments, BLOCK)):
        o_g = i * BLOCK + tl.arange(0, BLOCK)
        m_g = o_g < n_segments
        m_shared = o_g < n_shared
        b_rows = tl.load(cu_seqlens + o_g + 1, mask=m_shared, other=0).to(tl.int32)
        b_rows -= tl.load(cu_seqlens + o_g, mask=m_shared, other=0).to(tl.int32)
        if N > 0:
            m_sparse = (o_g >= n_shared) & m_g
            o_sparse = tl.where(m_sparse, o_g - n_shared, 0).to(tl.int64)  # s * N + p
            b_rows += tl.load(starts + o_sparse + N, mask=m_sparse, other=0)
            b_rows -= tl.load(starts + o_sparse, mask=m_sparse, other=0)
        b_chunks = (b_rows + C - 1) // C
        b_boundaries = tl.maximum(b_chunks - 1, 0)
        tl.store(segment_rows + o_g, n_rows + tl.cumsum(b_rows, 0) - b_rows, mask=m_g)
        tl.store(segment_chunks + o_g, n_chunks + tl.cumsum(b_chunks, 0) - b_chunks, mask=m_g)
        tl.store(segment_boundaries + o_g, n_boundaries + tl.cumsum(b_boundaries, 0) - b_boundaries, mask=m_g)
        n_rows += tl.sum(b_rows, 0)
        n_chunks += tl.sum(b_chunks, 0)
        n_boundaries += tl.sum(b_boundaries, 0)
    tl.store(segment_rows + n_segments, n_rows)
    tl.store(segment_chunks + n_segments, n_chunks)
    tl.store(segment_boundaries + n_segments, n_boundaries)


@triton.jit
def surplus_kernel(segment_chunks, chunk_table, n_segments, n_chunks, BLOCK: tl.constexpr):
    """Marks the chunks that no segment has."""
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_surplus = (o_c >= tl.load(segment_chunks + n_segments)) & (o_c < n_chunks)
    tl.store(chunk_table + o_c.to(tl.int64) * 5, tl.full((BLOCK,), -1, tl.int32), mask=m_surplus)


@triton.jit
def place_kernel(
    chosen, rank, block_counts, starts, segment_rows, segment_chunks, segment_boundaries, cu_seqlens, perm, inv,
    chunk_table, R, n_sequences, n_shared,
    N: tl.constexpr, C: tl.constexpr, L: tl.constexpr, HAS_SHARED: tl.constexpr, BT: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Gives each slot its row; the first row of a chunk enters the chunk in the table."""
    i_t = tl.program_id(0)
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < R
    # the sequence of each token: the last one that starts at or before it, empty ones passed over
    b_s = tl.zeros((BT,), tl.int32)
    b_high = tl.zeros((BT,), tl.int32) + n_sequences
    for _ in range(STEPS):
        b_mid = (b_s + b_high) // 2
        m_right = tl.load(cu_seqlens + b_mid, mask=m_t, other=0).to(tl.int32) <= o_t
        b_s = tl.where(m_right, b_mid, b_s)
        b_high = tl.where(m_right, b_high, b_mid)
    for lane in range(0, L):
        o_slot = o_t.to(tl.int64) * L + lane
        if lane < HAS_SHARED:
            b_segment = b_s
            b_rank = o_t - tl.load(cu_seqlens + b_s, mask=m_t, other=0).to(tl.int32)
        else:
            b_p = tl.load(chosen + o_slot, mask=m_t, other=0)
            b_segment = n_shared + b_s * N + b_p
            b_rank = tl.load(rank + o_slot, mask=m_t, other=0)
            b_rank += tl.load(block_counts + i_t.to(tl.int64) * N + b_p, mask=m_t, other=0)
            b_rank -= tl.load(starts + b_s.to(tl.int64) * N + b_p, mask=m_t, other=0)
        b_first = tl.load(segment_rows + b_segment, mask=m_t, other=0)
        b_row = b_first + b_rank
        tl.store(inv + o_slot, b_row, mask=m_t)
        tl.store(perm + b_row, o_slot.to(tl.int32), mask=m_t)
        m_head = m_t & (b_rank % C == 0)
        b_left = tl.load(segment_rows + b_segment + 1, mask=m_head, other=0) - b_row
        b_boundary = tl.load(segment_boundaries + b_segment, mask=m_head, other=0) + b_rank // C
        b_chunk = tl.load(segment_chunks + b_segment, mask=m_head, other=0) + b_rank // C
        p_entry = chunk_table + b_chunk.to(tl.int64) * 5
        tl.store(p_entry, b_segment, mask=m_head)
        tl.store(p_entry + 1, b_row, mask=m_head)
        tl.store(p_entry + 2, tl.minimum(b_left, C), mask=m_head)
        tl.store(p_entry + 3, tl.where(b_rank > 0, b_boundary - 1, -1), mask=m_head)
        tl.store(p_entry + 4, tl.where(b_left > C, b_boundary, -1), mask=m_head)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    sizes, problem = call.sizes, call.sizes.problem
    block_t, warps = int(call.config["block_t"]), int(call.config["num_warps"])
    blocks = triton.cdiv(sizes.tokens, block_t)
    sequences, partitions, shared = problem.sequences, problem.num_partitions, int(problem.shared)
    n_shared = sequences * shared
    cu_seqlens, weights, chosen = (tensors[name] for name in ("cu_seqlens", "weights", "chosen"))
    # scratch; one entry stands in where there is no router
    block_counts = chosen.new_empty(((blocks + 1) * partitions) or 1)
    starts = chosen.new_empty(((sequences + 1) * partitions) or 1)
    rank = chosen.new_empty(chosen.shape if partitions else (1,))
    tables = {name: tensors[name] for name in ("segment_rows", "segment_chunks", "segment_boundaries")}
    columns = dict(N=partitions, BN=triton.next_power_of_2(max(partitions, 2)))
    lanes = dict(L=problem.lanes, HAS_SHARED=shared, BT=block_t)

    call.launch(
        choose_kernel, (blocks,),
        dict(router_logits=tensors.get("router_logits", weights), weights=weights, chosen=chosen, rank=rank,
             block_counts=block_counts, R=sizes.tokens, **columns, **lanes),
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    if partitions:
        call.launch(
            block_offsets_kernel, (partitions,),
            dict(block_counts=block_counts, n_blocks=blocks, N=partitions, BLOCK=SCAN_TILE), num_warps=4, num_stages=1,
        )  # fmt: skip
        call.launch(
            sequence_starts_kernel, (sequences + 1,),
            dict(chosen=chosen, block_counts=block_counts, cu_seqlens=cu_seqlens, starts=starts, R=sizes.tokens,
                 **columns, **lanes),
            num_warps=1, num_stages=1,
        )  # fmt: skip
    call.launch(
        segments_kernel, (1,),
        dict(cu_seqlens=cu_seqlens, starts=starts, **tables, n_shared=n_shared, n_segments=sizes.segments,
             N=partitions, C=sizes.chunk_size, BLOCK=SCAN_TILE),
        num_warps=4, num_stages=1,
    )  # fmt: skip
    call.launch(
        surplus_kernel, (triton.cdiv(sizes.chunks, SCAN_TILE),),
        dict(segment_chunks=tables["segment_chunks"], chunk_table=tensors["chunk_table"], n_segments=sizes.segments,
             n_chunks=sizes.chunks, BLOCK=SCAN_TILE),
        num_warps=4, num_stages=1,
    )  # fmt: skip
    call.launch(
        place_kernel, (blocks,),
        dict(chosen=chosen, rank=rank, block_counts=block_counts, starts=starts, **tables, cu_seqlens=cu_seqlens,
             perm=tensors["perm"], inv=tensors["inv"], chunk_table=tensors["chunk_table"], R=sizes.tokens,
             n_sequences=sequences, n_shared=n_shared, N=partitions, C=sizes.chunk_size,
             STEPS=max(1, sequences.bit_length()), **lanes),
        num_warps=warps, num_stages=1,
    )  # fmt: skip


TEMPLATE = Template("triton", "routing", "routing", ("gla", "gdn"), SPACE, run, (__name__, common.MODULE))
