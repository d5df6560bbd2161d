"""Which state partitions a token writes and reads, with which weight; the balance loss; the row-sparse key map.

The router of SSE (arXiv 2507.16577): e_t = softmax(x_t W_e) over N partitions, of which the k largest are chosen. The
choice has no gradient; the weights do.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from sse_tune.errors import ProblemError

LARGEST = torch.finfo(torch.float32).max


@dataclasses.dataclass(frozen=True)
class Choice:
    """The partitions of each token, best first: slot j is written if j < top_k and read if j < read_k.

    Args:
        weights: `[R, J]`, the router's weight e of each chosen partition; carries its gradient.
        partitions: `[R, J]` int64.
    """

    weights: torch.Tensor
    partitions: torch.Tensor


class _Finite(torch.autograd.Function):
    """Clamps to ±fp32 max and lets the gradient through: that of the softmax, e∘(de − Σ e·de), needs no other."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.clamp(-LARGEST, LARGEST)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def router_weights(router_logits: torch.Tensor) -> torch.Tensor:
    """e = softmax over the last dimension; +inf counts as the largest finite number, -inf gives 0, all -inf 1/N."""
    return _Finite.apply(router_logits).softmax(-1)


def largest(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest entries of the last dimension, best first, ties to the lowest index.

    They are compared as fp32, the logits' precision in the kernels, and not after the softmax, which could round
    different logits to one weight. NaN ranks with -inf.
    """
    comparable = logits.detach().to(torch.float32)
    comparable = comparable.masked_fill(comparable.isnan(), float("-inf"))
    return comparable.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def route(
    router_logits: torch.Tensor, top_k: int, read_k: int | None = None, partitions: torch.Tensor | None = None
) -> Choice:
    """Choose each token's partitions.

    Args:
        router_logits: `[R, N]`.
        top_k: partitions a token writes.
        read_k: partitions a token reads; None: `top_k`.
        partitions: `[R, max(top_k, read_k)]`, a choice made before, to be used instead.

    Raises:
        ProblemError: top_k or read_k is not in 1..N, or `partitions` has another shape or a partition twice.
    """
    read_k = top_k if read_k is None else read_k
    rows, num_partitions = router_logits.shape
    slots = max(top_k, read_k)
    if not (1 <= top_k <= num_partitions and 1 <= read_k <= num_partitions):
        raise ProblemError(
            "1 <= top_k, read_k <= N must hold",
            f"top_k={top_k}, read_k={read_k}, N={num_partitions}",
            "pass values between 1 and the number of partitions",
        )
    if partitions is None:
        partitions = largest(router_logits, slots)
    elif tuple(partitions.shape) != (rows, slots) or bool((partitions.sort(-1).values.diff(dim=-1) == 0).any()):
        raise ProblemError(
            "`partitions` must name max(top_k, read_k) different partitions for each token",
            f"shape {tuple(partitions.shape)} for {rows} tokens, top_k={top_k}, read_k={read_k}",
            "pass `route(...).partitions`",
        )
    partitions = partitions.to(device=router_logits.device, dtype=torch.int64)
    return Choice(router_weights(router_logits).gather(-1, partitions), partitions)


def load_balance_loss(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """N/top_k · Σ_i mean_t(e_i) · mean_t(chosen_i): 1 when balanced, up to N/top_k when not.

    Args:
        router_logits: `[..., N]`; all leading dimensions are tokens.
        top_k: partitions a token writes.
    """
    num_partitions = router_logits.shape[-1]
    logits = router_logits.reshape(-1, num_partitions)
    e = router_weights(logits)
    chosen = torch.zeros_like(e).scatter(-1, largest(logits, top_k), 1.0)
    return num_partitions / top_k * (e.mean(0) * chosen.mean(0)).sum()


def topk_key_map(k_logits: torch.Tensor, g: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The row-sparse update: keys that touch `top_k` rows of the state, and log-gates that leave the others undecayed.

    Args:
        k_logits: `[..., K]`.
        g: `[..., K]`, natural log, at most 0.
        top_k: rows a token touches, 1..K.

    Returns:
        k: softmax over the `top_k` largest logits, 0 elsewhere. g: unchanged in those rows, 0 elsewhere.

    Raises:
        ProblemError: top_k is not in 1..K, or the shapes differ.
    """
    if not 1 <= top_k <= k_logits.shape[-1] or k_logits.shape != g.shape:
        raise ProblemError(
            "`k_logits` and `g` must have one shape [..., K], with 1 <= top_k <= K",
            f"{tuple(k_logits.shape)}, {tuple(g.shape)}, top_k={top_k}",
            "use a gate per key dimension",
        )
    chosen = torch.zeros_like(k_logits, dtype=torch.bool).scatter(-1, largest(k_logits, top_k), True)
    return k_logits.masked_fill(~chosen, float("-inf")).softmax(-1), g.masked_fill(~chosen, 0.0)
