"""SSE as PyTorch modules whose parameters have the names and shapes of the authors', so that their checkpoints load.

SSEGLA and SSEGDN differ in their gates and in the norm of keys and queries; the rest is shared here.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sse_tune.errors import ProblemError
from sse_tune.runtime.ops import load_balance_loss, sse_attention


@dataclasses.dataclass(frozen=True)
class LayerState:
    """What one layer carries from one call to the next.

    Args:
        recurrent: `[S, 1 + N, H_v, K, V]` fp32, the always-on partition first.
        q_conv: `[S, conv_size - 1, H·K]`, the last inputs of the short convolution; None without one.
        k_conv: the same for keys.
    """

    recurrent: Tensor
    q_conv: Tensor | None = None
    k_conv: Tensor | None = None


class ShortConvolution(nn.Conv1d):
    """A causal convolution along the tokens of each sequence, one filter a channel; weight `[D, 1, W]`."""

    def __init__(self, channels: int, size: int, bias: bool) -> None:
        super().__init__(channels, channels, size, groups=channels, bias=bias)

    def run(self, x: Tensor, cu_seqlens: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        """Filter packed tokens.

        Args:
            x: `[R, D]`.
            cu_seqlens: `[S + 1]`.
            cache: `[S, W - 1, D]`, the inputs before the first token; None: zeros.

        Returns:
            `[R, D]`, and the cache for the tokens that follow.
        """
        size = self.kernel_size[0]
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        if cache is None:
            cache = x.new_zeros(starts.shape[0], size - 1, x.shape[1])
        token = torch.arange(x.shape[0], device=x.device)
        sequence = torch.searchsorted(ends, token, right=True)
        # rows of `history`: the tokens, then size - 1 of each sequence's past; none is copied from another sequence
        history = torch.cat([x, cache.to(x.dtype).flatten(0, 1)])

        def rows(position: Tensor, of: Tensor) -> Tensor:
            past = x.shape[0] + of * (size - 1) + position + size - 1
            return torch.where(position >= 0, starts[of] + position, past)

        weight = self.weight[:, 0]  # [D, W], the last entry meets the token itself
        y = x * weight[:, size - 1]
        for back in range(1, size):
            y = y + history[rows(token - starts[sequence] - back, sequence)] * weight[:, size - 1 - back]
        last = torch.arange(1 - size, 0, device=x.device) + (ends - starts)[:, None]  # [S, W - 1]
        of = torch.arange(starts.shape[0], device=x.device)[:, None].expand_as(last)
        return (y if self.bias is None else y + self.bias), history[rows(last, of)]


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, times silu(gate) if there is a gate; in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        wide = x.float()
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()
        return (y if gate is None else y * F.silu(gate.float())).to(x.dtype)


def _two_maps(size_in: int, middle: int, size_out: int, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size_in, middle, bias=False), nn.Linear(middle, size_out, bias=bias))


class _SSE(nn.Module):
    """What both layers share: projections, short convolutions, router, output norm and gate."""

    def __init__(
        self, *, hidden_size: int, expand_v: float, head_dim: int, num_heads: int, num_v_heads: int | None,
        use_output_gate: bool, use_short_conv: bool, conv_size: int, conv_bias: bool, num_sparse_partition: int,
        num_writer: int, num_reader: int, use_q_softmax: bool, use_k_softmax: bool, norm_eps: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.num_v_heads, self.head_k_dim = num_heads, num_v_heads or num_heads, head_dim
        self.head_v_dim = int(head_dim * expand_v)
        if self.head_v_dim != head_dim * expand_v:
            raise ProblemError(
                "head_dim * expand_v must be an integer", f"{head_dim} * {expand_v}", "change expand_v"
            )
        if self.num_v_heads % num_heads:
            raise ProblemError(
                "num_v_heads must be a multiple of num_heads", f"{self.num_v_heads} and {num_heads}", "change one"
            )
        for name, count in (("num_writer", num_writer), ("num_reader", num_reader)):
            if not 1 <= count <= num_sparse_partition:
                raise ProblemError(
                    f"1 <= {name} <= num_sparse_partition must hold", f"{count}, {num_sparse_partition}", "change one"
                )
        self.num_sparse_partition, self.num_writer, self.num_reader = num_sparse_partition, num_writer, num_reader
        self.use_q_softmax, self.use_k_softmax = use_q_softmax, use_k_softmax
        key_dim, value_dim = num_heads * head_dim, self.num_v_heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.lora_q_proj = _two_maps(hidden_size, self.head_v_dim, key_dim)
        self.lora_k_proj = _two_maps(hidden_size, self.head_v_dim, key_dim)
        self.e_proj = nn.Linear(hidden_size, num_sparse_partition, bias=False)
        self.q_conv1d_shared = ShortConvolution(key_dim, conv_size, conv_bias) if use_short_conv else None
        self.k_conv1d_shared = ShortConvolution(key_dim, conv_size, conv_bias) if use_short_conv else None
        self.g_proj = _two_maps(hidden_size, self.head_v_dim, value_dim) if use_output_gate else None
        self.o_norm = RMSNorm(self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Log-gates of the always-on and the sparse partitions, and their betas if the rule has them."""
        raise AssertionError("a layer defines its gates")

    _qk_l2norm = False

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        state: LayerState | None = None,
        output_state: bool = False,
        head_groups: int = 1,
    ) -> tuple[Tensor, LayerState | None, Tensor]:
        """Mix the tokens of each sequence.

        Args:
            x: `[B, T, hidden_size]`.
            cu_seqlens: `[S + 1]`, packed sequences; requires B == 1.
            state: what an earlier call returned for the tokens before these.
            output_state: also return the state after these tokens.
            head_groups: as of `sse_attention`: the value heads in so many groups, less memory for some time.

        Returns:
            y `[B, T, hidden_size]`, the state or None, and the router's logits `[B, T, N]` for `balance_loss`.

        Raises:
            ProblemError: as `sse_attention`.
        """
        q1, k1 = self.q_proj(x), self.k_proj(x)
        q2, k2 = q1 + self.lora_q_proj(x), k1 + self.lora_k_proj(x)
        router_logits = self.e_proj(x)
        q_conv = k_conv = None
        if self.q_conv1d_shared is not None and self.k_conv1d_shared is not None:
            q1, q_conv = self._convolve(self.q_conv1d_shared, q1, cu_seqlens, None if state is None else state.q_conv)
            k1, k_conv = self._convolve(self.k_conv1d_shared, k1, cu_seqlens, None if state is None else state.k_conv)
        q1, q2 = (self._activate(self._heads(q), self.use_q_softmax) for q in (q1, q2))
        k1, k2 = (self._activate(self._heads(k), self.use_k_softmax) for k in (k1, k2))
        v = F.silu(self.v_proj(x).unflatten(-1, (self.num_v_heads, self.head_v_dim)))
        g1, g2, beta1, beta2 = self._gates(x)
        o, recurrent = sse_attention(
            self._repeat(q2), self._repeat(k2), v, g2, router_logits, self.num_writer, beta=beta2,
            shared_q=self._repeat(q1), shared_k=self._repeat(k1), shared_g=g1, shared_beta=beta1,
            qk_l2norm=self._qk_l2norm, gate_before_norm=self._qk_l2norm, read_k=self.num_reader,
            initial_state=None if state is None else state.recurrent, output_final_state=output_state,
            cu_seqlens=cu_seqlens, head_groups=head_groups,
        )  # fmt: skip
        gate = None if self.g_proj is None else self.g_proj(x).unflatten(-1, (self.num_v_heads, self.head_v_dim))
        y = self.o_proj(self.o_norm(o, gate).flatten(-2))
        return y, None if recurrent is None else LayerState(recurrent, q_conv, k_conv), router_logits

    def balance_loss(self, router_logits: Tensor) -> Tensor:
        """The loss that keeps this layer's partitions evenly used; add it with a weight such as 0.001."""
        return load_balance_loss(router_logits, self.num_writer)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_k_dim))

    def _repeat(self, x: Tensor) -> Tensor:
        """As many heads as v has: each key head serves a run of value heads."""
        return x if self.num_v_heads == self.num_heads else x.repeat_interleave(self.num_v_heads // self.num_heads, 2)

    @staticmethod
    def _activate(x: Tensor, softmax: bool) -> Tensor:
        return F.softmax(x.float(), dim=-1).to(x.dtype) if softmax else F.silu(x)

    @staticmethod
    def _convolve(
        conv: ShortConvolution, x: Tensor, cu_seqlens: Tensor | None, cache: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch, seq_len = x.shape[:2]
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, (batch + 1) * seq_len, seq_len, device=x.device)
        y, cache = conv.run(x.flatten(0, 1), cu_seqlens, cache)
        return y.view_as(x), cache


class SSEGLA(_SSE):
    """SSE over gated linear attention; arguments and their defaults are the authors'.

    Args:
        hidden_size: of x.
        expand_v: V / K.
        head_dim: K.
        num_heads: of q and k.
        num_v_heads: of v, a multiple of `num_heads`; None: as many.
        use_output_gate: multiply the normed output by silu(g_proj(x)).
        use_short_conv: filter q and k of the always-on partition.
        conv_size: tokens the filter sees.
        conv_bias: whether it has a bias.
        num_sparse_partition: N.
        num_writer: partitions a token writes.
        num_reader: partitions a token reads.
        use_q_softmax: softmax instead of silu on q.
        use_k_softmax: softmax instead of silu on k.
        gate_logit_normalizer: what divides the log-gate.
        gate_low_rank_dim: rank of the gates' projections.
        norm_eps: of the output norm.

    Source: arXiv 2507.16577.
    """

    def __init__(
        self, hidden_size: int = 2048, expand_v: float = 1.0, head_dim: int = 256, num_heads: int = 6,
        num_v_heads: int | None = None, use_output_gate: bool = True, use_short_conv: bool = False,
        conv_size: int = 4, conv_bias: bool = False, num_sparse_partition: int = 4, num_writer: int = 1,
        num_reader: int = 1, use_q_softmax: bool = False, use_k_softmax: bool = True,
        gate_logit_normalizer: int = 16, gate_low_rank_dim: int = 16, norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__(
            hidden_size=hidden_size, expand_v=expand_v, head_dim=head_dim, num_heads=num_heads,
            num_v_heads=num_v_heads, use_output_gate=use_output_gate, use_short_conv=use_short_conv,
            conv_size=conv_size, conv_bias=conv_bias, num_sparse_partition=num_sparse_partition,
            num_writer=num_writer, num_reader=num_reader, use_q_softmax=use_q_softmax,
            use_k_softmax=use_k_softmax, norm_eps=norm_eps,
        )  # fmt: skip
        self.gate_logit_normalizer = gate_logit_normalizer
        key_dim = num_heads * head_dim
        self.gk_proj = nn.ModuleList(_two_maps(hidden_size, gate_low_rank_dim, key_dim, bias=True) for _ in range(2))

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        g1, g2 = (self._gate(self._heads(proj(x))) for proj in self.gk_proj)
        return g1, g2, None, None

    def _gate(self, logits: Tensor) -> Tensor:
        """Log-gates, computed in fp32 and as wide as the keys, in their dtype."""
        return self._repeat((F.logsigmoid(logits.float()) / self.gate_logit_normalizer).to(logits.dtype))


class SSEGDN(_SSE):
    """SSE over the gated delta rule, q and k l2-normalised after the router's gate; arguments are the authors'.

    Args:
        hidden_size, expand_v, head_dim, num_heads, num_v_heads, use_output_gate, use_short_conv, conv_size, conv_bias,
            num_sparse_partition, num_writer, num_reader, use_q_softmax, use_k_softmax, norm_eps: as of `SSEGLA`.
        allow_neg_eigval: beta up to 2.

    Source: arXiv 2507.16577; gated delta rule: arXiv 2412.06464.
    """

    _qk_l2norm = True

    def __init__(
        self, hidden_size: int = 2048, expand_v: float = 2.0, head_dim: int = 256, num_heads: int = 6,
        num_v_heads: int | None = None, use_output_gate: bool = True, use_short_conv: bool = False,
        allow_neg_eigval: bool = False, conv_size: int = 4, conv_bias: bool = False, num_sparse_partition: int = 4,
        num_writer: int = 1, num_reader: int = 1, use_q_softmax: bool = False, use_k_softmax: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__(
            hidden_size=hidden_size, expand_v=expand_v, head_dim=head_dim, num_heads=num_heads,
            num_v_heads=num_v_heads, use_output_gate=use_output_gate, use_short_conv=use_short_conv,
            conv_size=conv_size, conv_bias=conv_bias, num_sparse_partition=num_sparse_partition,
            num_writer=num_writer, num_reader=num_reader, use_q_softmax=use_q_softmax,
            use_k_softmax=use_k_softmax, norm_eps=norm_eps,
        )  # fmt: skip
        self.allow_neg_eigval = allow_neg_eigval
        gates = 2 * self.num_v_heads  # the always-on partition's, then the sparse ones'
        self.a_proj = nn.Linear(hidden_size, gates, bias=False)
        self.b_proj = nn.Linear(hidden_size, gates, bias=False)
        # decay rates 1..16 and step sizes 0.001..0.1, as is usual for gated delta rules
        self.A_log = nn.Parameter(torch.empty(gates).uniform_(1, 16).log())
        step = torch.empty(gates).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = step

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        beta = self.b_proj(x).float().sigmoid()
        if self.allow_neg_eigval:
            beta = beta * 2.0
        g = -self.A_log.float().exp() * F.softplus(self.a_proj(x).float() + self.dt_bias.float())
        (g1, g2), (beta1, beta2) = g.chunk(2, -1), beta.chunk(2, -1)
        return g1, g2, beta1, beta2
