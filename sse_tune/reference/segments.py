"""From tokens to segments and back: the part that `recurrent` and `chunked` share.

A *segment* is the rows of one (sequence, partition) in time order; each is a linear attention of its own over
q̂ = c·q and k̂ = a·k, where the row scales a, c hold the router's weight e, the norm and the scale. The output of a
token is the sum of its rows' outputs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch

from sse_tune.errors import ProblemError
from sse_tune.reference.routing import route

EPS = 1e-6

# (q̂ [n,H,K], k̂ [n,H,K], v [n,H,V], g [n,H,K] or [n,H], beta [n,H] or None, S [H,K,V]) -> (o [n,H,V], S after)
Scan = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of `recurrent` and `chunked` by their public names."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    router_logits: torch.Tensor | None
    top_k: int
    beta: torch.Tensor | None
    shared_q: torch.Tensor | None
    shared_k: torch.Tensor | None
    shared_g: torch.Tensor | None
    shared_beta: torch.Tensor | None
    qk_l2norm: bool
    gate_before_norm: bool
    scale: float | None
    read_k: int | None
    initial_state: torch.Tensor | None
    output_final_state: bool
    cu_seqlens: torch.Tensor | None
    partitions: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of some segments, one segment after another; `sizes` says how many each has."""

    tokens: torch.Tensor  # [M] where a row comes from
    q: torch.Tensor  # [M, H, K], scaled by c; 0 where the row does not read
    k: torch.Tensor  # [M, H, K], scaled by a; 0 where the row does not write
    v: torch.Tensor  # [M, H, V]
    g: torch.Tensor  # [M, H, K] or [M, H]; 0 where the row does not write
    beta: torch.Tensor | None  # [M, H]; 0 where the row does not write
    sizes: list[int]


def row_scale(x: torch.Tensor, e: torch.Tensor, qk_l2norm: bool, gate_before_norm: bool) -> torch.Tensor:
    """What a row is multiplied with: its router weight e, and the l2 norm of x or of e·x.

    x is `[M, H, K]`, e `[M]`; returns `[M, H, 1]`.
    """
    e = e[:, None, None]
    squares = (x * x).sum(-1, keepdim=True)
    if not qk_l2norm:
        return e.expand_as(squares)
    if gate_before_norm:
        return e * (e * e * squares + EPS).rsqrt()
    return e * (squares + EPS).rsqrt()


def over_segments(scan: Scan, args: Arguments) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run `scan` over every segment; returns o `[B, T, H, V]` and the states `[S, P, H, K, V]` if asked for."""
    batch, seq_len, heads, value_dim = args.v.shape
    q, k, v, g, beta = (_tokens(x) for x in (args.q, args.k, args.v, args.g, args.beta))
    assert q is not None
    assert k is not None
    assert v is not None
    assert g is not None
    starts = _sequence_starts(args, batch, seq_len)
    sequences = len(starts) - 1
    scale = args.q.shape[-1] ** -0.5 if args.scale is None else args.scale
    tokens = torch.arange(len(v), device=v.device)
    lengths = [end - start for start, end in itertools.pairwise(starts)]

    def rows_of(
        stream: tuple[torch.Tensor | None, ...],
        tokens: torch.Tensor,
        e: torch.Tensor,
        reads: torch.Tensor,
        writes: torch.Tensor,
        sizes: list[int],
    ) -> Rows:
        q, k, g, beta = (None if x is None else x[tokens] for x in stream)
        assert q is not None
        assert k is not None
        assert g is not None
        norm = (args.qk_l2norm, args.gate_before_norm)
        return Rows(
            tokens=tokens,
            q=q * row_scale(q, e, *norm) * scale * reads[:, None, None],
            k=k * row_scale(k, e, *norm) * writes[:, None, None],
            v=v[tokens],
            g=g * writes.reshape(-1, *[1] * (g.dim() - 1)),
            beta=None if beta is None else beta * writes[:, None],
            sizes=sizes,
        )

    ones = torch.ones(len(v), device=v.device, dtype=v.dtype)
    every = torch.ones_like(ones, dtype=torch.bool)
    tables: list[tuple[int, Rows]] = []  # (partitions per sequence, rows): the shared ones first
    if args.router_logits is None:
        if any(x is not None for x in (args.shared_q, args.shared_k, args.shared_g, args.shared_beta)):
            raise ProblemError("without router_logits q, k, g, beta are the one stream", "shared_*", "leave it out")
        tables.append((1, rows_of((q, k, g, beta), tokens, ones, every, every, lengths)))
    else:
        if args.shared_q is not None:
            shared = tuple(_tokens(x) for x in (args.shared_q, args.shared_k, args.shared_g, args.shared_beta))
            tables.append((1, rows_of(shared, tokens, ones, every, every, lengths)))
        num_partitions = args.router_logits.shape[-1]
        read_k = args.top_k if args.read_k is None else args.read_k
        logits = args.router_logits.reshape(-1, num_partitions)
        given = None if args.partitions is None else args.partitions.reshape(len(v), -1)
        choice = route(logits, args.top_k, read_k, given)
        # a slot is one (token, chosen partition); sorting slots by segment, and stably, keeps them in time order
        slots = choice.partitions.shape[1]
        sequence = torch.arange(sequences).repeat_interleave(torch.tensor(lengths)).to(v.device)
        segment = (sequence[:, None] * num_partitions + choice.partitions).flatten()
        order = segment.argsort(stable=True)
        sizes = torch.bincount(segment, minlength=sequences * num_partitions).tolist()
        e = choice.weights.flatten()[order].to(v.dtype)
        reads, writes = order % slots < read_k, order % slots < args.top_k
        tables.append((num_partitions, rows_of((q, k, g, beta), order // slots, e, reads, writes, sizes)))

    o = torch.zeros_like(v)
    states = _initial_states(args, sequences, [count for count, _ in tables])
    final = []
    for (count, rows), state in zip(tables, states):
        split = [
            [None] * len(rows.sizes) if x is None else x.split(rows.sizes)
            for x in (rows.q, rows.k, rows.v, rows.g, rows.beta)
        ]
        results = [scan(*parts) for parts in zip(*split, state.flatten(0, 1).unbind(0))]
        o = o.index_add(0, rows.tokens, torch.cat([result[0] for result in results]))
        final.append(torch.stack([result[1] for result in results]).unflatten(0, (sequences, count)))
    o = o.reshape(batch, seq_len, heads, value_dim)
    return o, (torch.cat(final, dim=1) if args.output_final_state else None)


def _tokens(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.flatten(0, 1)


def _sequence_starts(args: Arguments, batch: int, seq_len: int) -> list[int]:
    if args.cu_seqlens is None:
        return [row * seq_len for row in range(batch + 1)]
    starts = [int(x) for x in args.cu_seqlens.tolist()]
    if batch != 1 or starts[0] != 0 or starts[-1] != seq_len or sorted(starts) != starts:
        raise ProblemError(
            "`cu_seqlens` must rise from 0 to T, and B must be 1",
            f"cu_seqlens={starts[:4]}..{starts[-1]}, B={batch}, T={seq_len}",
            "concatenate the sequences along T",
        )
    return starts


def _initial_states(args: Arguments, sequences: int, counts: list[int]) -> tuple[torch.Tensor, ...]:
    heads, key_dim, value_dim = args.q.shape[2], args.q.shape[3], args.v.shape[3]
    shape = (sequences, sum(counts), heads, key_dim, value_dim)
    if args.initial_state is None:
        return args.v.new_zeros(shape).split(counts, dim=1)
    if tuple(args.initial_state.shape) != shape:
        raise ProblemError(
            "`initial_state` must be [S, P, H, K, V]", f"{tuple(args.initial_state.shape)}", f"pass shape {shape}"
        )
    return args.initial_state.to(args.v.dtype).split(counts, dim=1)
