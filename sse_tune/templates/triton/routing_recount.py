"""Routing in two launches instead of six, for few sequences: what lies between the choice and the places is so little
that each block works all of it out for itself, and none waits for another's.

The choice is that of `routing.py`, the tables and the places are too: it is the grid that differs. Every block writes
the same starts of sequences and the same tables of segments, and reads them after its own barrier: whoever wrote last,
they hold the same. The plain stream has nothing to count and takes one launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import common, routing
from sse_tune.templates.triton.routing import SCAN_TILE, choose_kernel, place_kernel, segments_kernel

if TYPE_CHECKING:
    import torch

MAX_COUNTS = 2**16  # that one block reads: some microseconds
COUNTS_TILE = 4096


def _counts(problem: Problem, config: Config) -> int:
    """How many counts one block reads: those of all blocks, for itself and for the start of each sequence."""
    blocks = triton.cdiv(problem.batch * problem.seq_len, int(config["block_t"]))
    return (problem.sequences + 2) * blocks * problem.num_partitions


SPACE = Space(
    params=routing.SPACE.params,
    constraints=(
        *routing.SPACE.constraints,
        Constraint(f"(sequences + 2) * blocks of tokens * N <= {MAX_COUNTS}",
                   lambda p, c, d: _counts(p, c) <= MAX_COUNTS),
        Constraint("at most 64 sequences, which each block lists", lambda p, c, d: p.sequences <= 64),
    ),
)  # fmt: skip


@triton.jit
def counts_before(block_counts, n_before, N: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr):
    """How many tokens of the first blocks chose each partition: [BN]."""
    o_n = tl.arange(0, BN)
    b_sum = tl.zeros((BN,), tl.int32)
    for i in range(0, tl.cdiv(n_before, TILE)):
        o_b = i * TILE + tl.arange(0, TILE)
        b_counts = tl.load(
            block_counts + o_b.to(tl.int64)[:, None] * N + o_n[None, :],
            mask=(o_b < n_before)[:, None] & (o_n < N)[None, :], other=0,
        )  # fmt: skip
        b_sum += tl.sum(b_counts, 0)
    return b_sum


@triton.jit
def recount_kernel(
    chosen, rank, weights, block_counts, prefixes, starts, segment_rows, segment_chunks, segment_boundaries,
    cu_seqlens, perm, inv, chunk_table, R, n_sequences, n_shared, n_segments, n_chunks,
    N: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, L: tl.constexpr, HAS_SHARED: tl.constexpr, BT: tl.constexpr,
    STEPS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """What happens before this block's tokens and at the start of each sequence, the tables, and the places."""
    i_t = tl.program_id(0)
    o_n = tl.arange(0, BN)
    if N == 0:
        choose_kernel(weights, weights, chosen, rank, block_counts, R, N, BN, L, HAS_SHARED, BT)
    else:
        b_own = counts_before(block_counts, i_t, N, BN, TILE)
        tl.store(prefixes + i_t.to(tl.int64) * N + o_n, b_own, mask=o_n < N)
        for i_s in range(0, n_sequences + 1):
            start = tl.load(cu_seqlens + i_s).to(tl.int32)
            i_b = start // BT
            b_count = counts_before(block_counts, i_b, N, BN, TILE)
            o_t = i_b * BT + tl.arange(0, BT)
            m_t = (o_t < start) & (o_t < R)
            for lane in range(HAS_SHARED, L):
                b_p = tl.load(chosen + o_t.to(tl.int64) * L + lane, mask=m_t, other=-1)
                b_count += tl.sum((b_p[:, None] == o_n[None, :]).to(tl.int32), 0)
            tl.store(starts + i_s * N + o_n, b_count, mask=o_n < N)
        tl.debug_barrier()
    segments_kernel(
        cu_seqlens, starts, segment_rows, segment_chunks, segment_boundaries, n_shared, n_segments, N, C, BLOCK
    )
    tl.debug_barrier()
    # surplus chunks, a share of them in each block
    o_c = i_t * SHARE + tl.arange(0, SHARE)
    m_surplus = (o_c >= tl.load(segment_chunks + n_segments)) & (o_c < n_chunks)
    tl.store(chunk_table + o_c.to(tl.int64) * 5, tl.full((SHARE,), -1, tl.int32), mask=m_surplus)
    place_kernel(
        chosen, rank, prefixes, starts, segment_rows, segment_chunks, segment_boundaries, cu_seqlens, perm, inv,
        chunk_table, R, n_sequences, n_shared, N, C, L, HAS_SHARED, BT, STEPS,
    )


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    sizes, problem = call.sizes, call.sizes.problem
    block_t, warps = int(call.config["block_t"]), int(call.config["num_warps"])
    blocks = triton.cdiv(sizes.tokens, block_t)
    sequences, partitions, shared = problem.sequences, problem.num_partitions, int(problem.shared)
    weights, chosen = tensors["weights"], tensors["chosen"]
    # scratch; one entry stands in where there is no router
    block_counts, prefixes = (chosen.new_empty(blocks * partitions or 1) for _ in range(2))
    starts = chosen.new_empty(((sequences + 1) * partitions) or 1)
    rank = chosen.new_empty(chosen.shape if partitions else (1,))
    columns = triton.next_power_of_2(max(partitions, 2))
    lanes = dict(N=partitions, BN=columns, L=problem.lanes, HAS_SHARED=shared, BT=block_t)
    if partitions:
        call.launch(
            choose_kernel, (blocks,),
            dict(router_logits=tensors["router_logits"], weights=weights, chosen=chosen, rank=rank,
                 block_counts=block_counts, R=sizes.tokens, **lanes),
            num_warps=warps, num_stages=1,
        )  # fmt: skip
    tables = {name: tensors[name] for name in ("segment_rows", "segment_chunks", "segment_boundaries")}
    call.launch(
        recount_kernel, (blocks,),
        dict(chosen=chosen, rank=rank, weights=weights, block_counts=block_counts, prefixes=prefixes, starts=starts,
             **tables, cu_seqlens=tensors["cu_seqlens"], perm=tensors["perm"], inv=tensors["inv"],
             chunk_table=tensors["chunk_table"], R=sizes.tokens, n_sequences=sequences, n_shared=sequences * shared,
             n_segments=sizes.segments, n_chunks=sizes.chunks, C=sizes.chunk_size,
             STEPS=max(1, sequences.bit_length()),
             TILE=min(triton.next_power_of_2(blocks), max(1, COUNTS_TILE // columns)),
             BLOCK=min(triton.next_power_of_2(sizes.segments), SCAN_TILE),
             SHARE=triton.next_power_of_2(triton.cdiv(sizes.chunks, blocks)), **lanes),
        num_warps=warps, num_stages=1,
    )  # fmt: skip


TEMPLATE = Template(
    "triton", "routing_recount", "routing", ("gla", "gdn"), SPACE, run, (__name__, routing.__name__, common.MODULE)
)
