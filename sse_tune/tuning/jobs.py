"""What a worker process does with a candidate: admit it, then time it. All of it is called in the worker only.

What is dear is kept between jobs: the inputs of a workload, the reference's answers, the buffers of a running plan.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence

import torch

from sse_tune.device import Device
from sse_tune.plan import Plan
from sse_tune.runtime.pipeline import Execution
from sse_tune.tuning.cases import OWN, QUICK
from sse_tune.tuning.check import check_plan, run_case, synchronize
from sse_tune.tuning.inputs import Case, workload
from sse_tune.tuning.measure import Timing, compare, peak_bytes, weighted
from sse_tune.tuning.outcomes import classify, poisons
from sse_tune.tuning.workload import Workload


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What became of a candidate: an outcome of `outcomes.OUTCOMES`, its reason, timings and errors.

    `poisoned`: the process met a device error; its worker must be replaced. `peak_bytes`: of a whole plan on a GPU,
    what a call needs above its inputs, at most of all entries. `timings_us` are expected times where a workload has
    several entries, and `entries_us` then holds the raw ones of each.
    """

    outcome: str
    reason: str | None = None
    timings_us: tuple[float, ...] = ()
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    poisoned: bool = False
    peak_bytes: int | None = None
    entries_us: tuple[tuple[float, ...], ...] = ()

    @property
    def time_us(self) -> float | None:
        """The median; None: it failed."""
        return statistics.median(self.timings_us) if self.outcome == "ok" else None


def torch_device(device: Device) -> str:
    return "cuda" if device.kind == "cuda" else "cpu"


@functools.lru_cache(maxsize=1)
def cases(load: Workload, device: str) -> tuple[Case, ...]:
    """The inputs of every entry of a workload. They stay on the device together: each candidate runs on all of them."""
    return tuple(workload(entry.problem, device, entry.lengths, entry.occupancy) for entry in load.entries)


def plan_call(plan: Plan, case: Case) -> Callable[[], object]:
    """One call of a plan on full-size inputs, as a user makes it: buffers allocated by the call."""
    if plan.graph == "whole":
        return lambda: run_case(plan, case)

    def call() -> None:
        execution = Execution(plan, case.problem, case.inputs, scale=case.scale)
        execution.forward()
        if case.problem.trains:
            execution.backward(case.do)

    return call


def in_graph(plan: Plan, device: Device) -> bool:
    """Whether a plan is timed as the replay of a CUDA graph: staged kernels on a GPU, so that what differs between two
    plans is their kernels and not the host that launches them."""
    return device.kind == "cuda" and plan.graph == "staged"


def check(plan: Plan, load: Workload, device: Device, names: tuple[str, ...] = QUICK) -> Attempt:
    """Admits a plan by some cases: by all on the heaviest entry, by the ordinary one for each other layout."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the cases are small: threads would only wait for each other
    errors: dict[str, float] = {}
    try:
        for problem in load.layouts:
            posed = names if problem is load.layouts[0] else QUICK[:1]
            report = check_plan(plan, problem, device, quick=True, names=posed)
            errors = {name: max(errors.get(name, 0.0), error) for name, error in (errors | report.errors).items()}
            if report.outcome != "ok":
                break
    finally:
        torch.set_num_threads(threads)
    return Attempt(report.outcome, report.reason, (), errors, report.poisoned)


def check_and_time(
    plan: Plan,
    load: Workload,
    device: Device,
    time_limit_s: float,
    give_up_us: float | None = None,
    confirm_us: float | None = None,
    names: tuple[str, ...] = QUICK,
) -> Attempt:
    """Admits a plan, then times it end to end on every entry.

    Args:
        plan, load, device: what runs, on what, and where.
        time_limit_s: of the measurement of an entry; it ends before, once the expected time is known well enough.
        give_up_us: a plan slower than this is left after two repeats.
        confirm_us: a plan faster than this, the best so far, is measured twice as long: it may be luck.
        names: the cases that it is admitted by.
    """
    admitted = check(plan, load, device, names)
    if admitted.outcome != "ok":
        return admitted

    def times() -> tuple[tuple[Timing, ...], int | None]:
        calls = [plan_call(plan, case) for case in cases(load, torch_device(device))]
        peaks = [peak for call in calls if (peak := peak_bytes(call, torch_device(device))) is not None]
        graph = in_graph(plan, device)
        return _times(calls, load, device, time_limit_s, give_up_us, confirm_us, graph), max(peaks, default=None)

    return _timed(times, load, admitted.errors)


def check_and_time_stage(
    plan: Plan,
    base: Plan,
    stage: str,
    load: Workload,
    device: Device,
    time_limit_s: float,
    give_up_us: float | None = None,
    confirm_us: float | None = None,
) -> Attempt:
    """Admits a plan that differs from an admitted one in one stage, then times that stage at full size."""
    admitted = check(plan, load, device, OWN)
    if admitted.outcome != "ok":
        return admitted

    def times() -> tuple[tuple[Timing, ...], int | None]:
        choice = plan.stages[stage]
        calls = [functools.partial(run.run_stage, stage, choice) for run in _running(base, load, device)]
        # as the whole plan runs: a stage of several small kernels would else be timed by the host's launches
        return _times(calls, load, device, time_limit_s, give_up_us, confirm_us, in_graph(plan, device)), None

    return _timed(times, load, admitted.errors)


def time_stage_in_turn(
    plans: Sequence[Plan], base: Plan, stage: str, load: Workload, device: Device, time_limit_s: float
) -> list[Attempt]:
    """More timings of admitted choices of one stage, measured in turn with one another.

    Args:
        plans: each with its own choice of the stage, else like `base`.
        base, stage, load, device: see `check_and_time_stage`.
        time_limit_s: of a plan on an entry.
    """
    running = _running(base, load, device)
    calls = [[functools.partial(run.run_stage, stage, plan.stages[stage]) for run in running] for plan in plans]
    return _in_turn(calls, load, device, time_limit_s, in_graph(base, device))


def time_plans_in_turn(plans: Sequence[Plan], load: Workload, device: Device, time_limit_s: float) -> list[Attempt]:
    """More timings of admitted plans, end to end, measured in turn with one another; see `time_stage_in_turn`."""
    calls = [[plan_call(plan, case) for case in cases(load, torch_device(device))] for plan in plans]
    return _in_turn(calls, load, device, time_limit_s, all(in_graph(plan, device) for plan in plans))


def _in_turn(
    calls: Sequence[Sequence[Callable[[], object]]], load: Workload, device: Device, time_limit_s: float, graph: bool
) -> list[Attempt]:
    """Times the calls of several rivals, for each one on every entry."""
    sides = {f"{number} {entry}": call for number, own in enumerate(calls) for entry, call in enumerate(own)}
    found = compare(sides, torch_device(device), time_limit_s=time_limit_s * len(sides), graph=graph)
    entries = range(len(load.entries))
    return [_attempt([found[f"{number} {entry}"] for entry in entries], load, {}) for number in range(len(calls))]


def time_in_turn(
    plans: dict[str, Plan], load: Workload, device: Device, time_limit_s: float, number: int = 0
) -> dict[str, tuple[float, ...]]:
    """Raw timings of admitted plans on one entry, the `number`-th, measured in turn, end to end."""
    case = cases(load, torch_device(device))[number]
    calls = {name: plan_call(plan, case) for name, plan in plans.items()}
    graph = all(in_graph(plan, device) for plan in plans.values())
    timings = compare(calls, torch_device(device), time_limit_s=time_limit_s, min_repeats=3, graph=graph)
    return {name: timing.times_us for name, timing in timings.items()}


@functools.lru_cache(maxsize=1)
def _running(plan: Plan, load: Workload, device: Device) -> tuple[Execution, ...]:
    """A plan that has run once on every entry, with every buffer kept."""
    executions = []
    for case in cases(load, torch_device(device)):
        execution = Execution(plan, case.problem, case.inputs, scale=case.scale, keep=True)
        execution.forward()
        if case.problem.trains:
            execution.backward(case.do)
        synchronize(case.do.device)
        executions.append(execution)
    return tuple(executions)


def _times(
    calls: Sequence[Callable[[], object]],
    load: Workload,
    device: Device,
    time_limit_s: float,
    give_up_us: float | None,
    confirm_us: float | None,
    graph: bool = False,
) -> tuple[Timing, ...]:
    """Timings of every entry, in turn: what counts is the expected time."""
    sides = {str(number): call for number, call in enumerate(calls)}

    def once() -> tuple[Timing, ...]:
        found = compare(
            sides, torch_device(device), time_limit_s=time_limit_s * len(sides), min_repeats=3, give_up_us=give_up_us,
            graph=graph, until_precise=True, shares=load.shares,
        )  # fmt: skip
        return tuple(found.values())

    first = once()
    if confirm_us is None or weighted(first, load.shares).median_us >= confirm_us:
        return first
    return tuple(Timing(one.times_us + more.times_us) for one, more in zip(first, once()))


def _timed(
    times: Callable[[], tuple[tuple[Timing, ...], int | None]], load: Workload, errors: dict[str, float]
) -> Attempt:
    try:
        measured, peak = times()
        return dataclasses.replace(_attempt(measured, load, errors), peak_bytes=peak)
    except Exception as error:  # a candidate may fail at full size in any way
        outcome, reason = classify(error)
        return Attempt(outcome, f"while it was timed: {reason}", (), errors, poisons(error))


def _attempt(measured: Sequence[Timing], load: Workload, errors: dict[str, float]) -> Attempt:
    """What was timed on every entry."""
    entries = tuple(timing.times_us for timing in measured) if len(measured) > 1 else ()
    return Attempt("ok", None, weighted(measured, load.shares).times_us, errors, entries_us=entries)
