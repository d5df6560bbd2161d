"""What a user hands to the operation, checked: every broken rule is one ProblemError with its values and its remedy."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable

import torch

from sse_tune.errors import ProblemError
from sse_tune.problem import Problem
from sse_tune.runtime import checks
from sse_tune.runtime.offsets import even_offsets, given_offsets
from sse_tune.runtime.pipeline import WITHOUT_TOKENS, Inputs

_MAX_SLOTS = 2**31 - 1  # rows are numbered in int32
PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))
TENSORS = (
    "q", "k", "v", "g", "beta", "shared_q", "shared_k", "shared_g", "shared_beta", "router_logits", "initial_state",
    "cu_seqlens",
)  # fmt: skip


@dataclasses.dataclass(kw_only=True, eq=False)
class Arguments:
    """The arguments of `sse_attention`, as given; their meaning is told there.

    Attributes:
        tensors: those that are there, by argument name.

    Raises:
        ProblemError: one that must be a tensor is none.
    """

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
    head_groups: int = 1
    tensors: dict[str, torch.Tensor] = dataclasses.field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        given = vars(self)
        for name in TENSORS:
            value = given[name]
            if value is None and name in ("q", "k", "v", "g"):
                raise ProblemError(f"`{name}` must be a tensor", f"{name}=None", f"pass {name}")
            if value is None:
                continue
            if not isinstance(value, torch.Tensor):
                raise ProblemError(
                    f"`{name}` must be a tensor", type(value).__name__, "convert it with torch.as_tensor"
                )
            self.tensors[name] = value

    def scale_value(self) -> float:
        if self.scale is None:
            return float(self.q.shape[-1]) ** -0.5
        return float(self.scale)


Fields = tuple[tuple[str, int | str | bool | None], ...]


def check(arguments: Arguments) -> Fields:
    """The fields of the problem these arguments pose, for `pose`: plain values, which torch.compile can carry. Where
    heads come in groups it is the problem of one group.

    What the tensors hold is looked at on the CPU only, where looking costs no synchronisation: `g <= 0`, and that
    `cu_seqlens` starts at 0, never decreases and ends at T.

    Raises:
        ProblemError: a shape, dtype, device or bound does not hold.
    """
    tensors = arguments.tensors
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values())
    fields = _check(arguments, tensors, trains)
    if reads_values(tensors["q"].device):
        if "cu_seqlens" in tensors:
            checks.check_offsets(tensors["cu_seqlens"], operator.index(tensors["q"].shape[1]))
        checks.check_gates(tensors)
    return fields


def reads_values(device: torch.device) -> bool:
    """Whether checks look at what tensors there hold."""
    return device.type == "cpu"


def are_plain(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all are tensors or parameters themselves, not of a subclass, which may do as it likes."""
    return PLAIN_TYPES.issuperset(map(type, tensors))


def _check(arguments: Arguments, tensors: dict[str, torch.Tensor], trains: bool) -> Fields:
    """All that does not depend on what the tensors hold."""
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
        num_partitions, arguments.top_k, arguments.read_k, arguments.scale, arguments.qk_l2norm,
        arguments.gate_before_norm,
    )
    checks.check_head_groups(arguments.head_groups, num_heads)
    num_sequences = checks.check_cu_seqlens(tensors["cu_seqlens"], batch, seq_len) if "cu_seqlens" in tensors else None
    states = (num_sequences or batch, int(has_shared) + num_partitions, num_heads, head_dim, head_dim_v)
    checks.check_initial_state(tensors, states)
    return (
        ("rule", "gdn" if "beta" in tensors else "gla"),
        ("seq_len", seq_len),
        ("num_heads", num_heads // arguments.head_groups),
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
        ("direction", "fwd+bwd" if trains else "fwd"),
    )


@functools.lru_cache(maxsize=4096)
def pose(fields: Fields) -> Problem:
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
    tensors = {name: tensor for name, tensor in arguments.tensors.items() if name != "cu_seqlens"}
    streams = {name: flatten_tokens(name, tensor).contiguous() for name, tensor in tensors.items()}
    q, cu_seqlens = arguments.q, arguments.cu_seqlens
    offsets = even_offsets(q.shape[0], q.shape[1], q.device) if cu_seqlens is None else given_offsets(cu_seqlens)
    return Inputs(**streams, cu_seqlens=offsets)


def flatten_tokens(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the operation by its name, `[B, T, ...]` as `[R, ...]`; states have no tokens."""
    if name in WITHOUT_TOKENS:
        return tensor
    return tensor.reshape(tensor.shape[0] * tensor.shape[1], *tensor.shape[2:])
