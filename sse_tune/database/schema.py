"""The tables, and how a database is opened: looked at first, so that a damaged or foreign file is never touched.

Records are stored with one column per field, nested ones as JSON text. SQLite runs in WAL mode: readers and writers of
several processes do not stop each other, and what a commit has returned from survives the death of its process. No
connection outlives an operation, so a database object may cross a fork.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import pathlib
import sqlite3
import time
from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from sse_tune.database.interrupts import uninterrupted
from sse_tune.database.records import Answer, Quarantined, Record, Study, Trial
from sse_tune.errors import DatabaseError

VERSION = 2
_UPGRADES = (1,)  # what only lacks tables that were added since
BUSY_TIMEOUT_S = 60.0
_HEADER = b"SQLite format 3\0"
_COLUMNS: dict[str, sa.types.TypeEngine] = {
    "float": sa.Float(53), "float | None": sa.Float(53), "int": sa.Integer(),
}  # fmt: skip
_LOCK = 7355608  # PostgreSQL advisory lock held while the tables are made

metadata = sa.MetaData()


def _table(name: str, record: type[Record], *more: sa.schema.SchemaItem) -> sa.Table:
    columns = [
        sa.Column(field.name, _COLUMNS.get(str(field.type), sa.Text()), nullable="None" in str(field.type))
        for field in dataclasses.fields(record)
    ]
    return sa.Table(name, metadata, *columns, *more)


# the names begin alike: a PostgreSQL database may hold other tables too
SCHEMA = sa.Table("sse_schema", metadata, sa.Column("version", sa.Integer, nullable=False))
STUDIES = _table("sse_studies", Study, sa.PrimaryKeyConstraint("id"), sa.Index("sse_studies_key", "key"))
TRIALS = _table(
    "sse_trials",
    Trial,
    sa.PrimaryKeyConstraint("study", "number"),
    sa.ForeignKeyConstraint(["study"], ["sse_studies.id"]),
)
ANSWERS = _table(
    "sse_answers",
    Answer,
    sa.Column("identity", sa.String(32), primary_key=True),
    sa.Index("sse_answers_device_bucket", "device", "bucket"),
)
QUARANTINE = _table("sse_quarantine", Quarantined, sa.Column("identity", sa.String(32), primary_key=True))
CLAIMS = sa.Table(
    "sse_claims",
    metadata,
    sa.Column("study", sa.Text, nullable=False),
    sa.Column("candidate", sa.String(32), nullable=False),
    sa.Column("plan", sa.Text, nullable=False),
    sa.Column("stage", sa.Text, nullable=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("lease_until", sa.Float(53), nullable=False),
    sa.Column("trial", sa.Integer, nullable=True),
    sa.PrimaryKeyConstraint("study", "candidate"),
    sa.ForeignKeyConstraint(["study"], ["sse_studies.id"]),
)


def open_engine(where: str | pathlib.Path) -> tuple[sa.Engine, str]:
    """An engine on a tuning database, its tables made if there were none, and the database's name for messages.

    Raises:
        DatabaseError: the file is damaged, of another program or of a newer version, or the server cannot be reached.
    """
    url = _url(where)
    shown = url.render_as_string(hide_password=True)
    sqlite = url.get_backend_name() == "sqlite"
    if sqlite:
        assert url.database is not None
        shown = url.database
        _inspect(pathlib.Path(url.database))
    engine = sa.create_engine(
        url, poolclass=NullPool, **({"connect_args": {"timeout": BUSY_TIMEOUT_S}} if sqlite else {})
    )
    if sqlite:
        sa.event.listen(engine, "connect", _configure)
        sa.event.listen(engine, "begin", _begin)
    with reported(shown), writing(engine) as connection:
        if not sqlite:
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        if not sa.inspect(connection).has_table(SCHEMA.name):
            metadata.create_all(connection)
            connection.execute(SCHEMA.insert().values(version=VERSION))
        versions = connection.execute(sa.select(SCHEMA.c.version)).scalars().all()
        if len(versions) == 1 and versions[0] in _UPGRADES:
            metadata.create_all(connection)
            connection.execute(SCHEMA.update().values(version=VERSION))
            versions = [VERSION]
        if versions != [VERSION]:
            raise DatabaseError(
                f"a tuning database must be of schema version {VERSION}",
                f"version {', '.join(map(str, versions)) or 'none'} in {shown}",
                "upgrade sse-tune, or use another database",
            )
    return engine, shown


@contextlib.contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection in a transaction that holds the right to write from its start."""
    with uninterrupted(), engine.execution_options(sse_write=True).begin() as connection:
        yield connection


@contextlib.contextmanager
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection in a transaction that sees one state of the database."""
    with uninterrupted(), engine.begin() as connection:
        yield connection


@contextlib.contextmanager
def reported(shown: str) -> Iterator[None]:
    """Turns the errors of the database driver into one line."""
    try:
        yield
    except (sa.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
        cause = str(getattr(error, "orig", None) or error).strip().split("\n")[0]
        remedy = "check the path, the permissions and the free space"
        if "locked" in cause:
            remedy = "another process holds it: end it or try again"
        elif any(word in cause for word in ("malformed", "not a database", "file format")):
            remedy = f"it is left as it is: move it away, or recover it with `sqlite3 {shown} .recover`"
        elif "://" in shown:
            remedy = "check the URL and that the server answers"
        raise DatabaseError(f"the tuning database {shown} must be readable and writable", cause, remedy) from None


def _url(where: str | pathlib.Path) -> sa.URL:
    if isinstance(where, str) and "://" in where:
        try:
            url = sa.make_url(where)
        except sa.exc.ArgumentError:
            # the text may hold a password: it is not repeated
            raise DatabaseError("a database URL must be one of SQLAlchemy's", "one that does not parse",
                                "write postgresql://user@host/name") from None  # fmt: skip
    else:
        url = sa.URL.create("sqlite", database=str(pathlib.Path(where).expanduser()))
    backend = url.get_backend_name()
    if backend in ("postgresql", "postgres"):
        if importlib.util.find_spec("psycopg") is None:
            remedy = "pip install 'sse-tune[postgres]'"
            raise DatabaseError("PostgreSQL needs the package psycopg", "none installed", remedy)
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite" or not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise DatabaseError(
            "a tuning database is an SQLite file or a PostgreSQL URL",
            url.render_as_string(hide_password=True),
            "pass a path or postgresql://user@host/name",
        )
    return url


def _inspect(path: pathlib.Path) -> None:
    """Raises DatabaseError when a file is there and is not a sound tuning database; changes nothing of it."""
    remedy = "it is left as it is: give another path, or move the file away"
    if path.is_dir():
        raise DatabaseError("a tuning database must be a file", f"the folder {path}", "give the path of a file in it")
    with reported(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.stat().st_size == 0:
            return
        with path.open("rb") as file:
            if file.read(len(_HEADER)) != _HEADER:
                raise DatabaseError("a tuning database must be an SQLite file", f"{path}, which is none", remedy)
        uri = path.resolve().as_uri() + "?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables and SCHEMA.name not in tables:
                raise DatabaseError(
                    "a tuning database must be one that sse-tune made",
                    f"{path}, with the tables {', '.join(sorted(tables)[:4])}",
                    remedy,
                )
            damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if damage != "ok":
        raise DatabaseError(
            "a tuning database must be undamaged",
            f"{path}: {damage}",
            f"it is left as it is: move it away, or recover it with `sqlite3 {path} .recover`",
        )


def _configure(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # transactions are begun by `_begin`, not by the driver
    connection.execute("PRAGMA foreign_keys = ON")
    # the switch to WAL does not wait for others as statements do: whoever comes first makes it, the rest find it made
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("sse_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
