"""Other implementations of the same operation: the pipelines of `pipelines.py` over published chunk ops.

The chunk op is flash-linear-attention's (Triton; GLA and GDN) or flash-qla's (TileLang; GDN with K = V = 128). Where
there are no sparse partitions, the always-on stream is that op alone: no pipeline is put around it. A peer is held
against the float64 reference before it is timed; one that computes something else, fails or is not installed is
reported with the reason instead.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sse_tune.bench.memory import free
from sse_tune.bench.pipelines import ChunkOp, normalised, run_pipeline
from sse_tune.bench.sides import Run, Side, calls_of, directions_of, peak_bytes
from sse_tune.device import Device
from sse_tune.errors import DeviceError
from sse_tune.problem import Problem
from sse_tune.tuning.compare import exact
from sse_tune.tuning.inputs import Case
from sse_tune.tuning.jobs import torch_device, workload

DIFFERS = 3e-2  # relative Frobenius error to the reference from which on a peer computes something else
CHUNK_OP = "chunk op"  # in place of a pipeline's name: one call of the op
_CHECKED_TOKENS, _CHECKED_SEQUENCES = 512, 3


@dataclasses.dataclass(frozen=True)
class Peer:
    """A pipeline over a published chunk op, or that op alone.

    Args:
        pipeline: one of `pipelines.LAYOUTS`, or `CHUNK_OP` for problems without sparse partitions.
        package, distribution: the op's, as it is imported and as it is installed.
        supports: why it cannot run a problem; None: it can.
        load: the op for a problem.
    """

    pipeline: str
    package: str
    distribution: str
    supports: Callable[[Problem], str | None]
    load: Callable[[Problem], ChunkOp]

    @property
    def tunes_by_triton(self) -> bool:
        """Whether its first call compiles many candidates of each kernel (`ahead.py`)."""
        return self.package == "fla"

    @property
    def name(self) -> str:
        return f"{self.pipeline}, {self.distribution}"


@dataclasses.dataclass(frozen=True)
class PeerReport:
    """What was found before anything was timed.

    Args:
        name: of the peer.
        reason: why it is not timed; None: it is.
        error: of its output, relative to the reference; None: it gave none.
        gradient_error: the largest one of its gradients, for a training problem; reported, no reason to refuse it.
    """

    name: str
    reason: str | None
    error: float | None = None
    gradient_error: float | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain data; an error that is no number is None, for JSON has none such."""
        fields = dataclasses.asdict(self)
        return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in fields.items()}


def require_peers(device: Device) -> None:
    """Raises DeviceError where no peer can run: there is no GPU, or none of their packages is installed."""
    if not any(_installed(peer) for peer in PEERS):
        names = " or ".join(dict.fromkeys(peer.distribution for peer in PEERS))
        raise DeviceError(f"--peers needs {names}", "neither installed", "pip install 'sse-tune[peers]'")
    if device.kind != "cuda":
        raise DeviceError("--peers needs a GPU", device.name, "leave --peers out here")


def peers_of(problem: Problem) -> tuple[Peer, ...]:
    """Those of the problem's kind: pipelines where there are sparse partitions, else the chunk ops themselves."""
    return tuple(peer for peer in PEERS if (peer.pipeline == CHUNK_OP) == (problem.num_partitions == 0))


def peer_sides(problem: Problem, device: Device, cases: Mapping[str, Case]) -> tuple[list[Side], list[PeerReport]]:
    """Each peer held against the reference, then run once at full size.

    Args:
        problem: what is measured.
        device: where.
        cases: what follows the name of a side -> the inputs it is measured with.

    Returns:
        The sides of the peers that can be timed, and a report of each peer.
    """
    sides: list[Side] = []
    reports: list[PeerReport] = []
    for peer in peers_of(problem):
        found, report = _try(peer, problem, device, cases)
        sides.extend(found)
        reports.append(report)
    return sides, reports


def checked_problem(problem: Problem) -> Problem:
    """The smaller problem a peer is checked on: heads, dtype, N and top_k are those of the problem."""
    packed = problem.num_sequences
    return problem.replace(
        seq_len=min(problem.seq_len, _CHECKED_TOKENS),
        batch=min(problem.batch, _CHECKED_SEQUENCES),
        num_sequences=None if packed is None else min(packed, _CHECKED_SEQUENCES),
    )


def _try(peer: Peer, problem: Problem, device: Device, cases: Mapping[str, Case]) -> tuple[list[Side], PeerReport]:
    reason = cannot(peer, problem)
    if reason is not None:
        return [], PeerReport(peer.name, reason)
    error, gradient_error = None, None
    try:
        op = peer.load(problem)
        small = workload(checked_problem(problem), torch_device(device))
        error, gradient_error = _errors(run_of(peer, small.problem, op, small.scale), small)
        if not error < DIFFERS:  # NaN too
            reason = f"its output differs from the reference by {error:.1e}"
            return [], PeerReport(peer.name, reason, error, gradient_error)
        sides = []
        for suffix, case in cases.items():
            calls = calls_of(run_of(peer, problem, op, case.scale), problem, case.inputs, case.do)
            for way in directions_of(problem):
                sides.append(Side(peer.name + suffix, way, calls[way], peak_bytes(calls[way], device)))
    except Exception as failure:  # other people's packages fail in their own ways; the rest is still measured
        free(failure)  # what it allocated before it ran out of memory is not for the others to miss
        lines = str(failure).strip().splitlines()
        reason = f"{type(failure).__name__}: {lines[0] if lines else 'no message'}"
        return [], PeerReport(peer.name, reason, error, gradient_error)
    return sides, PeerReport(peer.name, None, error, gradient_error)


def run_of(peer: Peer, problem: Problem, op: ChunkOp, scale: float) -> Run:
    return lambda inputs: run_pipeline(peer.pipeline, problem, inputs, op, scale)


def _errors(run: Run, case: Case) -> tuple[float, float | None]:
    """Of the output, and the largest of the gradients; what has no size in the reference is left out."""
    expected = exact(case).results
    calls = calls_of(run, case.problem, case.inputs, case.do)
    error = _relative(calls["fwd"](), expected["o"])
    if not case.problem.trains:
        return error, None
    found = calls["fwd+bwd"]()
    assert isinstance(found, dict)
    errors = [_relative(x, expected[name]) for name, x in found.items() if name != "o" and expected[name].any()]
    return _largest([error, _relative(found["o"], expected["o"])]), _largest(errors)


def _largest(errors: list[float]) -> float:
    """NaN where one of them is, which `max` would pass over."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


def _relative(found: object, expected: Tensor) -> float:
    assert isinstance(found, Tensor)
    return float((found.to(torch.float64) - expected).norm() / expected.norm())


def cannot(peer: Peer, problem: Problem) -> str | None:
    if not _installed(peer):
        return f"not installed: pip install {peer.distribution}"
    if problem.readers != problem.top_k:
        return "the pipeline reads the partitions that it writes"
    return peer.supports(problem)


def _installed(peer: Peer) -> bool:
    return importlib.util.find_spec(peer.package) is not None


def _fla(problem: Problem) -> ChunkOp:
    """fla's own kernels: its entry point for GDN hands over to flash-qla where that is installed."""
    if problem.rule == "gla":
        gla = importlib.import_module("fla.ops.gla").chunk_gla
        return lambda q, k, v, g, beta, scale, normalise, offsets: gla(
            *((normalised(q), normalised(k)) if normalise else (q, k)), v, g, scale=scale, cu_seqlens=offsets
        )[0]
    return _delta_rule(inspect.unwrap(importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule))


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
    Peer("varlen", "fla", "fla-core", lambda problem: None, _fla),
    Peer("varlen", "flash_qla", "flash-qla", _qla_supports, _flash_qla),
    Peer("mask", "fla", "fla-core", lambda problem: None, _fla),
    Peer(CHUNK_OP, "fla", "fla-core", lambda problem: None, _fla),
    Peer(CHUNK_OP, "flash_qla", "flash-qla", _qla_supports, _flash_qla),
)
