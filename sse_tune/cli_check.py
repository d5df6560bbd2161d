"""`check`: every kernel of this device against the reference on hard inputs, gradients too."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
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
from sse_tune.device import ARCHS, usable_cores
from sse_tune.problem import DTYPES, RULES, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sse_tune.device import Device
    from sse_tune.plan import Plan, StageChoice
    from sse_tune.tuning.ahead import CompileAhead
    from sse_tune.tuning.check import CaseResult, Report
    from sse_tune.tuning.check_shares import Task


Tell = Callable[[int, "CaseResult"], None]  # number of a plan and one of its results
DEFAULT = "default"  # the plan that runs where nothing is tuned: another one for other sizes


@dataclasses.dataclass(frozen=True)
class Subject:
    """One plan to check: what the table calls it, the problem, the plan. A tuned one is itself for all sizes; of others
    the default of each size stands in, with these choices in place of its own."""

    backend: str
    plan_of: str
    problem: Problem
    plan: Plan
    is_tuned: bool = False
    choices: tuple[tuple[str, StageChoice], ...] = ()

    @property
    def label(self) -> str:
        return f"{self.problem.rule:<4} {self.problem.dtype:<5} {self.backend:<9} {self.plan_of:<8}"

    @property
    def task(self) -> Task:
        """What is run: the plan, or the default of each case's sizes that it stands for."""
        from sse_tune.tuning.check_shares import Task

        return Task(self.plan, self.problem, None if self.is_tuned else self.backend, self.choices)


def check(
    rule: Annotated[str | None, typer.Option(help="Comma-separated: gla, gdn; by default both.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Comma-separated: bf16, fp16, fp32; by default all.")] = None,
    backends: BackendsOption = None,
    cases: Annotated[str | None, typer.Option(help="Comma-separated names of cases; by default all.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only the cases that each candidate of a search must pass.")
    ] = False,
    processes: Annotated[
        int, typer.Option(min=1, help="Cases side by side in so many processes; compiling is what takes the time.")
    ] = 1,
    db: DbOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every kernel against the reference: outputs, final states, all gradients; exit code 1 when one is wrong."""
    from sse_tune.templates.registry import BACKENDS, default_backend
    from sse_tune.tuning.cases import CASES

    here = find_device(device)
    rules = split(rule, RULES, "--rule") or RULES
    dtypes = split(dtype, DTYPES, "--dtype") or DTYPES
    names = split(cases, tuple(CASES), "--cases")
    chosen = split(backends, BACKENDS, "--backends") or (default_backend(here),)
    rows: list[dict[str, object]] = []
    unfit: list[str] = []
    if not as_json:
        typer.echo(f"on {here.name} ({here.arch}): error of the worst tensor, relative to the reference in float64")
    subjects = list(subjects_of(rules, dtypes, chosen, here, db))

    def tell(number: int, result: CaseResult) -> None:
        rows.append(_row(subjects[number], result))
        if not as_json:
            typer.echo(_line(subjects[number], result))

    tasks = [subject.task for subject in subjects]
    if processes == 1:
        reports: Sequence[Report | None] = _check_here(tasks, here, quick, names, tell)
    else:
        reports = _check_in_workers(tasks, here, device, processes, quick, names, tell)
    for subject, report in zip(subjects, reports):
        if report is None:
            unfit.append(f"{subject.label.strip()}: not run, the device failed before")
        elif report.failure is None and not report.passed:
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


def _check_here(
    tasks: list[Task], device: Device, quick: bool, names: tuple[str, ...] | None, tell: Tell
) -> list[Report | None]:
    """One plan after the other in this process; None: it was not run, for an error of the device came before it."""
    from sse_tune.tuning.ahead import CompileAhead
    from sse_tune.tuning.check import check_plan

    reports: list[Report | None] = []
    with contextlib.ExitStack() as stack:
        if device.arch in ARCHS:  # kernels for others are compiled as they run
            ahead = stack.enter_context(CompileAhead(device))
            for task in tasks:
                _compile(ahead, task, names, quick, device)
        for number, task in enumerate(tasks):
            if any(report is None or report.poisoned for report in reports):
                reports.append(None)
                continue
            reports.append(
                check_plan(
                    task.plan, task.problem, device, quick, names=names, stop_early=False,
                    on_case=functools.partial(tell, number), plan_for=task.plan_for(device),
                )
            )  # fmt: skip
    return reports


def _check_in_workers(
    tasks: list[Task],
    device: Device,
    name: str | None,
    processes: int,
    quick: bool,
    names: tuple[str, ...] | None,
    tell: Tell,
) -> list[Report]:
    """Shares of the cases side by side in worker processes, each of which compiles what it runs."""
    from sse_tune.tuning.check_shares import check_in_shares
    from sse_tune.tuning.lanes import Lanes
    from sse_tune.tuning.machine import workers_for

    threads = max(1, usable_cores() // processes)
    lanes = Lanes([worker for _ in range(processes) for worker in workers_for(name, threads=threads)])
    try:
        return check_in_shares(tasks, device, lanes, quick, names=names, on_case=tell)
    finally:
        lanes.close()


def _compile(ahead: CompileAhead, task: Task, names: tuple[str, ...] | None, quick: bool, device: Device) -> None:
    """Hands the kernels of all cases to the compilers of all cores: one after the other they take minutes."""
    from sse_tune.tuning.cases import case_names, scale_of
    from sse_tune.tuning.check import chunk_size_of

    scale = scale_of(device)
    chosen = names if names is not None else case_names(task.problem, quick=quick, scale=scale)
    plan_for = task.plan_for(device) or (lambda posed: task.plan)
    ahead.submit_cases(plan_for, task.problem, chunk_size_of(task.plan), chosen, scale)


def check_problem(rule: str, dtype: str, device: Device) -> Problem:
    """The problem whose kernels are checked; the cases change its sizes as they need."""
    size = 128 if device.kind == "cuda" else 32
    return Problem(
        rule=rule, seq_len=1024 if device.kind == "cuda" else 64, num_heads=4 if device.kind == "cuda" else 2,
        head_dim=size, dtype=dtype, norm="after" if rule == "gdn" else "none",
    )  # fmt: skip


def subjects_of(
    rules: tuple[str, ...], dtypes: tuple[str, ...], backends: tuple[str, ...], device: Device, db: str | None
) -> Iterator[Subject]:
    """The default plan of each backend, that with each template in it that is not a default, and the tuned plans that
    are known for this device."""
    from sse_tune.templates.registry import default_plan
    from sse_tune.tuning.landscape import Templates, other_defaults

    for backend in backends:
        for rule in rules:
            for dtype in dtypes:
                problem = check_problem(rule, dtype, device)
                plan = default_plan(problem, device, backend)
                yield Subject(backend, DEFAULT, problem, plan)
                for stage, choice in other_defaults(Templates(problem, device, (backend,)), plan):
                    if plan.stages[stage].backend == backend:
                        changed = plan.replace_stage(stage, choice)
                        yield Subject(backend, choice.template, problem, changed, choices=((stage, choice),))
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
            yield Subject("+".join(sorted(used)), f"tuned h{problem.num_heads}", problem, answer.plan, is_tuned=True)


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
