"""`export`, `import` and `merge`: answers and trials as files, and from one database into another."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from sse_tune.cli_common import DbOption, UsageError

FORMATS = ("json", "csv", "parquet")


def export(
    path: Annotated[pathlib.Path, typer.Argument(help="File to write; .json, .csv or .parquet.")],
    db: DbOption = None,
    kind: Annotated[
        str | None, typer.Option("--format", help="json, csv or parquet; by default from the name.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write the database to a file: all of it as JSON, its answers or trials as CSV or Parquet."""
    from sse_tune.database.store import TuningDatabase

    if kind is not None and kind not in FORMATS:
        raise UsageError(f"the format must be one of {', '.join(FORMATS)}", kind, "choose one of them")
    if path.exists() and not force:
        raise UsageError("an export replaces no file", f"{path}", "name another one or add --force")
    _must_exist(db)
    with TuningDatabase(db) as database:
        database.export(path, kind)
        typer.echo(f"wrote {len(database.answers())} answers and {len(database.trials())} trials to {path}")


def import_(
    path: Annotated[pathlib.Path, typer.Argument(help="An exported file.")],
    db: DbOption = None,
) -> None:
    """Take answers and trials from an exported file; one that does not fit the format is refused whole."""
    from sse_tune.database.store import TuningDatabase

    if not path.is_file():
        raise UsageError("the file must exist", f"{path}", "name an exported file")
    with TuningDatabase(db) as database:
        typer.echo(f"took {database.import_file(path)} records from {path}")


def merge(
    source: Annotated[str, typer.Argument(help="Database file or URL to take from; it is left as it is.")],
    db: DbOption = None,
) -> None:
    """Take everything from another database; of two answers to one question the better one stays."""
    from sse_tune.database.store import TuningDatabase

    _must_exist(source)
    with TuningDatabase(source) as other, TuningDatabase(db) as database:
        typer.echo(f"took {database.merge(other)} records from {source}")


def _must_exist(db: str | None) -> None:
    """Opening a database creates it; to read from one, it must be there."""
    from sse_tune.database.store import default_path

    if db is not None and "://" in db:
        return
    path = default_path() if db is None else pathlib.Path(db)
    if not path.is_file():
        raise UsageError("the database must exist", f"{path}", "make one with `sse-tune search`")
