"""What a user hands to the operation, checked: every broken rule is one ProblemError with its values and its remedy."""

from __future__ import annotations

import dataclasses
import functools

import torch

from sse_tune.errors import ProblemError
from sse_tune.problem import Problem
from sse_tune.runtime import checks
from sse_tune.runtime.pipeline import Inputs

_MAX_SLOTS = 2**31 - 1  # rows are numbered in int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The arguments of `sse_attention`, as given; their meaning is told there."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    router_logits: torch.Tensor | None
    top_k: int | None
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

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by argument name."""
        names = (
            "q", "k", "v", "g", "beta", "shared_q", "shared_k", "shared_g", "shared_beta", "router_logits",
            "initial_state", "cu_seqlens",
        )
        found = {}
        for name in names:
            value = getattr(self, name)
            if value is None and name in ("q", "k", "v", "g"):
                raise ProblemError(f"`{name}` must be a tensor", f"{name}=None", f"pass {name}")
            if value is None:
                continue
            if not isinstance(value, torch.Tensor):
                raise ProblemError(
                    f"`{name}` must be a tensor", type(value).__name__, "convert it with torch.as_tensor"
                )
            found[name] = value
        return found

    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.tensors().values())

    def scale_value(self) -> float:
        if self.scale is None:
            return float(self.q.shape[-1]) ** -0.5
        return float(self.scale)


def check(arguments: Arguments) -> tuple[tuple[str, int | str | bool | None], ...]:
    """The fields of the problem these arguments pose, for `pose`: plain values, which torch.compile can carry.

    What the tensors hold is looked at on the CPU only, where looking costs no synchronisation: `g <= 0`, and that
    `cu_seqlens` starts at 0, never decreases and ends at T.

    Raises:
        ProblemError: a shape, dtype, device or bound does not hold.
    """
    tensors = arguments.tensors()
    checks.check_devices(tensors)
    batch, seq_len, num_heads, head_dim = checks.extents("q", tensors["q"], "[B, T, H, K]", 4)
    head_dim_v = checks.extents("v", tensors["v"], "[B, T, H, V]", 4)[3]
    if batch == 0 or seq_len == 0:
        raise ProblemError(
            "there must be at least one token", f"B={batch}, T={seq_len}", "skip the call on empty input"
        )
    num_partitions = 0
    if "router_logits" in tensors:
        num_partitions = checks.extents("router_logits", tensors["router_logits"], "[B, T, N]", 3)[2]
        if num_partitions == 0:
            raise ProblemError(
                "`router_logits` needs at least one partition", "N=0", "pass router_logits=None for the plain operation"
            )
    has_shared = checks.check_streams(tensors) or num_partitions == 0
    checks.check_shapes(tensors, (batch, seq_len), num_heads, head_dim, head_dim_v, num_partitions)
    checks.check_dtypes(tensors)
    checks.check_numbers(
        num_partitions, arguments.top_k, arguments.scale, arguments.qk_l2norm, arguments.gate_before_norm
    )
    num_sequences = checks.check_cu_seqlens(tensors["cu_seqlens"], batch, seq_len) if "cu_seqlens" in tensors else None
    states = (num_sequences or batch, int(has_shared) + num_partitions, num_heads, head_dim, head_dim_v)
    checks.check_initial_state(tensors, states)
    checks.check_gates(tensors)
    return (
        ("rule", "gdn" if "beta" in tensors else "gla"),
        ("seq_len", seq_len),
        ("num_heads", num_heads),
        ("head_dim", head_dim),
        ("head_dim_v", head_dim_v),
        ("batch", batch),
        ("num_partitions", num_partitions),
        ("top_k", arguments.top_k if num_partitions else 0),
        ("read_k", arguments.read_k if num_partitions else 0),
        ("shared", has_shared),
        ("norm", "none" if not arguments.qk_l2norm else ("before" if arguments.gate_before_norm else "after")),
        ("dtype", checks.DTYPE_NAMES[tensors["q"].dtype]),
        ("num_sequences", num_sequences),
        ("direction", "fwd+bwd" if arguments.needs_grad() else "fwd"),
    )


@functools.lru_cache(maxsize=4096)
def pose(fields: tuple[tuple[str, int | str | bool | None], ...]) -> Problem:
    """The problem of checked fields.

    Raises:
        ProblemError: a size is beyond what a problem may have.
    """
    problem = Problem(**dict(fields))  # type: ignore[arg-type]
    slots = problem.batch * problem.seq_len * problem.lanes
    if slots > _MAX_SLOTS:
        raise ProblemError(
            "tokens times the partitions each takes part in must stay below 2^31",
            f"{slots}, B·T={problem.batch * problem.seq_len}", "split the batch",
        )
    return problem


def flatten(arguments: Arguments) -> Inputs:
    """The contiguous token streams of checked arguments; copies what is not contiguous."""
    q, cu_seqlens = arguments.q, arguments.cu_seqlens
    batch, seq_len = q.shape[0], q.shape[1]

    def tokens(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.reshape(batch * seq_len, *tensor.shape[2:]).contiguous()

    def stream(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(batch * seq_len, *tensor.shape[2:]).contiguous()

    if cu_seqlens is None:
        # made on the device: a copy from a Python list would wait for it
        offsets = torch.arange(0, (batch + 1) * seq_len, seq_len, dtype=torch.int32, device=q.device)
    else:
        offsets = cu_seqlens.to(torch.int32).contiguous()
    state = arguments.initial_state
    return Inputs(
        q=stream(q), k=stream(arguments.k), v=stream(arguments.v), g=stream(arguments.g), cu_seqlens=offsets,
        beta=tokens(arguments.beta), shared_q=tokens(arguments.shared_q), shared_k=tokens(arguments.shared_k),
        shared_g=tokens(arguments.shared_g), shared_beta=tokens(arguments.shared_beta),
        router_logits=tokens(arguments.router_logits),
        initial_state=None if state is None else state.contiguous(),
    )
