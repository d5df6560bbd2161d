"""The only sequential part: states from chunk to chunk, all segments and heads of a step in one batched product.

    V'_c = U_c − W_c S_c        S_{c+1} = decay_c ∘ S_c + Tᵀ_c V'_c

GLA has no W: V' = U. The gradient is written out, so that autograd neither slices nor pads inside the loop:

    dV' = dV'_out + T_c dS_{c+1}     dS_c = decay_c ∘ dS_{c+1} − Wᵀ_c dV' + dS_out_c
    dU = dV'     dW = −dV' Sᵀ_c     dT = V' dSᵀ_{c+1}     d decay = S_c ∘ dS_{c+1}, summed where decay is broadcast
"""

from __future__ import annotations

from typing import Any

import torch


def _steps(step_sizes: list[int], heads: int) -> list[tuple[slice, int]]:
    """The batch entries of each step, and how many there are."""
    spans, start = [], 0
    for size in step_sizes:
        spans.append((slice(start, start + size * heads), size * heads))
        start += size * heads
    return spans


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: torch.Tensor,  # [chunks·H, C, V]
        w: torch.Tensor | None,  # [chunks·H, C, K]
        tail: torch.Tensor,  # [chunks·H, C, K]: T, the keys decayed to the end of the chunk
        decay: torch.Tensor,  # [chunks·H, K or 1, 1]
        initial: torch.Tensor,  # [segments·H, K, V], longest segment first
        step_sizes: list[int],
        heads: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        states = u.new_empty(u.shape[0], tail.shape[2], u.shape[2])
        new = u if w is None else torch.empty_like(u)
        state = initial.clone()
        for span, count in _steps(step_sizes, heads):
            now = state[:count]
            states[span] = now
            if w is not None:
                torch.baddbmm(u[span], w[span], now, alpha=-1, out=new[span])
            now.mul_(decay[span]).baddbmm_(tail[span].mT, new[span])
        ctx.save_for_backward(w, tail, decay, states, new)
        ctx.step_sizes, ctx.heads = step_sizes, heads
        return new.clone() if w is None else new, states, state

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        d_new, d_states, d_final = grads
        w, tail, decay, states, new = ctx.saved_tensors
        after = torch.empty_like(states)  # gradient of the state after each chunk
        du = torch.empty_like(new)
        state = d_final.clone()
        for span, count in reversed(_steps(ctx.step_sizes, ctx.heads)):
            now = state[:count]
            after[span] = now
            torch.baddbmm(d_new[span], tail[span], now, out=du[span])
            now.mul_(decay[span])
            if w is not None:
                now.baddbmm_(w[span].mT, du[span], alpha=-1)
            now.add_(d_states[span])
        dw = None if w is None else torch.bmm(du, states.mT).neg_()
        d_decay = (states * after).sum(2, keepdim=True)
        if decay.shape[1] == 1:
            d_decay = d_decay.sum(1, keepdim=True)
        return du, dw, torch.bmm(new, after.mT), d_decay, state, None, None


def scan(
    u: torch.Tensor,
    w: torch.Tensor | None,
    tail: torch.Tensor,
    decay: torch.Tensor,
    initial: torch.Tensor,
    step_sizes: list[int],
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """V' `[chunks·H, C, V]`, the states before each chunk `[chunks·H, K, V]`, and the final ones, as `initial`."""
    return _Scan.apply(u, w, tail, decay, initial, step_sizes, heads)
