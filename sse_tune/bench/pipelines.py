"""The operation over a published chunk op, as its users put it together: the paper's "varlen" and "mask" forms.

Both lay rows of the sparse stream behind those of the always-on one, call the chunk op once, and add a token's rows
up. *varlen*: a row for each (token, chosen partition), sorted by sequence, partition and time; cu_seqlens keeps the
segments apart. *mask*: a row for each (token, partition), in time order; where the token did not choose the partition,
q, k, g and beta are 0, so that the state stays and nothing is read.

They are rivals to be taken seriously, so nothing is copied twice: rows are gathered straight into the op's argument,
gates are multiplied in place and in the tensors' dtype, and both sums over a token's rows (o, and the gradients of what
was gathered) are one `embedding_bag`, without atomics and without rows of zeros.

Source: arXiv 2507.16577, section 3.3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sse_tune.problem import Problem
from sse_tune.runtime.pipeline import Inputs

# q, k `[B', T', H, K]`, v, g, beta (None: GLA); scale; whether to normalise q and k; cu_seqlens or None -> o
ChunkOp = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None", float, bool, "Tensor | None"], Tensor]
EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the rows of the sparse stream come from and belong; M rows, J of them for each of R tokens.

    Args:
        source: `[M]` int64, the token of each row.
        rows: `[R, J]` int64, the rows of each token.
        weight: `[M]`, what q and k are multiplied with; carries the router's gradient.
        mask: `[M]`, what g and beta are multiplied with; None: 1 everywhere.
        segments: int32 lengths summed up, of these rows alone, from 0; None: they are batch rows of T tokens.
    """

    source: Tensor
    rows: Tensor
    weight: Tensor
    mask: Tensor | None
    segments: Tensor | None


def varlen_layout(problem: Problem, inputs: Inputs) -> Layout:
    """One row for each (token, chosen partition), sorted."""
    logits, starts = inputs.router_logits, inputs.cu_seqlens
    assert logits is not None
    weights, partitions = logits.softmax(-1).topk(problem.top_k)
    segment = partitions.to(torch.int32)
    if problem.sequences > 1:
        tokens = torch.arange(len(logits), device=logits.device, dtype=starts.dtype)
        sequence = torch.searchsorted(starts, tokens, right=True, out_int32=True) - 1
        segment = segment + (sequence * problem.num_partitions)[:, None]
    ordered, order = segment.flatten().sort(stable=True)  # stable: the rows of a segment stay in time order
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    count = problem.sequences * problem.num_partitions
    bounds = torch.arange(count + 1, device=ordered.device, dtype=ordered.dtype)
    return Layout(
        source=order // problem.top_k,
        rows=rows.view_as(partitions),
        weight=weights.flatten().index_select(0, order),
        mask=None,
        segments=torch.searchsorted(ordered, bounds, out_int32=True),
    )


def mask_layout(problem: Problem, inputs: Inputs) -> Layout:
    """One row for each (partition, token), weights 0 where the token did not choose the partition."""
    logits = inputs.router_logits
    assert logits is not None
    tokens, copies = len(logits), problem.num_partitions
    weights = logits.softmax(-1)
    chosen = torch.zeros_like(weights).scatter_(1, weights.detach().topk(problem.top_k).indices, 1.0)
    here = torch.arange(tokens, device=logits.device)
    first_row = torch.arange(copies, device=logits.device) * tokens
    segments = None
    if problem.num_sequences is not None:
        inner = first_row[:, None] + inputs.cu_seqlens[None, :-1]
        segments = torch.cat((inner.flatten(), inner.new_tensor([copies * tokens]))).to(torch.int32)
    return Layout(
        source=here.repeat(copies),
        rows=here[:, None] + first_row,
        weight=(weights * chosen).mT.flatten(),
        mask=chosen.mT.flatten(),
        segments=segments,
    )


LAYOUTS: dict[str, Callable[[Problem, Inputs], Layout]] = {"varlen": varlen_layout, "mask": mask_layout}


def run_pipeline(pipeline: str, problem: Problem, inputs: Inputs, op: ChunkOp, scale: float) -> Tensor:
    """The operation over a chunk op.

    Args:
        pipeline: one of `LAYOUTS`.
        problem: with as many readers as writers.
        inputs: of the call; no initial state.
        op: the chunk op; it must be differentiable where gradients are asked for.
        scale: what multiplies q·k.

    Returns:
        o `[R, H, V]`, differentiable in all inputs.
    """
    q, k, v, g, beta = inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta
    starts = inputs.cu_seqlens if problem.num_sequences is not None else None
    if inputs.router_logits is None:
        return _call(op, (q, k, v, g, beta), scale, problem.norm != "none", starts, problem)
    first = (inputs.shared_q, inputs.shared_k, inputs.shared_g, inputs.shared_beta)
    if problem.norm == "after":  # on R rows and not on M; the op could only normalise what the weight is already in
        q, k = normalised(q), normalised(k)
        first = (*(x if x is None else normalised(x) for x in first[:2]), *first[2:])  # type: ignore[assignment]
    layout = LAYOUTS[pipeline](problem, inputs)
    tokens, source, rows, segments = len(v), layout.source, layout.rows, layout.segments
    if problem.shared:
        here = torch.arange(tokens, device=v.device)
        source = torch.cat((here, source))
        rows = torch.cat((here[:, None], rows + tokens), dim=1)
        if segments is not None:
            segments = torch.cat((inputs.cu_seqlens[:-1], segments + tokens))
    if segments is not None:
        segments = segments.unique_consecutive()  # not every chunk op takes a segment without rows
    packed = (
        _pack(q, first[0], layout.weight, layout),
        _pack(k, first[1], layout.weight, layout),
        _Take.apply(v, source, rows),
        _pack(g, first[2], layout.mask, layout),
        None if beta is None else _pack(beta, first[3], layout.mask, layout),
    )
    found = _call(op, packed, scale, problem.norm == "before", segments, problem)
    return _Add.apply(found, source, rows)


def normalised(x: Tensor) -> Tensor:
    """x over the l2 norm of its last dimension, which is taken in fp32 or finer without a copy of x in it."""
    fine = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=fine)
    return x * (length.square() + EPS).rsqrt().to(x.dtype)


def _call(
    op: ChunkOp,
    rows: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    scale: float,
    normalise: bool,
    segments: Tensor | None,
    problem: Problem,
) -> Tensor:
    """The op on rows `[M, H, ·]`: one packed batch row, or batch rows of T tokens where there are no segments."""
    lengths = (1, -1) if segments is not None else (-1, problem.seq_len)
    q, k, v, g = (x.unflatten(0, lengths) for x in rows[:4])
    beta = None if rows[4] is None else rows[4].unflatten(0, lengths)
    return op(q, k, v, g, beta, scale, normalise, segments).flatten(0, 1)


def _pack(x: Tensor, first: Tensor | None, weight: Tensor | None, layout: Layout) -> Tensor:
    return _Pack.apply(x, first, weight, layout.source, layout.rows)


def _bag(rows: Tensor, values: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sums the J rows `[R, J]` of `values` `[M, ...]` that belong to each token, weighted by `weight` `[M]`."""
    each = None if weight is None else weight.to(values.dtype)[rows]
    flat = values.contiguous().flatten(1)
    summed = torch.nn.functional.embedding_bag(rows, flat, mode="sum", per_sample_weights=each)
    return summed.unflatten(1, values.shape[1:])


class _Pack(torch.autograd.Function):
    """`cat((first, weight * x[source]))` with one write of each row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor | None, weight: Tensor | None, source: Tensor, rows: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, source, rows)
        ctx.lead = 0 if first is None else len(first)
        packed = x.new_empty(ctx.lead + len(source), *x.shape[1:])
        if first is not None:
            packed[: ctx.lead].copy_(first)
        behind = packed[ctx.lead :]
        torch.index_select(x, 0, source, out=behind)
        if weight is not None:
            behind.mul_(weight.to(x.dtype).view(-1, *[1] * (x.dim() - 1)))
        return packed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d,) = grads
        x, weight, source, rows = ctx.saved_tensors
        behind = d[ctx.lead :]
        d_weight = None
        if ctx.needs_input_grad[2]:
            fine = torch.promote_types(x.dtype, torch.float32)
            d_weight = x.index_select(0, source).mul_(behind).flatten(1).sum(1, dtype=fine).to(weight.dtype)
        d_first = d[: ctx.lead] if ctx.needs_input_grad[1] else None
        return _bag(rows, behind, weight) if ctx.needs_input_grad[0] else None, d_first, d_weight, None, None


class _Take(torch.autograd.Function):
    """`x[source]`; a token's gradient is the sum over its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _bag(ctx.saved_tensors[0], grads[0]), None, None


class _Add(torch.autograd.Function):
    """The sum over a token's rows; the gradient of each is the token's."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, source: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return _bag(rows, found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None
