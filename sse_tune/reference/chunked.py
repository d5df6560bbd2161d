"""The same operation by chunks of C rows: the form the kernels compute.

With b the sum of log-gates inside the chunk up to and with a row, S0 the state before the chunk, S1 the one after:

    GLA:  A_ij = Σ_d q_id k_jd exp(b_id − b_jd), j <= i     o = (q∘e^b) S0 + A v    S1 = e^{b_C}∘S0 + (k∘e^{b_C−b})ᵀ v
    GDN:  L_ij = β_i k_i·k_j exp(b_i − b_j), j < i          v' = (I + L)^-1 diag(β) (v − e^b∘k S0)
          P_ij = q_i·k_j exp(b_i − b_j), j <= i             o = e^b∘q S0 + P v'     S1 = e^{b_C} S0 + (k∘e^{b_C−b})ᵀ v'

No exponent is ever above 0: pairs j > i are masked out before exp, so a gate of -1000 is as harmless as one of 0.
"""

from __future__ import annotations

import functools

import torch

from sse_tune.errors import ProblemError
from sse_tune.reference.segments import Arguments, over_segments


def gla_chunk(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k, g `[H, C, K]`, v `[H, C, V]`, state `[H, K, V]`."""
    b = g.cumsum(1)
    last = b[:, -1:]
    later = _pairs(b, diagonal=1)
    decay = (b[:, :, None] - b[:, None]).masked_fill(later[:, :, None], float("-inf")).exp()  # [H, C, C, K]
    scores = torch.einsum("hid,hjd,hijd->hij", q, k, decay)
    o = (q * b.exp()) @ state + scores @ v
    state = last.exp().mT * state + (k * (last - b).exp()).mT @ v
    return o, state


def gdn_chunk(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k `[H, C, K]`, v `[H, C, V]`, g, beta `[H, C]`, state `[H, K, V]`."""
    b = g.cumsum(1)
    last = b[:, -1:]
    decay = (b[:, :, None] - b[:, None]).masked_fill(_pairs(b, diagonal=1), float("-inf")).exp()  # [H, C, C]
    lower = (beta[:, :, None] * (k @ k.mT) * decay).tril(-1)
    identity = torch.eye(b.shape[1], dtype=b.dtype, device=b.device)
    from_state = b.exp()[:, :, None] * (k @ state)
    new = torch.linalg.solve_triangular(
        identity + lower, beta[:, :, None] * (v - from_state), upper=False, unitriangular=True
    )
    o = b.exp()[:, :, None] * (q @ state) + ((q @ k.mT) * decay) @ new
    state = last.exp()[:, :, None] * state + (k * (last - b).exp()[:, :, None]).mT @ new
    return o, state


def _pairs(b: torch.Tensor, diagonal: int) -> torch.Tensor:
    """`[C, C]`, True at (i, j) with j - i >= diagonal: the pairs of which the key comes later."""
    size = b.shape[1]
    return torch.ones(size, size, dtype=torch.bool, device=b.device).triu(diagonal)


def scan_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None,
    state: torch.Tensor,
    *,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One segment, as `recurrent.scan_tokens`; the last chunk may be short."""
    if len(q) == 0:
        return torch.zeros_like(v), state
    outputs = []

    def chunks(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.transpose(0, 1).split(chunk_size, dim=1)

    if beta is None:
        for parts in zip(chunks(q), chunks(k), chunks(v), chunks(g)):
            o, state = gla_chunk(*parts, state)
            outputs.append(o)
    else:
        for gdn_parts in zip(chunks(q), chunks(k), chunks(v), chunks(g), chunks(beta)):
            o, state = gdn_chunk(*gdn_parts, state)
            outputs.append(o)
    return torch.cat(outputs, dim=1).transpose(0, 1), state


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    router_logits: torch.Tensor | None,
    top_k: int = 2,
    *,
    beta: torch.Tensor | None = None,
    shared_q: torch.Tensor | None = None,
    shared_k: torch.Tensor | None = None,
    shared_g: torch.Tensor | None = None,
    shared_beta: torch.Tensor | None = None,
    qk_l2norm: bool = False,
    gate_before_norm: bool = False,
    scale: float | None = None,
    read_k: int | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    partitions: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent`, by chunks of `chunk_size` rows; all other arguments, results and errors are the same.

    Raises:
        ProblemError: `chunk_size` is below 1, or as `recurrent`.
    """
    if chunk_size < 1:
        raise ProblemError("`chunk_size` must be at least 1", f"{chunk_size}", "pass 16, 32, 64 or 128")
    return over_segments(
        functools.partial(scan_chunks, chunk_size=chunk_size),
        Arguments(
            q, k, v, g, router_logits, top_k, beta, shared_q, shared_k, shared_g, shared_beta, qk_l2norm,
            gate_before_norm, scale, read_k, initial_state, output_final_state, cu_seqlens, partitions,
        ),
    )
