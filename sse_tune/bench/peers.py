"""Other implementations of the same operation, beside ours: the paper's "varlen" pipeline over published chunk ops.

softmax and top-k; sort the (token, partition) pairs by sequence, partition and position; gather copies of q, k, v, g;
put the always-on stream in front; one call of a chunk op with cu_seqlens; add the results back by index. The chunk op
is flash-linear-attention's (Triton; GLA and GDN) or flash-qla's (TileLang; GDN with K = V = 128). A peer whose output
is not ours is reported as such and not timed.

Source: arXiv 2507.16577, section 3.3.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from sse_tune.device import Device
from sse_tune.errors import DeviceError
from sse_tune.problem import Problem
from sse_tune.reference.routing import route
from sse_tune.runtime.pipeline import Inputs
from sse_tune.templates.registry import default_plan
from sse_tune.tuning.check import run_case
from sse_tune.tuning.jobs import torch_device, workload
from sse_tune.tuning.measure import Timing, compare

# q, k, v, g and beta (None: GLA), each [1, M, H, ·]; scale; whether to normalise q and k; cu_seqlens -> o [1, M, H, V]
ChunkOp = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None", float, bool, Tensor], Tensor]
_DIFFERS = 3e-2  # relative error to our output from which on a peer computes something else
_DIFFERENTIABLE = ("q", "k", "v", "g", "beta", "shared_q", "shared_k", "shared_g", "shared_beta", "router_logits")


@dataclasses.dataclass(frozen=True)
class Peer:
    """A published chunk op: its package, and what it can run."""

    name: str
    package: str
    distribution: str
    supports: Callable[[Problem], str | None]
    load: Callable[[Problem], ChunkOp]


@dataclasses.dataclass(frozen=True)
class PeerResult:
    """What a peer takes, or the reason why it was not timed."""

    name: str
    timing: Timing | None
    reason: str | None
    error: float | None = None

    def to_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "median_us": self.timing.median_us if self.timing else None,
            "noise_us": self.timing.noise_us if self.timing else None,
            "reason": self.reason,
            "error": self.error,
        }


def varlen_sse(problem: Problem, inputs: Inputs, op: ChunkOp, scale: float) -> Tensor:
    """The paper's pipeline over a chunk op.

    Args:
        problem: with as many readers as writers.
        inputs: of the call; no initial state.
        op: runs all segments as packed sequences.
        scale: what multiplies q·k.

    Returns:
        o `[R, H, V]`, differentiable where the op is.
    """
    normalise = problem.norm != "none"
    rows = {name: getattr(inputs, name) for name in ("q", "k", "v", "g", "beta")}
    if inputs.router_logits is None:
        return _run(op, rows, scale, normalise, inputs.cu_seqlens)
    choice = route(inputs.router_logits, problem.top_k)
    starts = inputs.cu_seqlens.to(torch.int64)
    tokens = torch.arange(rows["q"].shape[0], device=starts.device)
    sequence = torch.searchsorted(starts, tokens, right=True) - 1
    segment = (sequence[:, None] * problem.num_partitions + choice.partitions).flatten()
    order = torch.argsort(segment, stable=True)  # stable: the rows of a segment stay in time order
    token = order // problem.top_k
    weight = choice.weights.flatten()[order][:, None, None]
    lengths = torch.bincount(segment, minlength=problem.sequences * problem.num_partitions)
    gathered = {name: None if x is None else x[token] for name, x in rows.items()}
    shared: dict[str, Tensor | None] = {}
    if problem.shared:
        shared = {name: getattr(inputs, f"shared_{name}") for name in ("q", "k", "g", "beta")} | {"v": rows["v"]}
        lengths = torch.cat((starts.diff(), lengths))
    if problem.norm == "after":  # the op could only normalise what the weight is already in
        normalise = False
        gathered |= {name: _normalised(gathered[name]) for name in ("q", "k")}
        shared |= {name: _normalised(shared[name]) for name in ("q", "k") if name in shared}
    for name in ("q", "k"):
        x = gathered[name]
        assert x is not None
        gathered[name] = (x * weight).to(rows["q"].dtype)
    packed = {
        name: x if x is None or not shared else torch.cat((shared[name].to(x.dtype), x))  # type: ignore[union-attr]
        for name, x in gathered.items()
    }
    lengths = lengths[lengths > 0]
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    found = _run(op, packed, scale, normalise, offsets)
    if not problem.shared:
        return torch.zeros_like(rows["v"]).index_add(0, token, found)
    return found[: tokens.numel()].index_add(0, token, found[tokens.numel() :])


def require_peers(device: Device) -> None:
    """Raises DeviceError where no peer can run: there is no GPU, or none of their packages is installed."""
    if not any(importlib.util.find_spec(peer.package) for peer in PEERS):
        names = " or ".join(peer.distribution for peer in PEERS)
        raise DeviceError(f"--peers needs {names}", "neither installed", "pip install 'sse-tune[peers]'")
    if device.kind != "cuda":
        raise DeviceError("--peers needs a GPU", device.name, "leave --peers out here")


def bench_peers(problem: Problem, device: Device, time_limit_s: float = 5.0) -> list[PeerResult]:
    """Times each peer that can run the problem, in turn, after holding its output against ours."""
    case = workload(problem, torch_device(device))
    ours, _ = run_case(default_plan(problem, device), case)
    results: list[PeerResult] = []
    calls: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    for peer in PEERS:
        name = f"varlen, {peer.distribution}"
        reason = _cannot(peer, problem)
        if reason is None:
            try:
                call = _call(problem, case.inputs, peer.load(problem), case.scale, case.do)
                error = _relative(call(), ours["o"])
                if error < _DIFFERS:
                    calls[name], errors[name] = call, error
                    continue
                reason = f"its output differs from ours by {error:.1e}"
            except Exception as failure:  # other people's packages fail in their own ways; the rest is still measured
                lines = str(failure).strip().splitlines()
                reason = f"{type(failure).__name__}: {lines[0] if lines else 'no message'}"
        results.append(PeerResult(name, None, reason))
    timings = compare(calls, torch_device(device), time_limit_s=time_limit_s) if calls else {}
    return results + [PeerResult(name, timing, None, errors[name]) for name, timing in timings.items()]


def _call(problem: Problem, inputs: Inputs, op: ChunkOp, scale: float, do: Tensor) -> Callable[[], Tensor]:
    if not problem.trains:
        return torch.no_grad()(lambda: varlen_sse(problem, inputs, op, scale))
    present = {name: x for name in _DIFFERENTIABLE if (x := getattr(inputs, name)) is not None}
    leaves = {name: x.detach().requires_grad_() for name, x in present.items()}
    used = dataclasses.replace(inputs, **leaves)

    def call() -> Tensor:
        o = varlen_sse(problem, used, op, scale)
        torch.autograd.grad(o, list(leaves.values()), do, allow_unused=True)
        return o.detach()

    return call


def _run(op: ChunkOp, rows: dict[str, Tensor | None], scale: float, normalise: bool, offsets: Tensor) -> Tensor:
    one = {name: x[None] for name, x in rows.items() if x is not None}
    return op(one["q"], one["k"], one["v"], one["g"], one.get("beta"), scale, normalise, offsets)[0]


def _normalised(x: Tensor | None) -> Tensor | None:
    return None if x is None else (x.float() * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _cannot(peer: Peer, problem: Problem) -> str | None:
    if importlib.util.find_spec(peer.package) is None:
        return f"not installed: pip install {peer.distribution}"
    if problem.readers != problem.top_k:
        return "the pipeline reads the partitions that it writes"
    return peer.supports(problem)


def _fla(problem: Problem) -> ChunkOp:
    if problem.rule == "gla":
        gla = importlib.import_module("fla.ops.gla").chunk_gla
        return lambda q, k, v, g, beta, scale, normalise, offsets: gla(
            *((_normalised(q), _normalised(k)) if normalise else (q, k)), v, g, scale=scale, cu_seqlens=offsets
        )[0]
    return _delta_rule(importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule)


def _flash_qla(problem: Problem) -> ChunkOp:
    return _delta_rule(importlib.import_module("flash_qla").chunk_gated_delta_rule)


def _delta_rule(op: Callable[..., tuple[Tensor, Tensor]]) -> ChunkOp:
    return lambda q, k, v, g, beta, scale, normalise, offsets: op(
        q, k, v, g=g, beta=beta, scale=scale, use_qk_l2norm_in_kernel=normalise, cu_seqlens=offsets
    )[0]


def _qla_supports(problem: Problem) -> str | None:
    if problem.rule != "gdn" or (problem.key_dim, problem.value_dim) != (128, 128) or problem.dtype == "fp32":
        return "it has GDN with K = V = 128 in 16-bit dtypes only"
    return None


PEERS = (
    Peer("fla", "fla", "fla-core", lambda problem: None, _fla),
    Peer("flash-qla", "flash_qla", "flash-qla", _qla_supports, _flash_qla),
)
