"""`TuningDatabase`: studies, trials, answers and the quarantine, in an SQLite file or a PostgreSQL database.

Every write is one transaction: what a call has returned from survives `kill -9`, what was cut off leaves no trace.
"""

from __future__ import annotations

import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import sqlalchemy as sa

from sse_tune.database import claims
from sse_tune.database.claims import Claim
from sse_tune.database.fields import digest
from sse_tune.database.records import Answer, Contents, Quarantined, Record, Study, Trial
from sse_tune.database.rows import add_trial, put_answer, put_quarantined, put_study, rows, take_all
from sse_tune.database.schema import ANSWERS, QUARANTINE, STUDIES, TRIALS, open_engine, reading, reported, writing
from sse_tune.device import Device
from sse_tune.errors import DatabaseError
from sse_tune.problem import Problem

R = TypeVar("R", bound=Record)
T = TypeVar("T")
_ATTEMPTS = 20  # writers that race for one row: each round at least one of them gets through


def default_path() -> pathlib.Path:
    """Where a user's own answers are kept: `~/.cache/sse_tune/tuning.db`."""
    return pathlib.Path.home() / ".cache" / "sse_tune" / "tuning.db"


class TuningDatabase:
    """What is known about kernels: made on first use, kept in a file or on a server, safe for many processes at once.

    Args:
        url_or_path: an SQLite file, `postgresql://user@host/name`, or None: the user's own, `default_path()`.

    Raises:
        DatabaseError: the file is damaged or not ours (it is left as it is), or the server cannot be reached.
    """

    def __init__(self, url_or_path: str | pathlib.Path | None = None) -> None:
        self._engine, self.name = open_engine(default_path() if url_or_path is None else url_or_path)

    def __enter__(self) -> TuningDatabase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    @property
    def server_url(self) -> sa.URL | None:
        """Of the PostgreSQL server, where other hosts reach it too; None: an SQLite file."""
        return None if self._engine.dialect.name == "sqlite" else self._engine.url

    def __repr__(self) -> str:
        return f"TuningDatabase({self.name!r})"

    def close(self) -> None:
        self._engine.dispose()

    # studies and trials

    def open_study(self, key: str, problem: Problem, device: Device, note: Mapping[str, Any]) -> str:
        """The id of the study of this key, which is opened if there is none; every machine gives it the same id.

        Args:
            key: `keys.study_key(...)`.
            problem, device: what is tuned, and where.
            note: backends, budget, command line, ...; any plain data, of the search that opened it.
        """
        study = Study(
            id=digest(key), key=key, problem=problem.to_dict(), device=device.slug, arch=device.arch, note=dict(note)
        )
        self._write(lambda connection: put_study(connection, study))
        return study.id

    def study(self, key: str) -> Study | None:
        """The study of this key; None: it was never opened."""
        return next(iter(self._read(sa.select(STUDIES).where(STUDIES.c.key == key), Study)), None)

    def studies(self) -> list[Study]:
        return self._read(sa.select(STUDIES).order_by(STUDIES.c.created, STUDIES.c.id), Study)

    def add_trial(self, trial: Trial) -> int:
        """Stores a trial and returns its number; from then on it survives the death of this process.

        Raises:
            DatabaseError: its study is not known, or has a trial of that number.
        """
        return self._write(lambda connection: add_trial(connection, trial))

    def trials(self, study: str | None = None) -> list[Trial]:
        """The trials of a study, by number; None: of all studies."""
        query = sa.select(TRIALS).order_by(TRIALS.c.study, TRIALS.c.number)
        return self._read(query if study is None else query.where(TRIALS.c.study == study), Trial)

    def trials_since(self, study: str, number: int) -> list[Trial]:
        """The trials of a study from a number on."""
        query = sa.select(TRIALS).where(TRIALS.c.study == study, TRIALS.c.number >= number)
        return self._read(query.order_by(TRIALS.c.number), Trial)

    # claims: see `claims.py`

    def claim(self, wanted: Claim, owner: str, lease_s: float, since: int) -> str:
        """Takes a candidate for `lease_s` seconds: `claims.MINE`, `THEIRS`, or `DONE` as trial `since` or later."""
        return self._write(lambda connection: claims.claim(connection, wanted, owner, lease_s, since))

    def take_lapsed(
        self, study: str, owner: str, lease_s: float, accept: Callable[[Claim], bool]
    ) -> Claim | None:
        """Takes up the claim of a process that stopped renewing it; None: there is none that `accept` wants."""
        return self._write(lambda connection: claims.take_lapsed(connection, study, owner, lease_s, accept))

    def renew_claims(self, owner: str, lease_s: float) -> None:
        """Extends the leases of an owner's open claims."""
        self._write(lambda connection: claims.renew(connection, owner, lease_s))

    def release_claims(self, owner: str) -> None:
        """Gives an owner's open claims back."""
        self._write(lambda connection: claims.release(connection, owner))

    def finish_claim(self, trial: Trial, candidate: str, owner: str) -> int | None:
        """Stores a claimed trial, see `add_trial`; None: the lease ran out and another process has the candidate."""
        return self._write(lambda connection: claims.finish(connection, trial, candidate, owner))

    # answers

    def put_answer(self, answer: Answer) -> bool:
        """Stores an answer unless one that stays is known for the same bucket, device, toolchain and sources: one that
        outdoes it, or that is as fast and not outdone (`Answer.replaces`).

        Returns:
            Whether it was stored.
        """
        return self._write(lambda connection: put_answer(connection, answer))

    def answers(self, device: str | None = None, bucket: str | None = None) -> list[Answer]:
        """The answers, the latest first; of one `Device.slug` and `Bucket.name` when given."""
        query = sa.select(ANSWERS).order_by(ANSWERS.c.created.desc(), ANSWERS.c.identity)
        for column, value in ((ANSWERS.c.device, device), (ANSWERS.c.bucket, bucket)):
            query = query if value is None else query.where(column == value)
        return self._read(query, Answer)

    # quarantine

    def quarantine(
        self, arch: str, compiler: str, template: str, config: Mapping[str, Any], source_hash: str, reason: str
    ) -> None:
        """Notes that a config failed admission with this compiler and source; the first reason stays.

        Args:
            arch: `Device.arch`.
            compiler: name and version, "triton 3.6.0".
            template: "backend:template".
            config: the template's parameters and the plan's outer ones that it depends on.
            source_hash: `Template.source_hash`.
            reason: what went wrong.
        """
        record = Quarantined(
            arch=arch, compiler=compiler, template=template, config=dict(config), source_hash=source_hash, reason=reason
        )
        self._write(lambda connection: put_quarantined(connection, record))

    def is_quarantined(
        self, arch: str, compiler: str, template: str, config: Mapping[str, Any], source_hash: str
    ) -> str | None:
        """Why a config is not to be tried again; None: it may be."""
        wanted = Quarantined(
            arch=arch, compiler=compiler, template=template, config=dict(config), source_hash=source_hash, reason="?"
        )
        found = self._read(sa.select(QUARANTINE).where(QUARANTINE.c.identity == wanted.identity), Quarantined)
        return found[0].reason if found else None

    def quarantined(self) -> list[Quarantined]:
        return self._read(sa.select(QUARANTINE).order_by(QUARANTINE.c.created, QUARANTINE.c.identity), Quarantined)

    # exchange

    def contents(self) -> Contents:
        """Everything, as of one moment."""
        with reported(self.name), reading(self._engine) as connection:
            return Contents(
                tuple(rows(connection, sa.select(STUDIES).order_by(STUDIES.c.created, STUDIES.c.id), Study)),
                tuple(rows(connection, sa.select(TRIALS).order_by(TRIALS.c.study, TRIALS.c.number), Trial)),
                tuple(rows(connection, sa.select(ANSWERS).order_by(ANSWERS.c.device, ANSWERS.c.bucket,
                                                                    ANSWERS.c.identity), Answer)),
                tuple(rows(connection, sa.select(QUARANTINE).order_by(QUARANTINE.c.created,
                                                                       QUARANTINE.c.identity), Quarantined)),
            )  # fmt: skip

    def take(self, contents: Contents) -> int:
        """Adds records in one transaction: all of them or, on an error, none.

        What is known is passed over; of two answers the faster stays, unless it was measured beside the other and not
        chosen; a trial whose number is taken by another one gets the next free number.

        Returns:
            How many records were new, or answers replaced.
        """
        return self._write(lambda connection: take_all(connection, contents))

    def export(self, path: str | pathlib.Path, format: str | None = None) -> None:
        """Writes everything to a JSON file, or studies, trials and answers to a CSV or Parquet table.

        Args:
            path: the file; it is replaced at once, never half written.
            format: "json", "csv" or "parquet"; None: by the file's ending.

        Raises:
            ExchangeError: no such format, or the file cannot be written.
        """
        from sse_tune.database.exchange import write_file

        write_file(self.contents(), pathlib.Path(path), format)

    def import_file(self, path: str | pathlib.Path) -> int:
        """Adds the records of an exported file: all or, on an error, none. Returns how many were new.

        Raises:
            ExchangeError: a field is unknown or of the wrong type, a parameter outside its template's space, ...
        """
        from sse_tune.database.exchange import read_file

        return self.take(read_file(pathlib.Path(path)))

    def merge(self, other: TuningDatabase | str | pathlib.Path) -> int:
        """Adds the records of another database, in one transaction. Returns how many were new."""
        if isinstance(other, TuningDatabase):
            return self.take(other.contents())
        if not (isinstance(other, str) and "://" in other) and not pathlib.Path(other).expanduser().exists():
            raise DatabaseError("a database to merge must be there", str(other), "check the path")
        with TuningDatabase(other) as opened:
            return self.take(opened.contents())

    def _write(self, work: Callable[[sa.Connection], T]) -> T:
        """Does `work` in one transaction; again when, on a server, another writer inserted the same row meanwhile."""
        with reported(self.name):
            for attempt in range(_ATTEMPTS):
                try:
                    with writing(self._engine) as connection:
                        return work(connection)
                except sa.exc.IntegrityError:
                    if attempt + 1 == _ATTEMPTS:
                        raise
        raise AssertionError("the loop returns or raises")

    def _read(self, query: sa.Select[Any], record: type[R]) -> list[R]:
        with reported(self.name), reading(self._engine) as connection:
            return rows(connection, query, record)
