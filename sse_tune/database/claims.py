"""Who works at which candidate of a study: each is claimed by one process, and a dead one's claims are taken up again.

A claim is a row with its owner and a lease, renewed while the owner lives, by the clock of the database. When the trial
is stored the claim is marked done in the same transaction. PostgreSQL locks rows (`FOR UPDATE`, and `SKIP LOCKED` where
any row will do); SQLite lets one writer in at a time, which serves as well.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from sse_tune.database.fields import canonical
from sse_tune.database.records import Trial
from sse_tune.database.rows import add_trial
from sse_tune.database.schema import CLAIMS

MINE, THEIRS, DONE = "mine", "theirs", "done"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A candidate somebody works at.

    Args:
        study: the id of its study.
        candidate: what names it there, at most 32 characters.
        plan: `Plan.to_dict()`.
        stage: the stage that is measured; None: the whole plan.
    """

    study: str
    candidate: str
    plan: dict[str, Any]
    stage: str | None


def claim(connection: sa.Connection, wanted: Claim, owner: str, lease_s: float, since: int) -> str:
    """Takes a candidate, if nobody alive has it: "mine", "theirs", or "done", stored as trial `since` or later."""
    where = (CLAIMS.c.study == wanted.study, CLAIMS.c.candidate == wanted.candidate)
    present = connection.execute(sa.select(CLAIMS).where(*where).with_for_update()).mappings().first()
    now_s = server_time_s(connection)
    values = {"owner": owner, "lease_until": now_s + lease_s, "trial": None}
    if present is None:
        fields = {"study": wanted.study, "candidate": wanted.candidate, "plan": canonical(wanted.plan)}
        connection.execute(CLAIMS.insert().values(**fields, stage=wanted.stage, **values))
        return MINE
    if present["trial"] is not None and present["trial"] >= since:
        return DONE
    if present["trial"] is None and present["owner"] != owner and present["lease_until"] >= now_s:
        return THEIRS
    connection.execute(CLAIMS.update().where(*where).values(**values))
    return MINE


def take_lapsed(
    connection: sa.Connection, study: str, owner: str, lease_s: float, accept: Callable[[Claim], bool]
) -> Claim | None:
    """Takes up a claim whose owner stopped renewing it; None: there is none that `accept` wants."""
    now_s = server_time_s(connection)
    query = (
        sa.select(CLAIMS)
        .where(CLAIMS.c.study == study, CLAIMS.c.trial.is_(None), CLAIMS.c.lease_until < now_s)
        .order_by(CLAIMS.c.lease_until)
        .with_for_update(skip_locked=True)
    )
    for row in connection.execute(query).mappings().all():
        found = Claim(study, row["candidate"], json.loads(row["plan"]), row["stage"])
        if accept(found):
            where = (CLAIMS.c.study == study, CLAIMS.c.candidate == found.candidate)
            connection.execute(CLAIMS.update().where(*where).values(owner=owner, lease_until=now_s + lease_s))
            return found
    return None


def renew(connection: sa.Connection, owner: str, lease_s: float) -> None:
    """Extends the leases of an owner's open claims."""
    where = (CLAIMS.c.owner == owner, CLAIMS.c.trial.is_(None))
    connection.execute(CLAIMS.update().where(*where).values(lease_until=server_time_s(connection) + lease_s))


def release(connection: sa.Connection, owner: str) -> None:
    """Gives an owner's open claims back."""
    connection.execute(CLAIMS.delete().where(CLAIMS.c.owner == owner, CLAIMS.c.trial.is_(None)))


def finish(connection: sa.Connection, trial: Trial, candidate: str, owner: str) -> int | None:
    """Stores a claimed trial and returns its number; None: the lease ran out and another owner has the candidate."""
    where = (CLAIMS.c.study == trial.study, CLAIMS.c.candidate == candidate)
    present = connection.execute(sa.select(CLAIMS.c.owner).where(*where).with_for_update()).first()
    if present is None or present.owner != owner:
        return None
    number = add_trial(connection, trial)
    connection.execute(CLAIMS.update().where(*where).values(trial=number))
    return number


def server_time_s(connection: sa.Connection) -> float:
    """Seconds since 1970 by the database's clock: hosts need not agree about the time."""
    if connection.dialect.name == "sqlite":
        text = "SELECT (julianday('now') - 2440587.5) * 86400.0"
    else:
        text = "SELECT extract(epoch FROM clock_timestamp())"
    return float(connection.execute(sa.text(text)).scalar_one())
