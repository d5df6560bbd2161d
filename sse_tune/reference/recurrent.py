"""The definition of the operation, token by token.

    GLA:  S_t = Diag(exp g_t) S_{t-1} + k_tᵀ v_t                                 o_t = q_t S_t
    GDN:  S_t = exp(g_t) S_{t-1};  S_t += k_tᵀ β_t (v_t − k_t S_t)                o_t = q_t S_t

with q and k already scaled by the router's weight, the norm and the scale (`segments.py`).
"""

from __future__ import annotations

import torch

from sse_tune.reference.segments import Arguments, over_segments


def scan_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One segment: q, k `[n,H,K]`, v `[n,H,V]`, g `[n,H,K]` or `[n,H]`, state `[H,K,V]`; all heads at once."""
    outputs = []
    for t in range(len(q)):
        decay = g[t].exp()
        state = state * (decay[:, None, None] if decay.dim() == 1 else decay[:, :, None])  # decay, then erase and write
        value = v[t]
        if beta is not None:
            value = beta[t][:, None] * (value - torch.einsum("hk,hkv->hv", k[t], state))
        state = state + torch.einsum("hk,hv->hkv", k[t], value)
        outputs.append(torch.einsum("hk,hkv->hv", q[t], state))
    return (torch.stack(outputs) if outputs else torch.zeros_like(v)), state


def recurrent(
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """SSE attention by its definition; GDN when `beta` is given, GLA when not.

    Args:
        q, k: `[B, T, H, K]`. v: `[B, T, H, V]`. g: `[B, T, H, K]` (GLA) or `[B, T, H]` (GDN), natural log, at most 0.
        router_logits: `[B, T, N]`; None: the one stream q, k, g, beta, always on.
        top_k, read_k: partitions a token writes and reads; read_k None: top_k.
        beta: `[B, T, H]`.
        shared_q, shared_k, shared_g, shared_beta: the always-on partition's streams; None: there is none.
        qk_l2norm, gate_before_norm: the norm of q and k, and whether the router's weight meets them before it.
        scale: of q·k; None: K^-1/2.
        initial_state: `[S, P, H, K, V]`, the shared partition first.
        cu_seqlens: `[S + 1]` offsets of packed sequences; requires B == 1.
        partitions: `[B, T, max(top_k, read_k)]`, a choice made before, to be used instead of the router's.

    Returns:
        o: `[B, T, H, V]`. The final state `[S, P, H, K, V]`, or None unless `output_final_state`.

    Raises:
        ProblemError: top_k, read_k, partitions, cu_seqlens or initial_state does not fit.
    """
    return over_segments(
        scan_tokens,
        Arguments(
            q, k, v, g, router_logits, top_k, beta, shared_q, shared_k, shared_g, shared_beta, qk_l2norm,
            gate_before_norm, scale, read_k, initial_state, output_final_state, cu_seqlens, partitions,
        ),
    )
