"""GDN inside the chunks: decays between rows, and (I + L)^-1, batched over all chunks and heads.

    L_ij = β_i k_i·k_j e^{b_i − b_j} (j < i)      U = (I + L)^-1 β v      W = (I + L)^-1 β e^b k
    P_ij = q_i·k_j e^{b_i − b_j} (j <= i)         o = e^b q S + P V'      with V' and S of `scan.py`

b, the sums of log-gates, are kept in float64: differences of large sums must not lose the small ones.
"""

from __future__ import annotations

from typing import Any

import torch

from sse_tune.templates.torch.scan import scan


class _PairDecay(torch.autograd.Function):
    """e^{b_i − b_j} for j <= i, 0 above: b `[B, C]` float64 -> `[B, C, C]`; the gradient is summed in float64."""

    @staticmethod
    def forward(ctx: Any, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        size = b.shape[1]
        later = torch.full((size, size), float("-inf"), dtype=dtype, device=b.device).triu_(1)
        decay = (b[:, :, None] - b[:, None]).to(dtype).add_(later).exp_()
        ctx.save_for_backward(decay)
        return decay

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        (decay,) = ctx.saved_tensors
        product = grads[0] * decay
        return product.sum(2, dtype=torch.float64) - product.sum(1, dtype=torch.float64), None


class _UnitInverse(torch.autograd.Function):
    """(I + L)^-1 of the strictly lower part of L `[B, C, C]`; dL = −strictLower(Xᵀ dX Xᵀ)."""

    @staticmethod
    def forward(ctx: Any, lower: torch.Tensor) -> torch.Tensor:
        inverse = _inverse_by_blocks(lower)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        (inverse,) = ctx.saved_tensors
        return (inverse.mT @ grads[0] @ inverse.mT).tril_(-1).neg_()


_BLOCK = 16


def _inverse_by_blocks(lower: torch.Tensor) -> torch.Tensor:
    """Forward substitution in the 16-row diagonal blocks of all chunks at once; then pairs of blocks, doubling.

    [[A, 0], [M, D]]^-1 = [[A^-1, 0], [−D^-1 M A^-1, D^-1]]: as stable as substitution, and batched products only.
    """
    batch, size, _ = lower.shape
    block = min(_BLOCK, size)
    inverse = torch.zeros_like(lower)
    diagonal = _diagonal_blocks(lower, block).reshape(-1, block, block)
    solved = torch.eye(block, dtype=lower.dtype, device=lower.device).repeat(len(diagonal), 1, 1)
    for row in range(1, block):
        torch.baddbmm(
            solved[:, row : row + 1], diagonal[:, row : row + 1, :row], solved[:, :row], alpha=-1,
            out=solved[:, row : row + 1],
        )  # fmt: skip
    _diagonal_blocks(inverse, block).copy_(solved.view(batch, -1, block, block))
    while block < size:
        pairs = _diagonal_blocks(inverse, 2 * block)
        middle = _diagonal_blocks(lower, 2 * block)[..., block:, :block].reshape(-1, block, block)
        first = pairs[..., :block, :block].reshape(-1, block, block)
        second = pairs[..., block:, block:].reshape(-1, block, block)
        corner = torch.bmm(second, torch.bmm(middle, first)).neg_()
        pairs[..., block:, :block] = corner.view(batch, -1, block, block)
        block *= 2
    return inverse


def _diagonal_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """A view `[B, C/block, block, block]` of the blocks on the diagonal."""
    batch, size, _ = x.shape
    stride = (x.stride(0), block * (x.stride(1) + x.stride(2)), x.stride(1), x.stride(2))
    return x.as_strided((batch, size // block, block, block), stride, x.storage_offset())


def gdn_rows(
    q: torch.Tensor,  # [chunks·H, C, K], scaled
    k: torch.Tensor,  # [chunks·H, C, K], scaled
    v: torch.Tensor,  # [chunks·H, C, V]
    g: torch.Tensor,  # [chunks·H, C]
    beta: torch.Tensor,  # [chunks·H, C]
    initial: torch.Tensor,  # [segments·H, K, V]
    *,
    solve: str,
    step_sizes: list[int],
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of every row, `[chunks·H, C, V]`, and the final states."""
    b = g.double().cumsum(1)
    last = b[:, -1:]
    gamma, to_end, through = (x.exp().to(q.dtype)[:, :, None] for x in (b, last - b, last))
    decay = _PairDecay.apply(b, q.dtype)
    lower = (k @ k.mT) * (decay * beta[:, :, None])
    targets = torch.cat([v, k * gamma], 2)
    # not solve_triangular of the identity: with duplicate keys and β = 2 it is ten times less exact than either
    if solve == "rows":
        solved = torch.linalg.solve_triangular(lower, beta[:, :, None] * targets, upper=False, unitriangular=True)
    else:
        solved = (_UnitInverse.apply(lower) * beta[:, None]) @ targets
    u, w = solved.split([v.shape[2], k.shape[2]], 2)
    new, states, final = scan(u, w, k * to_end, through, initial, step_sizes, heads)
    return torch.baddbmm((q * gamma) @ states, (q @ k.mT) * decay, new), final
