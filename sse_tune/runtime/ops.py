"""The public operation: checks its arguments, asks for the best known plan, runs it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sse_tune.errors import ProblemError
from sse_tune.reference.routing import largest, router_weights
from sse_tune.runtime.again import Calls, key_of
from sse_tune.runtime.arguments import Arguments, Fields, check
from sse_tune.runtime.call import call
from sse_tune.runtime.dispatch import resolve


def sse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    router_logits: Tensor | None,
    top_k: int | None = None,
    *,
    beta: Tensor | None = None,
    shared_q: Tensor | None = None,
    shared_k: Tensor | None = None,
    shared_g: Tensor | None = None,
    shared_beta: Tensor | None = None,
    qk_l2norm: bool = False,
    gate_before_norm: bool = False,
    scale: float | None = None,
    read_k: int | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    head_groups: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with sparse state expansion, differentiable, by the best kernels known for this GPU and shape.

    Args:
        q: `[B, T, H, K]`, K up to 256; bfloat16, float16 or float32, as are k, v, shared_q and shared_k.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`, V up to 512.
        g: log-gate in natural log, at most 0, any of the three dtypes: GLA `[B, T, H, K]`, GDN `[B, T, H]`. Looked
            at on the CPU only: on a GPU that would wait for it.
        router_logits: `[B, T, N]`; softmax and choice are made in fp32, ties go to the lowest partition. None: the
            always-on stream q, k, g, beta alone, that is, plain GLA or GDN.
        top_k: partitions each token writes, 1..N; needed with `router_logits`.
        beta: `[B, T, H]`: the gated delta rule (GDN). None: gated linear attention (GLA).
        shared_q: the always-on partition's own streams, shapes as of q, k, g and beta. None: there is none.
        qk_l2norm: normalise q and k over K.
        gate_before_norm: the router's weight multiplies q and k before that norm, not after it.
        scale: what multiplies q·k. None: K^-1/2.
        read_k: partitions each token reads. None: `top_k`.
        initial_state: `[S, P, H, K, V]` fp32, P = 1 + N with the always-on partition at index 0, N without, 1 in the
            plain operation. None: zeros.
        output_final_state: also return the state after each sequence's last token.
        cu_seqlens: `[S + 1]` int32 or int64 on the device of q, first token of each packed sequence and T; B == 1.
            None: S = B sequences of T tokens.
        head_groups: the heads are computed in so many groups, one after the other, by the kernels known for the heads
            of one group; divides H. Less memory at the peak and between the passes, for copies of each group's inputs
            and, training, for the forward pass of all groups but one run twice (docs/memory.md).

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state `[S, P, H, K, V]` fp32 or None.

    Raises:
        ProblemError: a shape, dtype, device or bound above does not hold.

    Source: arXiv 2507.16577, sections 2 and 3.
    """
    given = q, k, v, g, beta, shared_q, shared_k, shared_g, shared_beta, router_logits, initial_state, cu_seqlens
    numbers = top_k, read_k, scale, head_groups, qk_l2norm, gate_before_norm, output_final_state
    key = key_of(given, numbers)
    if key is not None:
        known, decided = _calls.find(key)
        if known is not None and resolve(*decided.asked) is decided.answer:
            return known.run(given)
    arguments = Arguments(
        q=q, k=k, v=v, g=g, router_logits=router_logits, top_k=top_k, beta=beta, shared_q=shared_q,
        shared_k=shared_k, shared_g=shared_g, shared_beta=shared_beta, qk_l2norm=qk_l2norm,
        gate_before_norm=gate_before_norm, scale=scale, read_k=read_k, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, head_groups=head_groups,
    )
    asked = check(arguments), str(q.device)
    answer = _resolve(*asked)
    results = call(arguments, *answer)
    if key is not None:
        _calls.remember(key, arguments, answer, _Decided(asked, answer))
    return results


_calls = Calls()


class _Decided(NamedTuple):
    """What `resolve` was asked and said: the same again unless databases were looked into anew."""

    asked: tuple[Fields, str]
    answer: tuple[str, str, str]


@torch.compiler.assume_constant_result
def _resolve(fields: Fields, device: str) -> tuple[str, str, str]:
    """Graph, problem and plan as strings: what torch.compile keeps as constants of the sizes it compiles for."""
    return resolve(fields, device)


def load_balance_loss(router_logits: Tensor, top_k: int) -> Tensor:
    """The auxiliary loss that keeps the partitions evenly used: N/top_k · Σ_i mean_t(e_i) · mean_t(chosen_i).

    Args:
        router_logits: `[..., N]`, any float dtype; computed in fp32 over all tokens.
        top_k: partitions each token writes, 1..N.

    Returns:
        A scalar, fp32: 1 when all partitions are used alike. Its gradient goes through e.

    Raises:
        ProblemError: top_k is not in 1..N, or there is no token.

    Source: arXiv 2507.16577; as in the authors' code.
    """
    num_partitions = router_logits.shape[-1] if router_logits.dim() else 0
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= num_partitions:
        raise ProblemError(
            "1 <= top_k <= N must hold", f"top_k={top_k!r}, N={num_partitions}",
            "pass a top_k between 1 and the number of partitions",
        )
    if router_logits.numel() == 0 or not router_logits.is_floating_point():
        raise ProblemError(
            "`router_logits` must be [..., N] of a float dtype with at least one token",
            f"{list(router_logits.shape)} of {router_logits.dtype}", "skip the call on empty input",
        )
    logits = router_logits.reshape(-1, num_partitions).float()
    chosen = largest(logits, top_k).flatten()
    counts = torch.zeros(num_partitions, dtype=torch.int64, device=logits.device)
    counts = counts.scatter_add(0, chosen, torch.ones_like(chosen))  # integers: the same in any order
    share = counts.to(torch.float32) / logits.shape[0]
    return num_partitions / top_k * (router_weights(logits).mean(0) * share).sum()
