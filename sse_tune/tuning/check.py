"""Admission: a plan against the reference on hard inputs, gradients too, outputs poisoned, and against itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from sse_tune.device import Device
from sse_tune.errors import ConstraintError, DeviceError, PlanError
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.runtime.pipeline import DTYPES, Execution, gradient_names, sizes_of, state_shape
from sse_tune.space import Config
from sse_tune.templates.registry import Call, find_template, validate_plan
from sse_tune.tuning.capture import differing_in_graph
from sse_tune.tuning.cases import CASES, FINAL, case_names, case_problem, scale_of
from sse_tune.tuning.compare import ExactAnswers, Results, difference, exact
from sse_tune.tuning.inputs import Case, build
from sse_tune.tuning.outcomes import classify, poisons
from sse_tune.tuning.tolerance import precision_of

Run = Callable[[Plan, Case], tuple[Results, torch.Tensor | None]]
POISON_INT = -12345
CAPTURE = "cuda_graph"  # beside the hazards: a call replayed from a CUDA graph
_answers = ExactAnswers()


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """One case: "ok", "wrong", "not_applicable", or the outcome of a failure (`outcomes.OUTCOMES`)."""

    name: str
    outcome: str
    reason: str | None
    errors: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Report:
    """What admission found; `poisoned` says that the process met a device error and must not be used again."""

    cases: tuple[CaseResult, ...]
    poisoned: bool = False

    @property
    def passed(self) -> bool:
        """No case failed, and at least one applied."""
        return self.failure is None and any(case.outcome == "ok" for case in self.cases)

    @property
    def failure(self) -> CaseResult | None:
        return next((case for case in self.cases if case.outcome not in ("ok", "not_applicable")), None)

    @property
    def outcome(self) -> str:
        if self.failure is not None:
            return self.failure.outcome
        return "ok" if self.passed else "rejected"

    @property
    def reason(self) -> str | None:
        """The first failure; None: admitted."""
        if self.failure is not None:
            return f"case {self.failure.name}: {self.failure.reason}"
        if self.passed:
            return None
        return "no case applies: " + "; ".join(sorted({str(case.reason) for case in self.cases}))

    @property
    def errors(self) -> dict[str, float]:
        """The largest relative error of each tensor over all cases."""
        largest: dict[str, float] = {}
        for case in self.cases:
            for name, error in case.errors.items():
                largest[name] = max(error, largest.get(name, 0.0))
        return largest


def check_plan(
    plan: Plan,
    problem: Problem,
    device: Device,
    quick: bool = False,
    *,
    names: tuple[str, ...] | None = None,
    scale: str | None = None,
    stop_early: bool = True,
    run: Run | None = None,
    on_case: Callable[[CaseResult], None] | None = None,
    plan_for: Callable[[Problem], Plan] | None = None,
) -> Report:
    """Runs a plan on hard inputs and compares everything it returns with the reference in float64.

    Args:
        plan: its outer choices and configs are tried on every case whose sizes they pass the constraints of.
        problem: gives rule, dtype, direction and the sizes that a case does not set.
        device: where to run, and what the constraints are checked against.
        quick: the few cases every candidate must pass instead of all.
        names: these cases instead; None: `names_of`.
        scale: "tiny", "full" or "big" cases; None: by the device.
        stop_early: end at the first failure.
        run: what runs a plan on a case; None: `run_case`.
        on_case: called with each case's result.
        plan_for: the plan for a case's sizes, when `plan` stands for a rule such as "the default"; None: `plan` itself,
            and cases that it cannot run do not apply.

    Returns:
        Report: never raises for a wrong kernel.
    """
    scale = scale or scale_of(device)
    chosen = names if names is not None else names_of(plan, problem, device, quick=quick, scale=scale)
    results: list[CaseResult] = []
    for name in chosen:
        if name == CAPTURE:
            result, poisoned = _check_capture(plan, problem, device, scale)
        else:
            result, poisoned = _check_case(name, plan, problem, device, scale, quick, run or run_case, plan_for)
        results.append(result)
        if on_case is not None:
            on_case(result)
        if poisoned or (stop_early and result.outcome not in ("ok", "not_applicable")):
            return Report(tuple(results), poisoned)
    return Report(tuple(results))


def names_of(
    plan: Plan, problem: Problem, device: Device, *, quick: bool = False, scale: str | None = None
) -> tuple[str, ...]:
    """The cases of a plan: the hazards, and where it would run in a CUDA graph `CAPTURE`, the last one."""
    names = case_names(problem, quick=quick, scale=scale or scale_of(device))
    is_captured = not quick and device.kind == "cuda" and plan.graph == "staged"
    return (*names, CAPTURE) if is_captured else names


def _check_case(
    name: str,
    plan: Plan,
    problem: Problem,
    device: Device,
    scale: str,
    quick: bool,
    run: Run,
    plan_for: Callable[[Problem], Plan] | None,
) -> tuple[CaseResult, bool]:
    chunk_size = chunk_size_of(plan)
    posed, _ = case_problem(name, problem, chunk_size, scale)
    try:
        if plan_for is not None:
            plan = plan_for(posed)
        validate_plan(plan, posed, device)
    except (ConstraintError, PlanError, DeviceError) as error:
        return CaseResult(name, "not_applicable", str(error), {}), False
    try:
        case = build(name, problem, chunk_size, "cuda" if device.kind == "cuda" else "cpu", scale)
        results, chosen = run(plan, case)
        reason, errors = _judge(results, chosen, case, precision_of(plan, posed))
        for _ in range(1 if quick else CASES[name].repeats - 1):
            if reason is not None:
                break
            again, _unused = run(plan, case)
            different = [key for key, x in results.items() if not torch.equal(x, again[key])]
            if different:
                reason = f"{', '.join(different)}: other bits on a repeat with the same inputs"
        return CaseResult(name, "ok" if reason is None else "wrong", reason, errors), False
    except Exception as error:  # whatever a candidate does wrong is its own failure, not the checker's
        outcome, shown = classify(error)
        return CaseResult(name, outcome, shown, {}), poisons(error)


def _check_capture(plan: Plan, problem: Problem, device: Device, scale: str) -> tuple[CaseResult, bool]:
    """The first case again, replayed from a CUDA graph, must give the same bits."""
    case = build("gates", problem, chunk_size_of(plan), "cuda", scale)
    try:
        validate_plan(plan, case.problem, device)
        results, _ = run_case(plan, case)
        different = differing_in_graph(plan, case, results)
    except (ConstraintError, PlanError, DeviceError) as error:
        return CaseResult(CAPTURE, "not_applicable", str(error), {}), False
    except Exception as error:  # a call that synchronises fails here
        return CaseResult(CAPTURE, *classify(error), {}), poisons(error)
    reason = f"{', '.join(different)}: other bits when replayed from a CUDA graph" if different else None
    return CaseResult(CAPTURE, "wrong" if different else "ok", reason, {}), False


def _judge(
    results: Results, chosen: torch.Tensor | None, case: Case, precision: str
) -> tuple[str | None, dict[str, float]]:
    expected = _answers.of(case) if case.name in FINAL else exact(case)
    if chosen is not None and expected.partitions is not None:
        lanes = chosen[:, int(case.problem.shared) :].to(torch.int64)
        if lanes.shape != expected.partitions.shape or not torch.equal(lanes, expected.partitions):
            wrong = int((lanes != expected.partitions).any(1).sum()) if lanes.shape == expected.partitions.shape else -1
            return f"chosen: other partitions than the {case.problem.top_k} largest logits, in {wrong} tokens", {}
    found = difference(results, case, expected, precision)
    return found.reason, found.errors


def chunk_size_of(plan: Plan) -> int:
    """C of a plan, wherever its graph keeps it; of one that splits segments the rows of a group, so that the hazards'
    lengths, which are told in chunks, meet the ends of groups, which are ends of chunks too."""
    sizes = [plan.outer.get("chunk_size"), *(choice.config.get("chunk_size") for choice in plan.stages.values())]
    chunk_size = next((int(size) for size in sizes if size is not None), 64)
    return chunk_size * max(1, int(plan.outer.get("split", 0)))


def poisoned(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An allocator whose memory makes every value that is read before it was written show."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else POISON_INT, dtype=dtype, device=device)


def run_case(plan: Plan, case: Case) -> tuple[Results, torch.Tensor | None]:
    """Everything a plan returns for a case, and the partitions it chose where its stages tell."""
    if plan.graph == "whole":
        return _run_whole(plan, case), None
    execution = Execution(
        plan, case.problem, case.inputs, scale=case.scale, output_final_state=case.output_final_state,
        allocate=poisoned, keep=True,
    )
    o, final_state = execution.forward()
    results = {"o": o} | ({} if final_state is None else {"final_state": final_state})
    if case.problem.trains:
        gradients = execution.backward(case.do, case.d_final_state)
        results |= {f"d_{name}": gradient for name, gradient in gradients.items()}
    synchronize(o.device)
    return results, execution.tensors.get("chosen") if case.problem.num_partitions else None


def _run_whole(plan: Plan, case: Case) -> Results:
    """The one-stage graph: differentiable PyTorch that writes into its results."""
    problem, choice = case.problem, plan.stages["whole"]
    inputs = case.inputs.present()
    leaves = {name: inputs[name].detach().requires_grad_(problem.trains) for name in gradient_names(inputs)}
    tensors = {**inputs, **leaves}
    device = case.do.device
    tensors["o"] = poisoned(tuple(case.do.shape), dtype=DTYPES[problem.dtype], device=device)
    if case.output_final_state:
        tensors["final_state"] = poisoned(state_shape(problem), dtype=torch.float32, device=device)
    call = Call(sizes_of(plan, problem), Config({**plan.outer, **choice.config}), _no_launch, case.scale)
    with torch.set_grad_enabled(problem.trains):
        find_template(choice.backend, choice.template).run(call, tensors)
    outputs = [tensors[name] for name in ("o", "final_state") if name in tensors]
    results = dict(zip(("o", "final_state"), (x.detach() for x in outputs)))
    if problem.trains:
        given = [case.do] if case.d_final_state is None else [case.do, case.d_final_state]
        found = torch.autograd.grad(outputs, list(leaves.values()), given, allow_unused=True, materialize_grads=True)
        results |= {f"d_{name}": gradient for name, gradient in zip(leaves, found)}
    return results


def _no_launch(kernel: object, grid: tuple[int, ...], args: dict, *, num_warps: int, num_stages: int) -> None:
    raise PlanError("the one-stage graph launches no kernels", str(kernel), "use the staged graph")


def synchronize(device: torch.device) -> None:
    """Waits for a GPU, so that what it did wrong is raised here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
