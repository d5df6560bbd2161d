"""The command `sse-tune`: one module of commands each for searching, looking, checking, measuring and exchanging.

Exit codes: 0 done; 1 a check failed, or nothing was found; 2 bad usage or input; 3 the environment cannot do it (no
GPU, no compiler); 4 the database is damaged or out of reach; 130 interrupted.
"""

from __future__ import annotations

import typer

from sse_tune import __version__, cli_bench, cli_check, cli_doctor, cli_exchange, cli_search, cli_show, cli_sweep
from sse_tune.cli_common import OneLineErrors

app = typer.Typer(
    name="sse-tune",
    help=(
        "Tunes, checks and measures kernels for linear attention with sparse state expansion.\n\n"
        "Exit codes: 0 done; 1 a check failed or nothing was found; 2 bad usage or input; 3 the environment cannot do "
        "it; 4 the database is damaged or out of reach; 130 interrupted."
    ),
    cls=OneLineErrors,
    no_args_is_help=False,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"sse-tune {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options of all commands."""


app.command("search")(cli_search.search)
app.command("sweep")(cli_sweep.sweep)
app.command("show")(cli_show.show)
app.command("best")(cli_show.best)
app.command("explain")(cli_show.explain)
app.command("check")(cli_check.check)
app.command("bench")(cli_bench.bench)
app.command("export")(cli_exchange.export)
app.command("import")(cli_exchange.import_)
app.command("merge")(cli_exchange.merge)
app.command("doctor")(cli_doctor.doctor)


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
