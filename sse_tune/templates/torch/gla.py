"""GLA inside the chunks: the scores of query and key rows under a decay per key dimension.

    A_ij = Σ_d q_id k_jd e^{b_id − b_jd} (j <= i)      o = (q∘e^b) S + A v      with S of `scan.py`

A chunk is cut into sub-blocks. Keys of earlier sub-blocks meet a query through the first row of its sub-block, r:
e^{b_i − b_r} on the query and e^{b_r − b_j} on the key, both exponents at most 0, and a matrix product. Inside a
sub-block the sum is taken as it stands, one diagonal j = i − n after the other. b is float64 as in `gdn.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from sse_tune.templates.torch.scan import scan


class _Scores(torch.autograd.Function):
    """A `[B, C, C]` of q, k `[B, C, K]` and b `[B, C, K]` float64; the gradient computes the decays again."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, b: torch.Tensor, sub_block: int) -> torch.Tensor:
        ctx.save_for_backward(q, k, b)
        ctx.sub_block = sub_block
        batch, size, _ = q.shape
        scores = q.new_zeros(batch, size, size)
        for start in range(sub_block, size, sub_block):
            rows = slice(start, start + sub_block)
            to_query, to_key = _reference(b, rows, q.dtype)
            scores[:, rows, :start] = (q[:, rows] * to_query) @ (k[:, :start] * to_key).mT
        blocks = _blocks(scores, sub_block)
        for offset in range(sub_block):
            later, earlier = _shifted(offset, sub_block)
            decay = _inside(b, sub_block, offset, q.dtype)
            product = (_cut(q, sub_block)[:, :, later] * _cut(k, sub_block)[:, :, earlier]).mul_(decay)
            blocks.diagonal(-offset, 2, 3).copy_(product.sum(3))
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        q, k, b = ctx.saved_tensors
        sub_block = ctx.sub_block
        d_scores = grads[0].contiguous()
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        for start in range(sub_block, q.shape[1], sub_block):
            rows = slice(start, start + sub_block)
            to_query, to_key = _reference(b, rows, q.dtype)
            d_block = d_scores[:, rows, :start]
            dq[:, rows] = (d_block @ (k[:, :start] * to_key)).mul_(to_query)
            dk[:, :start] += (d_block.mT @ (q[:, rows] * to_query)).mul_(to_key)
        blocks = _blocks(d_scores, sub_block)
        for offset in range(1, sub_block):
            later, earlier = _shifted(offset, sub_block)
            decay = _inside(b, sub_block, offset, q.dtype)
            decay.mul_(blocks.diagonal(-offset, 2, 3)[..., None])
            _cut(dq, sub_block)[:, :, later].addcmul_(decay, _cut(k, sub_block)[:, :, earlier])
            _cut(dk, sub_block)[:, :, earlier].addcmul_(decay, _cut(q, sub_block)[:, :, later])
        db = (q * dq).double() - (k * dk).double()
        # a row does not decay towards itself: its own term would only leave rounding in db
        own = d_scores.diagonal(0, 1, 2)[..., None]
        return dq.addcmul_(own, k), dk.addcmul_(own, q), db, None


def _reference(b: torch.Tensor, rows: slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Decays from the first of `rows` to each of them, and from each row before them to that one."""
    first = b[:, rows.start : rows.start + 1]
    return (b[:, rows] - first).to(dtype).exp_(), (first - b[:, : rows.start]).to(dtype).exp_()


def _cut(x: torch.Tensor, sub_block: int) -> torch.Tensor:
    return x.unflatten(1, (-1, sub_block))


def _blocks(x: torch.Tensor, sub_block: int) -> torch.Tensor:
    """A view `[B, C/s, s, s]` of the blocks on the diagonal of x `[B, C, C]`."""
    batch, size, _ = x.shape
    stride = (x.stride(0), sub_block * (x.stride(1) + x.stride(2)), x.stride(1), x.stride(2))
    return x.as_strided((batch, size // sub_block, sub_block, sub_block), stride, x.storage_offset())


def _shifted(offset: int, sub_block: int) -> tuple[slice, slice]:
    return slice(offset, sub_block), slice(0, sub_block - offset)


def _inside(b: torch.Tensor, sub_block: int, offset: int, dtype: torch.dtype) -> torch.Tensor:
    """Decay of each row from the row `offset` before it in its sub-block, `[B, C/s, s − offset, K]`."""
    later, earlier = _shifted(offset, sub_block)
    cut = _cut(b, sub_block)
    return (cut[:, :, later] - cut[:, :, earlier]).to(dtype).exp_()


def gla_rows(
    q: torch.Tensor,  # [chunks·H, C, K], scaled
    k: torch.Tensor,  # [chunks·H, C, K], scaled
    v: torch.Tensor,  # [chunks·H, C, V]
    g: torch.Tensor,  # [chunks·H, C, K]
    initial: torch.Tensor,  # [segments·H, K, V]
    *,
    sub_block: int,
    step_sizes: list[int],
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of every row, `[chunks·H, C, V]`, and the final states."""
    b = g.double().cumsum(1)
    last = b[:, -1:]
    gamma, to_end, through = (x.to(q.dtype).exp() for x in (b, last - b, last))
    scores = _Scores.apply(q, k, b, sub_block)
    _, states, final = scan(v, None, k * to_end, through.mT, initial, step_sizes, heads)
    return torch.baddbmm((q * gamma) @ states, scores, v), final
