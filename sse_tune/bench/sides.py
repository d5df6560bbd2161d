"""The sides of a comparison: calls as a user makes them, what they allocate, and all of them timed in turn.

A side is one implementation in one direction. All are timed in one `compare_calls`, by CUDA events over the call:
behind other calls, where what the host cannot do ahead counts, and on an idle GPU, where all that it does before the
first long kernel counts. This project's are there a second time as replays of a CUDA graph, which is how a user can run
them and which a pipeline that synchronises with the host cannot be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sse_tune.bench.memory import LeftOut, free, leaving_out
from sse_tune.device import Device
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.runtime.dispatch import Decision
from sse_tune.runtime.kernel import Kernel
from sse_tune.runtime.pipeline import WITHOUT_TOKENS, Execution, Inputs
from sse_tune.tuning import measure
from sse_tune.tuning.inputs import Case
from sse_tune.tuning.jobs import in_graph, torch_device
from sse_tune.tuning.measure import Timing, compare_calls

Run = Callable[[Inputs], Tensor]  # inputs -> o, differentiable; tokens [R] in both, or [B, T] in both
GRAPH = ", graph"
_WITH_GRADIENT = (
    "q", "k", "v", "g", "beta", "shared_q", "shared_k", "shared_g", "shared_beta", "router_logits"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Side:
    """One implementation in one direction.

    Args:
        name: of the implementation; it ends in `GRAPH` where the call is a replay.
        direction: "fwd", or "fwd+bwd".
        call: runs it once.
        peak_bytes: what a warm call needs beside what is there before it; None: not known.
    """

    name: str
    direction: str
    call: Callable[[], object]
    peak_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class SideResult:
    """What a side takes.

    Args:
        name, direction, peak_bytes: see `Side`.
        timing, idle: see `Calls`.
    """

    name: str
    direction: str
    timing: Timing
    idle: Timing | None
    peak_bytes: int | None

    def to_dict(self) -> dict[str, object]:
        """Plain data, times in microseconds."""
        return {
            "median_us": self.timing.median_us,
            "noise_us": self.timing.noise_us,
            "repeats": len(self.timing.times_us),
            "idle_us": None if self.idle is None else self.idle.median_us,
            "peak_bytes": self.peak_bytes,
        }


def directions_of(problem: Problem) -> tuple[str, ...]:
    """What is measured: both for a training problem, else the forward pass."""
    return ("fwd", "fwd+bwd") if problem.trains else ("fwd",)


def forward_call(run: Run, inputs: Inputs) -> Callable[[], Tensor]:
    """The forward pass alone, without a trace for gradients."""

    def call() -> Tensor:
        with torch.no_grad():
            return run(inputs)

    return call


def training_call(run: Run, inputs: Inputs, do: Tensor) -> Callable[[], dict[str, Tensor]]:
    """Forward and backward by autograd; the call returns "o" and "d_" and each input that has a gradient."""
    present = {name: x for name in _WITH_GRADIENT if (x := getattr(inputs, name)) is not None}
    leaves = {name: x.detach().requires_grad_() for name, x in present.items()}
    used = dataclasses.replace(inputs, **leaves)

    def call() -> dict[str, Tensor]:
        o = run(used)
        found = torch.autograd.grad(o, list(leaves.values()), do)
        return {"o": o.detach(), **{f"d_{name}": x for name, x in zip(leaves, found)}}

    return call


def calls_of(run: Run, problem: Problem, inputs: Inputs, do: Tensor) -> dict[str, Callable[[], object]]:
    """Direction to call."""
    calls: dict[str, Callable[[], object]] = {"fwd": forward_call(run, inputs)}
    if problem.trains:
        calls["fwd+bwd"] = training_call(run, inputs, do)
    return calls


def own_calls(
    plan: Plan, problem: Problem, device: Device, case: Case, head_groups: int = 1
) -> dict[str, Callable[[], object]]:
    """Direction to call of a plan of this project as its users call it: checks, dispatch and autograd included, tokens
    `[B, T]` as users have them. With `head_groups` problem and plan are those of one group, the inputs those of all."""
    kernel = Kernel(problem, device, Decision(plan, "given", "named by the benchmark"))
    shape = (problem.batch, problem.seq_len)
    tokens = {
        name: tensor.unflatten(0, shape)
        for name, tensor in case.inputs.present().items()
        if name not in WITHOUT_TOKENS
    }

    def run(x: Inputs) -> Tensor:
        o, _ = kernel(
            x.q, x.k, x.v, x.g, x.router_logits, problem.top_k if problem.num_partitions else None, beta=x.beta,
            shared_q=x.shared_q, shared_k=x.shared_k, shared_g=x.shared_g, shared_beta=x.shared_beta,
            qk_l2norm=problem.norm != "none", gate_before_norm=problem.norm == "before", scale=case.scale,
            read_k=problem.readers if problem.num_partitions else None,
            cu_seqlens=x.cu_seqlens if problem.num_sequences is not None else None, head_groups=head_groups,
        )  # fmt: skip
        return o

    return calls_of(run, problem, dataclasses.replace(case.inputs, **tokens), case.do.unflatten(0, shape))


def graph_pool(device: Device) -> Any:
    """Memory that the graphs of one comparison share, since only one of them runs at a time; None on a CPU."""
    return torch.cuda.graph_pool_handle() if device.kind == "cuda" else None


def own_sides(
    name: str, plan: Plan, problem: Problem, device: Device, case: Case, pool: Any, left_out: list[LeftOut]
) -> list[Side]:
    """A plan of this project: as a call, and as a replay where `in_graph` says so.

    Args:
        name: of the side.
        plan, problem: what runs; the problem may be the forward part of the case's.
        device, case: where, and with which inputs.
        pool: of `graph_pool`.
        left_out: gets what does not fit in memory.
    """
    call = own_calls(plan, problem, device, case)[problem.direction]
    sides: list[Side] = []
    with leaving_out(name, problem.direction, left_out):
        sides.append(Side(name, problem.direction, call, peak_bytes(call, device)))
    if sides and in_graph(plan, device):  # a replay needs what a call does

        def launches() -> None:
            execution = Execution(plan, problem, case.inputs, scale=case.scale)
            execution.forward()
            if problem.trains:
                execution.backward(case.do)

        with leaving_out(name + GRAPH, problem.direction, left_out):
            sides.append(Side(name + GRAPH, problem.direction, measure.captured(launches, pool)))
    return sides


def grouped_side(
    name: str, groups: int, plan: Plan, part: Problem, device: Device, case: Case, left_out: list[LeftOut]
) -> list[Side]:
    """The heads in groups, as a call.

    Args:
        name: of the side.
        groups: how many.
        plan, part: those of one group.
        device, case, left_out: see `own_sides`.
    """
    call = own_calls(plan, part, device, case, groups)[part.direction]
    with leaving_out(name, part.direction, left_out):
        return [Side(name, part.direction, call, peak_bytes(call, device))]
    return []


def peak_bytes(call: Callable[[], object], device: Device) -> int | None:
    """See `measure.peak_bytes`; the call is run on a CPU too: one that fails is to fail here, not among those timed."""
    call()
    return measure.peak_bytes(call, torch_device(device))


def time_what_fits(sides: list[Side], where: str, time_limit_s: float, left_out: list[LeftOut]) -> list[SideResult]:
    """All sides in one comparison; without the replays, which keep their memory, where the calls do not fit beside it.

    Args:
        sides: see `time_sides`; replays that do not fit are taken out, so that their memory is free.
        where, time_limit_s: see `time_sides`.
        left_out: gets what does not fit.
    """
    for replays in (True, False):
        failed: list[LeftOut] = []
        with leaving_out("", "", failed):
            return time_sides(sides, where, time_limit_s)
        gone = [side for side in sides if side.name.endswith(GRAPH)] if replays else list(sides)
        left_out += [LeftOut(side.name, side.direction, failed[0].reason) for side in gone]
        sides[:] = [side for side in sides if side not in gone]
        del gone
        free()
    return []


def time_sides(sides: list[Side], where: str, time_limit_s: float) -> list[SideResult]:
    """All sides in one comparison, in turn: those of one direction are neighbours, in the order given.

    Args:
        sides: each name once in each direction.
        where: torch's name of the device.
        time_limit_s: of the whole comparison.
    """
    ordered = sorted(sides, key=lambda side: side.direction)  # stable; "fwd" comes before "fwd+bwd"
    calls = {f"{side.direction} {side.name}": side.call for side in ordered}
    assert len(calls) == len(sides), "two sides of one name"
    found = compare_calls(calls, where, time_limit_s=time_limit_s)
    return [
        SideResult(side.name, side.direction, of_side.timing, of_side.idle, side.peak_bytes)
        for side, of_side in zip(ordered, found.values(), strict=True)
    ]
