"""`check`: every kernel of this device against the reference on hard inputs, gradients too."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from sse_tune.cli_common import (
    FAILED,
    BackendsOption,
    DbOption,
    DeviceOption,
    JsonOption,
    find_device,
    print_json,
    split,
)
from sse_tune.device import ARCHS
from sse_tune.problem import DTYPES, RULES, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sse_tune.device import Device
    from sse_tune.plan import Plan
    from sse_tune.tuning.ahead import CompileAhead
    from sse_tune.tuning.check import CaseResult


DEFAULT = "default"  # the plan that runs where nothing is tuned: another one for other sizes


@dataclasses.dataclass(frozen=True)
class Subject:
    """One plan to check: what the table calls it, the problem, the plan."""

    backend: str
    plan_of: str
    problem: Problem
    plan: Plan

    @property
    def label(self) -> str:
        return f"{self.problem.rule:<4} {self.problem.dtype:<5} {self.backend:<9} {self.plan_of:<8}"


def check(
    rule: Annotated[str | None, typer.Option(help="Comma-separated: gla, gdn; by default both.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Comma-separated: bf16, fp16, fp32; by default all.")] = None,
    backends: BackendsOption = None,
    cases: Annotated[str | None, typer.Option(help="Comma-separated names of cases; by default all.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only the cases that each candidate of a search must pass.")
    ] = False,
    db: DbOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every kernel against the reference: outputs, final states, all gradients; exit code 1 when one is wrong."""
    from sse_tune.templates.registry import BACKENDS, default_backend
    from sse_tune.tuning.ahead import CompileAhead
    from sse_tune.tuning.cases import CASES
    from sse_tune.tuning.check import check_plan

    here = find_device(device)
    rules = split(rule, RULES, "--rule") or RULES
    dtypes = split(dtype, DTYPES, "--dtype") or DTYPES
    names = split(cases, tuple(CASES), "--cases")
    chosen = split(backends, BACKENDS, "--backends") or (default_backend(here),)
    rows: list[dict[str, object]] = []
    unfit: list[str] = []
    poisoned = False
    if not as_json:
        typer.echo(f"on {here.name} ({here.arch}): error of the worst tensor, relative to the reference in float64")
    subjects = [(subject, _plan_for(subject, here)) for subject in _subjects(rules, dtypes, chosen, here, db)]
    with contextlib.ExitStack() as stack:
        if here.arch in ARCHS:  # kernels for others are compiled as they run
            ahead = stack.enter_context(CompileAhead(here))
            for subject, plan_for in subjects:
                _compile(ahead, subject, plan_for, names, quick, here)
        for subject, plan_for in subjects:
            if poisoned:
                unfit.append(f"{subject.label.strip()}: not run, the device failed before")
                continue

            def tell(result: CaseResult, subject: Subject = subject) -> None:
                rows.append(_row(subject, result))
                if not as_json:
                    typer.echo(_line(subject, result))

            report = check_plan(
                subject.plan, subject.problem, here, quick, names=names, stop_early=False, on_case=tell,
                plan_for=plan_for if subject.plan_of == DEFAULT else None,
            )  # fmt: skip
            poisoned = poisoned or report.poisoned
            if report.failure is None and not report.passed:
                unfit.append(f"{subject.label.strip()}: {report.reason}")
    failed = [row for row in rows if row["outcome"] not in ("ok", "not_applicable")]
    passed = [row for row in rows if row["outcome"] == "ok"]
    good = not failed and not unfit and bool(passed)
    if as_json:
        print_json({"device": here.slug, "passed": good, "cases": rows, "not_checked": unfit})
    else:
        for line in unfit:
            typer.echo(f"not checked: {line}")
        skipped = len(rows) - len(passed) - len(failed)
        typer.echo(f"{len(passed)} passed, {len(failed)} failed, {skipped} not applicable")
    if not good:
        raise typer.Exit(FAILED)


def _plan_for(subject: Subject, device: Device) -> Callable[[Problem], Plan]:
    """The plan that stands for a subject at other sizes: the default of those, or the one plan that is checked."""
    from sse_tune.templates.registry import default_plan

    if subject.plan_of == DEFAULT:
        return lambda posed: default_plan(posed, device, subject.backend)
    return lambda posed: subject.plan


def _compile(
    ahead: CompileAhead, subject: Subject, plan_for: Callable[[Problem], Plan], names: tuple[str, ...] | None,
    quick: bool, device: Device,
) -> None:
    """Hands the kernels of all cases to the compilers of all cores: one after the other they take minutes."""
    from sse_tune.tuning.cases import case_names, scale_of
    from sse_tune.tuning.check import chunk_size_of

    scale = scale_of(device)
    chosen = names if names is not None else case_names(subject.problem, quick=quick, scale=scale)
    ahead.submit_cases(plan_for, subject.problem, chunk_size_of(subject.plan), chosen, scale)


def check_problem(rule: str, dtype: str, device: Device) -> Problem:
    """The problem whose kernels are checked; the cases change its sizes as they need."""
    size = 128 if device.kind == "cuda" else 32
    return Problem(
        rule=rule, seq_len=1024 if device.kind == "cuda" else 64, num_heads=4 if device.kind == "cuda" else 2,
        head_dim=size, dtype=dtype, norm="after" if rule == "gdn" else "none",
    )  # fmt: skip


def _subjects(
    rules: tuple[str, ...], dtypes: tuple[str, ...], backends: tuple[str, ...], device: Device, db: str | None
) -> Iterator[Subject]:
    """The default plan of each backend, and the tuned plans that are known for this device."""
    from sse_tune.templates.registry import default_plan

    for backend in backends:
        for rule in rules:
            for dtype in dtypes:
                problem = check_problem(rule, dtype, device)
                yield Subject(backend, DEFAULT, problem, default_plan(problem, device, backend))
    yield from _tuned(rules, dtypes, backends, device, db)


def _tuned(
    rules: tuple[str, ...], dtypes: tuple[str, ...], backends: tuple[str, ...], device: Device, db: str | None
) -> Iterator[Subject]:
    from sse_tune.database.keys import fits
    from sse_tune.database.shipped import shipped_answers
    from sse_tune.database.store import TuningDatabase, default_path
    from sse_tune.device import toolchain

    answers = list(shipped_answers(device))
    if db is not None or default_path().exists():
        with TuningDatabase(db) as database:
            answers += database.answers(device=device.slug)
    seen = set()
    for answer in answers:
        if fits(answer, device, toolchain()) is not None:
            continue
        problem = Problem.from_dict(answer.problem)
        used = {stage.backend for stage in answer.plan.stages.values()}
        if problem.rule not in rules or problem.dtype not in dtypes or not used <= set(backends):
            continue
        if (problem, answer.plan) not in seen:
            seen.add((problem, answer.plan))
            yield Subject("+".join(sorted(used)), f"tuned h{problem.num_heads}", problem, answer.plan)


def _row(subject: Subject, result: CaseResult) -> dict[str, object]:
    return {
        "rule": subject.problem.rule, "dtype": subject.problem.dtype, "backend": subject.backend,
        "plan": subject.plan_of, "case": result.name, "outcome": result.outcome, "reason": result.reason,
        "errors": {name: float(error) if error == error and abs(error) != float("inf") else str(error)
                   for name, error in result.errors.items()},
    }  # fmt: skip


def _line(subject: Subject, result: CaseResult) -> str:
    worst = max(result.errors.items(), key=lambda pair: pair[1], default=None)
    error = f"{worst[1]:.1e} ({worst[0]})" if worst else "-"
    mark = {"ok": "pass", "not_applicable": "n/a"}.get(result.outcome, "FAIL")
    note = (
        ""
        if result.outcome == "ok"
        else f"  {result.outcome}: {result.reason}"
        if mark == "FAIL"
        else f"  {result.reason}"
    )
    return f"{subject.label} {result.name:<22} {error:<28} {mark}{note}"
