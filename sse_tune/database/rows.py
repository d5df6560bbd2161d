"""Records to rows and back, and the writes that must happen within one transaction."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any, TypeVar

import sqlalchemy as sa

from sse_tune.database.fields import JSON_FIELDS, canonical
from sse_tune.database.records import NEXT_NUMBER, Answer, Contents, Quarantined, Record, Study, Trial
from sse_tune.database.schema import ANSWERS, QUARANTINE, STUDIES, TRIALS
from sse_tune.errors import DatabaseError

R = TypeVar("R", bound=Record)


def row(record: Record) -> dict[str, Any]:
    nested = {field.name for field in dataclasses.fields(record) if field.type in JSON_FIELDS}
    return {name: canonical(value) if name in nested else value for name, value in record.to_dict().items()}


def rows(connection: sa.Connection, query: sa.Select[Any], record: type[R]) -> list[R]:
    types_ = {field.name: str(field.type) for field in dataclasses.fields(record)}
    found = []
    for found_row in connection.execute(query).mappings():
        try:
            fields = {
                name: json.loads(found_row[name]) if kind in JSON_FIELDS else found_row[name]
                for name, kind in types_.items()
            }
            found.append(record.from_dict(fields))
        except (json.JSONDecodeError, TypeError) as error:
            raise DatabaseError(
                "a stored record must read back", f"a {record.__name__}: {error}", "move the damaged database away"
            ) from None
    return found


def put_study(connection: sa.Connection, study: Study) -> bool:
    if connection.execute(sa.select(STUDIES.c.id).where(STUDIES.c.id == study.id)).first() is not None:
        return False
    connection.execute(STUDIES.insert().values(row(study)))
    return True


def add_trial(connection: sa.Connection, trial: Trial) -> int:
    # on a server the study's row is locked, so that writers count its trials one after the other
    opened = sa.select(STUDIES.c.id).where(STUDIES.c.id == trial.study).with_for_update(key_share=True)
    if connection.execute(opened).first() is None:
        raise DatabaseError("a trial's study must be open", repr(trial.study), "call open_study first")
    taken = sa.select(TRIALS.c.number).where(TRIALS.c.study == trial.study)
    number = trial.number
    if number == NEXT_NUMBER:
        last = connection.execute(sa.select(sa.func.max(TRIALS.c.number)).where(TRIALS.c.study == trial.study)).scalar()
        number = 0 if last is None else last + 1
    elif connection.execute(taken.where(TRIALS.c.number == number)).first() is not None:
        raise DatabaseError(
            "a trial's number must be new in its study", f"{number}", "leave the number out to get the next free one"
        )
    connection.execute(TRIALS.insert().values(row(dataclasses.replace(trial, number=number))))
    return number


def put_answer(connection: sa.Connection, answer: Answer) -> bool:
    same = ANSWERS.c.identity == answer.identity
    values = {**row(answer), "identity": answer.identity}
    # on a server the row is locked, so that what it is compared with stays until it is replaced
    present = rows(connection, sa.select(ANSWERS).where(same).with_for_update(), Answer)
    if not present:
        connection.execute(ANSWERS.insert().values(values))
    elif answer.replaces(present[0]):
        connection.execute(ANSWERS.update().where(same).values(values))
    else:
        return False
    return True


def put_quarantined(connection: sa.Connection, record: Quarantined) -> bool:
    same = QUARANTINE.c.identity == record.identity
    if connection.execute(sa.select(QUARANTINE.c.identity).where(same)).first() is not None:
        return False
    connection.execute(QUARANTINE.insert().values({**row(record), "identity": record.identity}))
    return True


def take_all(connection: sa.Connection, contents: Contents) -> int:
    taken = sum(put_study(connection, study) for study in contents.studies)
    for name, trials in _by_study(contents.trials).items():
        present = rows(connection, sa.select(TRIALS).where(TRIALS.c.study == name), Trial)
        known, numbers = {trial.identity for trial in present}, {trial.number for trial in present}
        for trial in trials:
            if trial.identity not in known:
                number = NEXT_NUMBER if trial.number in numbers else trial.number
                numbers.add(add_trial(connection, dataclasses.replace(trial, number=number)))
                taken += 1
    # all take the locks of answers in this order: two that wait for each other would fail
    answers = sorted(contents.answers, key=lambda answer: answer.identity)
    taken += sum(put_answer(connection, answer) for answer in answers)
    return taken + sum(put_quarantined(connection, record) for record in contents.quarantine)


def _by_study(trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    grouped: dict[str, list[Trial]] = {}
    for trial in trials:
        grouped.setdefault(trial.study, []).append(trial)
    return grouped
