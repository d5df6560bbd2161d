"""`search`: tune on this machine, show how it goes, keep every trial, and say how the result is used."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from sse_tune.cli_common import (
    INTERRUPTED,
    BackendsOption,
    DbOption,
    JsonOption,
    ProblemChoice,
    UsageError,
    console,
    default_preset,
    devices,
    kind_of,
    print_json,
    seconds,
    shown_ratio,
    shown_time,
    size_bytes,
    split,
    takes_problem,
)
from sse_tune.problem import Problem

if TYPE_CHECKING:
    from sse_tune.tuning.recorder import Progress
    from sse_tune.tuning.report import SearchReport

_BUDGETS = {"cuda": "5m", "cpu": "60s"}


@takes_problem
def search(
    choice: ProblemChoice,
    budget: Annotated[
        str | None, typer.Option(help="For all lengths together: 90s, 5m; by default 5m, on a CPU 60s.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="At most so many candidates for each length.")] = None,
    backends: BackendsOption = None,
    sampler: Annotated[
        str, typer.Option(help="tpe, gp, random, exhaustive; auto: exhaustive where it fits the budget, else tpe.")
    ] = "auto",
    target: Annotated[
        float | None, typer.Option(help="End once within this factor of the estimated best: 1.03 for 3 %.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Leave out plans that need more above their inputs: 2G, 800M.")
    ] = None,
    workload: Annotated[
        pathlib.Path | None, typer.Option(help="Tune for all shapes of a recorded histogram; see docs/search.md.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the trials that are there.")] = False,
    db: DbOption = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, or cuda:0,cuda:1 side by side; by default what there is.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tune the kernels of a problem on this machine; with no options, of one that suits the machine."""
    from sse_tune.templates.registry import BACKENDS
    from sse_tune.tuning.report import SearchInterrupted
    from sse_tune.tuning.search import search as run_search
    from sse_tune.tuning.workload import Workload

    kind = kind_of(device)
    lengths = {"--seq-len": choice.seq_len, "--batch": choice.batch, "--sequences": choice.sequences}
    given_lengths = [name for name, value in lengths.items() if value is not None]
    if workload is not None and given_lengths:
        raise UsageError("the lengths are --workload's", " and ".join(given_lengths), "leave them out, or --workload")
    problems = choice.problems(kind)
    load = None if workload is None else Workload.read(workload, problems[0])
    budget_s = seconds(budget or _BUDGETS[kind]) / len(problems)
    chosen = split(backends, BACKENDS, "--backends")
    reports: list[SearchReport] = []
    try:
        for problem in problems:
            title = _title(problem) if load is None else f"{_title(load.problem)} and {len(load.entries) - 1} more"
            with _progress(title, budget_s) as progress:
                reports.append(
                    run_search(
                        problem,
                        budget_s,
                        backends=chosen,
                        database=db,
                        resume=resume,
                        trials=trials,
                        progress=progress,
                        device=devices(device),
                        sampler=sampler,
                        target=target,
                        max_memory_bytes=None if max_memory is None else size_bytes(max_memory),
                        workload=load,
                    )
                )
    except SearchInterrupted as stop:
        typer.echo(f"stopped: {stop.trials} trials are kept in {_where(db)}; go on with", err=True)
        given: dict[str, object] = {
            "--budget": budget, "--trials": trials, "--sampler": None if sampler == "auto" else sampler,
            "--target": target, "--max-memory": max_memory, "--workload": workload, "--backends": backends,
            "--db": db, "--device": device,
        }  # fmt: skip
        typer.echo(f"  {_again(choice, given)}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if reports and not as_json:
            _print(reports, db)
    if as_json:
        print_json({"database": _where(db), "reports": [report.to_dict() for report in reports]})
    else:
        _print_use(choice, reports[0].problem, db, kind)


def _print(reports: list[SearchReport], db: str | None) -> None:
    from rich.table import Table

    out = console()
    table = Table(title=f"Tuned on {reports[0].device.name}", title_justify="left")
    for heading in ("problem", "default", "best", "speed-up", "error against the reference", "trials"):
        table.add_column(heading, justify="left" if heading == "problem" else "right", overflow="fold")
    for report in reports:
        default = shown_time(report.default_time_us) if report.default is not None else "not admitted"
        worst = max(report.errors, key=lambda name: report.errors[name], default="")
        table.add_row(
            _of(report), default, shown_time(report.best_time_us),
            shown_ratio(report.default_time_us, report.best_time_us), f"{report.error:.1e} ({worst})",
            ", ".join(f"{count} {outcome}" for outcome, count in sorted(report.outcomes.items())),
        )  # fmt: skip
        for entry in report.entries if len(report.entries) > 1 else ():
            before = None if entry.default is None else entry.default.median_us
            table.add_row(
                f"  {100 * entry.share:.3g} %: {entry.title}", shown_time(before), shown_time(entry.best.median_us),
                shown_ratio(before, entry.best.median_us), "", "" if entry.stored else "not stored",
            )  # fmt: skip
    out.print(table)
    for report in reports:
        for one in report.frontier:
            out.print(
                f"{_title(report.problem)}: {shown_time(one.time_us)} with {one.peak_bytes / 2**20:.0f} MiB, "
                f"plan {one.plan}", markup=False,
            )  # fmt: skip
        if report.over_memory:
            out.print(f"{_title(report.problem)}: {report.over_memory} plans needed more memory than allowed")
        if report.ties:
            out.print(f"{_title(report.problem)}: {report.ties} other plans tie with the best, within the noise")
        if report.default_failure is not None:
            out.print(f"the default was not admitted: {report.default_failure}", markup=False)
        elif report.is_default:
            out.print(f"{_title(report.problem)}: the default is the answer; none beat it by more than the noise")
        if report.busy is not None:
            out.print(f"{_title(report.problem)}: {report.busy.line()}", markup=False)
        if not report.stored:
            kept = "the database has a faster answer and keeps that one"
            if len(report.entries) > 1:
                kept = "it is not stored where the database has a faster answer or it is slower than what would run"
            out.print(f"{_title(report.problem)}: {kept}")
    total = sum(report.trials for report in reports)
    out.print(f"All {total} trials are in {_where(db)}; see `sse-tune show --trials`.", markup=False, soft_wrap=True)


def _print_use(choice: ProblemChoice, problem: Problem, db: str | None, kind: str) -> None:
    """Three lines of Python that run the result."""
    arguments = "" if problem.num_partitions else "None, "
    arguments = arguments or f"router_logits, top_k={problem.top_k}, "
    arguments += "beta=beta, " if problem.rule == "gdn" else ""
    if problem.norm != "none":
        arguments += "qk_l2norm=True, " + ("gate_before_norm=True, " if problem.norm == "before" else "")
    if problem.shared and problem.num_partitions:
        arguments += "shared_q=q1, shared_k=k1, shared_g=g1, " + (
            "shared_beta=beta1, " if problem.rule == "gdn" else ""
        )
    if problem.num_sequences is not None:
        arguments += "cu_seqlens=cu_seqlens, "
    database = "" if db is None else f", database={db!r}"
    typer.echo("\nTo use it:\n")
    typer.echo("  import sse_tune as st")
    typer.echo(f"  kernel = st.load_best({_python(choice, problem, kind)}{database})")
    typer.echo(f"  o, state = kernel(q, k, v, g, {arguments.removesuffix(', ')})")
    if db is None:
        typer.echo("\nst.sse_attention(...) with the same arguments finds it by itself.")


def _python(choice: ProblemChoice, problem: Problem, kind: str) -> str:
    """The expression that makes a problem again."""
    if choice.rule is None:
        name = choice.preset or default_preset(kind)
        base, call = Problem.preset(name).to_dict(), f'st.Problem.preset("{name}"'
    else:
        required = Problem(
            rule=problem.rule, seq_len=problem.seq_len, num_heads=problem.num_heads, head_dim=problem.head_dim
        )
        base = required.to_dict()
        call = (
            f'st.Problem(rule="{problem.rule}", seq_len={problem.seq_len}, num_heads={problem.num_heads}, '
            f"head_dim={problem.head_dim}"
        )
    changed = {name: value for name, value in problem.to_dict().items() if base[name] != value}
    if changed.get("read_k") == changed.get("top_k"):
        changed.pop("read_k", None)
    return call + "".join(f", {name}={value!r}" for name, value in changed.items()) + ")"


def _of(report: SearchReport) -> str:
    """What a row of the table is about."""
    if len(report.entries) < 2:
        return _title(report.problem)
    return f"{_title(report.problem)} and {len(report.entries) - 1} more, expected time"


def _title(problem: Problem) -> str:
    value = "" if problem.value_dim == problem.key_dim else f" V={problem.value_dim}"
    sizes = f"B={problem.batch} T={problem.seq_len} H={problem.num_heads} K={problem.key_dim}{value}"
    return (
        f"{problem.rule} {problem.dtype} {sizes} N={problem.num_partitions} top_k={problem.top_k} {problem.direction}"
    )


def _where(db: str | None) -> str:
    from sse_tune.database.store import default_path

    return str(default_path()) if db is None else db.rsplit("@", 1)[-1] if "://" in db else db


def _again(choice: ProblemChoice, given: dict[str, object]) -> str:
    parts = ["sse-tune search", choice.arguments()]
    parts += [f"{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None]
    return " ".join(part for part in (*parts, "--resume") if part)


@contextlib.contextmanager
def _progress(title: str, budget_s: float) -> Iterator[Progress]:
    """A bar on a terminal, a line for each phase elsewhere; both on stderr, since stdout is for results."""
    if not sys.stderr.isatty():
        yield _Lines(lambda line: typer.echo(line, err=True), title)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
        TextColumn("best {task.fields[best]}"), TimeElapsedColumn(), TextColumn(f"of {budget_s:.0f} s"),
    )  # fmt: skip
    screen = console(stderr=True)
    screen.print(title, markup=False)
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("starting", total=1, best="-")

        def tell(phase: str, done: int, total: int, best_us: float | None) -> None:
            bar.update(task, description=phase, completed=done, total=max(total, 1), best=shown_time(best_us))

        yield tell


@dataclasses.dataclass
class _Lines:
    """Progress where there is no terminal: a line when a phase begins, and then every ten seconds at most."""

    write: Callable[[str], None]
    title: str
    phase: str = ""
    told: float = 0.0

    def __call__(self, phase: str, done: int, total: int, best_us: float | None) -> None:
        if phase != self.phase or time.monotonic() - self.told > 10:
            self.phase, self.told = phase, time.monotonic()
            self.write(f"{self.title}: {phase} {done}/{total}, best {shown_time(best_us)}")
