"""`show`, `best` and `explain`: what is known, what of it would run, and why."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Annotated

import typer

from sse_tune.cli_common import (
    FAILED,
    DbOption,
    DeviceOption,
    JsonOption,
    ProblemChoice,
    console,
    find_device,
    print_json,
    shown_ratio,
    shown_time,
    takes_problem,
)

if TYPE_CHECKING:
    from sse_tune.database.records import Answer, Trial
    from sse_tune.device import Device
    from sse_tune.problem import Problem
    from sse_tune.runtime.dispatch import Decision


def show(
    db: DbOption = None,
    device: DeviceOption = None,
    every_device: Annotated[bool, typer.Option("--all", help="Answers for other devices too.")] = False,
    trials: Annotated[bool, typer.Option("--trials", help="How each study went, trial by outcome.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What is known: the tuned answers for this device, of the database and shipped with the package."""
    from sse_tune.database.store import TuningDatabase, default_path

    here = find_device(device)
    counted: dict[str, collections.Counter[str]] = {}
    own: list[Answer] = []
    if db is not None or default_path().exists():
        with TuningDatabase(db) as database:
            own = database.answers() if every_device else database.answers(device=here.slug)
            counted = _outcomes(database.trials()) if trials else {}
    rows = [("database", answer) for answer in own] + [("shipped", answer) for answer in _shipped(here)]
    if as_json:
        print_json(
            {
                "device": here.slug,
                "answers": [{"source": source, **_fields(answer, here)} for source, answer in rows],
                "studies": {study: dict(counter) for study, counter in counted.items()},
            }
        )
    else:
        _print_answers(rows, here)
        _print_studies(counted)
    if not rows and not counted:
        if not as_json:
            typer.echo(f"nothing is known for {here.name}; tune it with `sse-tune search`")
        raise typer.Exit(FAILED)


@takes_problem
def best(choice: ProblemChoice, db: DbOption = None, device: DeviceOption = None, as_json: JsonOption = False) -> None:
    """The plan that would run a problem here; exit code 1 when it is only the default."""
    problem, here, decision = _decide(choice, db, device)
    if as_json:
        print_json(
            {
                "bucket": problem.bucket.name,
                "device": here.slug,
                "source": decision.source,
                "reason": decision.reason,
                "time_us": decision.answer.time_us if decision.answer else None,
                "plan": decision.plan.to_dict(),
            }
        )
    else:
        typer.echo(f"{decision.source}: {decision.reason}")
        typer.echo(f"graph {decision.plan.graph}  {_words(decision.plan.outer)}".rstrip())
        for stage, chosen in decision.plan.stages.items():
            typer.echo(f"  {stage:<18} {chosen.backend}:{chosen.template}  {_words(chosen.config)}".rstrip())
    if decision.source == "default":
        raise typer.Exit(FAILED)


@takes_problem
def explain(
    choice: ProblemChoice, db: DbOption = None, device: DeviceOption = None, as_json: JsonOption = False
) -> None:
    """Why this plan would run a problem here, and what was passed over."""
    from sse_tune.runtime import kernel

    problem, here, decision = _decide(choice, db, device)
    if not as_json:
        typer.echo(kernel.explain(problem, here, decision))
        return
    print_json(
        {
            "problem": problem.to_dict(),
            "bucket": problem.bucket.name,
            "device": here.slug,
            "source": decision.source,
            "reason": decision.reason,
            "passed_over": list(decision.refused),
            "answer": _fields(decision.answer, here) if decision.answer else None,
            "plan": decision.plan.to_dict(),
        }
    )


def _decide(choice: ProblemChoice, db: str | None, device: str | None) -> tuple[Problem, Device, Decision]:
    from sse_tune.runtime.dispatch import decide

    here = find_device(device)
    problem = choice.problem(here.kind)
    return problem, here, decide(problem, here, db)


def _shipped(device: Device) -> tuple[Answer, ...]:
    from sse_tune.database.shipped import shipped_answers

    return shipped_answers(device)


def _fits(answer: Answer, device: Device) -> str | None:
    from sse_tune.database.keys import fits
    from sse_tune.device import toolchain

    return fits(answer, device, toolchain())


def _fields(answer: Answer, device: Device) -> dict[str, object]:
    return {
        "bucket": answer.bucket,
        "device": answer.device,
        "time_us": answer.time_us,
        "default_time_us": answer.default_time_us,
        "toolchain": answer.toolchain,
        "created": answer.created,
        "how": answer.how,
        "does_not_fit": _fits(answer, device),
    }


def _print_answers(rows: list[tuple[str, Answer]], device: Device) -> None:
    from rich.table import Table

    if not rows:
        return
    table = Table(title=f"Answers on {device.name}", title_justify="left")
    for heading in ("bucket", "default", "best", "speed-up", "found", "from", "used here"):
        table.add_column(
            heading, overflow="fold", justify="right" if heading in ("default", "best", "speed-up") else "left"
        )
    for source, answer in rows:
        table.add_row(
            answer.bucket, shown_time(answer.default_time_us), shown_time(answer.time_us),
            shown_ratio(answer.default_time_us, answer.time_us), answer.created[:16].replace("T", " "), source,
            _fits(answer, device) or "yes",
        )  # fmt: skip
    console().print(table)


def _print_studies(counted: dict[str, collections.Counter[str]]) -> None:
    from rich.table import Table

    if not counted:
        return
    table = Table(title="Trials by study", title_justify="left")
    outcomes = sorted({outcome for counter in counted.values() for outcome in counter})
    for heading in ("study", *outcomes):
        table.add_column(heading, overflow="fold", justify="left" if heading == "study" else "right")
    for study, counter in counted.items():
        table.add_row(study, *(str(counter[outcome]) for outcome in outcomes))
    console().print(table)


def _outcomes(trials: list[Trial]) -> dict[str, collections.Counter[str]]:
    counted: dict[str, collections.Counter[str]] = {}
    for trial in trials:
        counted.setdefault(trial.study, collections.Counter())[trial.outcome] += 1
    return counted


def _words(config: object) -> str:
    return " ".join(f"{name}={value}" for name, value in dict(config).items())  # type: ignore[call-overload]
