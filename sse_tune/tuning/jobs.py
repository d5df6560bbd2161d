"""What a worker process does with a candidate: admit it, then time it. All of it is called in the worker only.

What is dear is kept between jobs: the inputs of a problem, the reference's answers, the buffers of a running plan.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable

import torch

from sse_tune.device import Device
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.runtime.pipeline import DTYPES, Execution, Inputs
from sse_tune.tuning.cases import QUICK
from sse_tune.tuning.check import check_plan, run_case, synchronize
from sse_tune.tuning.inputs import Case
from sse_tune.tuning.measure import Timing, compare, measure, peak_bytes
from sse_tune.tuning.outcomes import classify, poisons


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What became of a candidate: an outcome of `outcomes.OUTCOMES`, its reason, timings and errors.

    `poisoned`: the process met a device error; its worker must be replaced. `peak_bytes`: of a whole plan on a GPU,
    what a call needs above its inputs.
    """

    outcome: str
    reason: str | None = None
    timings_us: tuple[float, ...] = ()
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    poisoned: bool = False
    peak_bytes: int | None = None

    @property
    def time_us(self) -> float | None:
        """The median; None: it failed."""
        return statistics.median(self.timings_us) if self.outcome == "ok" else None


def torch_device(device: Device) -> str:
    return "cuda" if device.kind == "cuda" else "cpu"


@functools.lru_cache(maxsize=2)
def workload(problem: Problem, device: str) -> Case:
    """Random inputs of a problem's full size, made on the device: never zeros, which run faster than numbers do."""
    generator = torch.Generator(device).manual_seed(0)
    tokens, heads, io = problem.batch * problem.seq_len, problem.num_heads, DTYPES[problem.dtype]

    def normal(*shape: int, dtype: torch.dtype = io) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    gate = (tokens, heads) if problem.rule == "gdn" else (tokens, heads, problem.key_dim)
    stream: dict[str, torch.Tensor | None] = {}
    for prefix in ("", "shared_") if problem.shared and problem.num_partitions else ("",):
        stream[f"{prefix}q"] = normal(tokens, heads, problem.key_dim)
        k = normal(tokens, heads, problem.key_dim)
        stream[f"{prefix}k"] = k if problem.norm != "none" else torch.nn.functional.normalize(k, dim=-1)
        stream[f"{prefix}g"] = -0.2 * torch.rand(gate, generator=generator, device=device)
        beta = torch.sigmoid(normal(tokens, heads, dtype=torch.float32)) if problem.rule == "gdn" else None
        stream[f"{prefix}beta"] = beta
    if problem.num_partitions:
        stream["router_logits"] = normal(tokens, problem.num_partitions, dtype=torch.float32)
    sequences = problem.sequences
    offsets = torch.tensor([tokens * i // sequences for i in range(sequences + 1)], dtype=torch.int32)
    inputs = Inputs(
        v=normal(tokens, heads, problem.value_dim), cu_seqlens=offsets.to(device), **stream  # type: ignore[arg-type]
    )
    starts = offsets.tolist()
    return Case(
        name="workload", problem=problem, inputs=inputs, scale=float(problem.key_dim) ** -0.5, output_final_state=False,
        do=normal(tokens, heads, problem.value_dim), d_final_state=None,
        lengths=tuple(b - a for a, b in itertools.pairwise(starts)), chunk_size=64, checked_sequences=sequences,
        strong_beta=False, repeats=1,
    )  # fmt: skip


def plan_call(plan: Plan, problem: Problem, device: Device) -> Callable[[], object]:
    """One call of a plan on the workload, as a user makes it: buffers allocated by the call."""
    case = workload(problem, torch_device(device))
    if plan.graph == "whole":
        return lambda: run_case(plan, case)

    def call() -> None:
        execution = Execution(plan, problem, case.inputs, scale=case.scale)
        execution.forward()
        if problem.trains:
            execution.backward(case.do)

    return call


def in_graph(plan: Plan, device: Device) -> bool:
    """Whether a plan is timed as the replay of a CUDA graph: staged kernels on a GPU, so that what differs between two
    plans is their kernels and not the host that launches them."""
    return device.kind == "cuda" and plan.graph == "staged"


def check(plan: Plan, problem: Problem, device: Device, names: tuple[str, ...] = QUICK) -> Attempt:
    """Admits a plan by some cases."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the cases are small: threads would only wait for each other
    try:
        report = check_plan(plan, problem, device, quick=True, names=names)
    finally:
        torch.set_num_threads(threads)
    return Attempt(report.outcome, report.reason, (), report.errors, report.poisoned)


def check_and_time(
    plan: Plan,
    problem: Problem,
    device: Device,
    time_limit_s: float,
    give_up_us: float | None = None,
    confirm_us: float | None = None,
) -> Attempt:
    """Admits a plan, then times it end to end.

    Args:
        plan, problem, device: what runs, and where.
        time_limit_s: of the measurement; it ends before, once the median is known well enough.
        give_up_us: a plan slower than this is left after two repeats.
        confirm_us: a plan faster than this, the best so far, is measured twice as long: it may be luck.
    """
    admitted = check(plan, problem, device)
    if admitted.outcome != "ok":
        return admitted

    def times() -> tuple[tuple[float, ...], int | None]:
        call = plan_call(plan, problem, device)
        peak = peak_bytes(call, torch_device(device))
        return _times(call, device, time_limit_s, give_up_us, confirm_us, in_graph(plan, device)), peak

    return _timed(times, admitted.errors)


def check_and_time_stage(
    plan: Plan,
    base: Plan,
    stage: str,
    problem: Problem,
    device: Device,
    time_limit_s: float,
    give_up_us: float | None = None,
    confirm_us: float | None = None,
) -> Attempt:
    """Admits a plan that differs from an admitted one in one stage, then times that stage at full size."""
    admitted = check(plan, problem, device, QUICK[:1])
    if admitted.outcome != "ok":
        return admitted

    def times() -> tuple[tuple[float, ...], int | None]:
        execution = _running(base, problem, device)
        choice = plan.stages[stage]
        call = functools.partial(execution.run_stage, stage, choice)
        return _times(call, device, time_limit_s, give_up_us, confirm_us), None

    return _timed(times, admitted.errors)


def time_in_turn(
    plans: dict[str, Plan], problem: Problem, device: Device, time_limit_s: float
) -> dict[str, tuple[float, ...]]:
    """Raw timings of admitted plans, measured in turn, end to end."""
    calls = {name: plan_call(plan, problem, device) for name, plan in plans.items()}
    graph = all(in_graph(plan, device) for plan in plans.values())
    timings = compare(calls, torch_device(device), time_limit_s=time_limit_s, min_repeats=3, graph=graph)
    return {name: timing.times_us for name, timing in timings.items()}


@functools.lru_cache(maxsize=1)
def _running(plan: Plan, problem: Problem, device: Device) -> Execution:
    """A plan that has run once, with every buffer kept."""
    case = workload(problem, torch_device(device))
    execution = Execution(plan, problem, case.inputs, scale=case.scale, keep=True)
    execution.forward()
    if problem.trains:
        execution.backward(case.do)
    synchronize(case.do.device)
    return execution


def _times(
    call: Callable[[], object],
    device: Device,
    time_limit_s: float,
    give_up_us: float | None,
    confirm_us: float | None,
    graph: bool = False,
) -> tuple[float, ...]:
    def once() -> Timing:
        return measure(
            call, torch_device(device), time_limit_s=time_limit_s, min_repeats=3, give_up_us=give_up_us, graph=graph,
            until_precise=True,
        )  # fmt: skip

    first = once()
    if confirm_us is None or first.median_us >= confirm_us:
        return first.times_us
    return first.times_us + once().times_us


def _timed(times: Callable[[], tuple[tuple[float, ...], int | None]], errors: dict[str, float]) -> Attempt:
    try:
        measured, peak = times()
        return Attempt("ok", None, measured, errors, peak_bytes=peak)
    except Exception as error:  # a candidate may fail at full size in any way
        outcome, reason = classify(error)
        return Attempt(outcome, f"while it was timed: {reason}", (), errors, poisons(error))
