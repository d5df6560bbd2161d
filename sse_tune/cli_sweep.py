"""`sweep`: measure every config of some spaces, to be replayed where there is no such machine."""

from __future__ import annotations

import pathlib
import sys
from typing import Annotated

import typer

from sse_tune.cli_common import (
    BackendsOption,
    DbOption,
    ProblemChoice,
    UsageError,
    devices,
    kind_of,
    shown_time,
    split,
    takes_problem,
)


@takes_problem
def sweep(
    choice: ProblemChoice,
    output: Annotated[pathlib.Path, typer.Argument(help="The file to write, NAME.json.gz.")],
    stage: Annotated[list[str] | None, typer.Option(help="A stage, several times; by default all.")] = None,
    every_outer: Annotated[
        bool, typer.Option("--every-outer", help="At every outer point that the roofline leaves.")
    ] = False,
    nearest: Annotated[
        int | None, typer.Option(min=1, help="Of each template so many configs, those nearest to its default.")
    ] = None,
    whole_plans: Annotated[
        bool, typer.Option("--whole-plans", help="Also each combination of the stages' configs, end to end.")
    ] = False,
    backends: BackendsOption = None,
    db: DbOption = None,
    device: Annotated[str | None, typer.Option(help="As in search.")] = None,
) -> None:
    """Measure every config of a problem's stages on this machine; what the database has is not measured again.

    `python -m sse_tune.tuning.replay FILE` compares search strategies on the result.
    """
    from sse_tune.templates.registry import BACKENDS
    from sse_tune.tuning.additivity import additivity
    from sse_tune.tuning.replay import WITHIN
    from sse_tune.tuning.sweep import sweep as run_sweep
    from sse_tune.tuning.sweep_file import write_sweep

    if not output.name.endswith(".json.gz"):
        raise UsageError("a sweep's file must be named NAME.json.gz", output.name, "name it so")

    def tell(phase: str, done: int, total: int, best_us: float | None) -> None:
        if done % 20 == 0 or done == total:
            typer.echo(f"{phase} {done}/{total}, best {shown_time(best_us)}", err=True)

    found = run_sweep(
        choice.problem(kind_of(device)), stages=stage, every_outer=every_outer,
        nearest=nearest, whole_plans=whole_plans, backends=split(backends, BACKENDS, "--backends"),
        database=db, device=devices(device), progress=tell,
        how={"command": " ".join(["sse-tune", *sys.argv[1:]])},
    )  # fmt: skip
    write_sweep(found, output)
    failed = sum(row.outcome != "ok" for space in found.spaces for row in space.rows.values())
    count = sum(len(space.rows) for space in found.spaces)
    typer.echo(f"wrote {count} configs of {len(found.spaces)} spaces, {failed} of them failed, to {output}")
    if whole_plans:
        lost = sum(row.outcome != "ok" for row in found.plans.values())
        typer.echo(f"with {len(found.plans)} whole plans, {lost} of them failed")
        typer.echo(additivity(found).line(WITHIN))
