"""Trials and answers as one CSV or Parquet table for pandas: a row each, nested fields as JSON text.

The column `record` says which a row is. A trial's row repeats its study in the columns `study_...`, so that the table
can be read back; fields that a row does not have are empty.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pandas as pd

from sse_tune.database.fields import JSON_FIELDS, canonical
from sse_tune.database.records import Answer, Contents, Record, Study, Trial
from sse_tune.errors import ExchangeError


def _types(record: type[Record], prefix: str = "") -> dict[str, str]:
    return {f"{prefix}{field.name}": str(field.type) for field in dataclasses.fields(record)}


# `study` of a trial is its study's id, so `study_id` is left out
_STUDY = {name: kind for name, kind in _types(Study, "study_").items() if name != "study_id"}
_ROWS = {"trial": _types(Trial) | _STUDY, "answer": _types(Answer)}
_COLUMNS = {"record": "str", **_ROWS["trial"], **_ROWS["answer"]}
# of a plan as a record and as plain data, the column holds the same text
_NESTED = {name for kinds in _ROWS.values() for name, kind in kinds.items() if kind in JSON_FIELDS}
_REMEDY = "export it again with this version; nothing was taken"
_NUMBERS = {name: kind for name, kind in _COLUMNS.items() if kind in ("int", "float", "float | None")}


def write(contents: Contents, path: pathlib.Path, kind: str) -> None:
    """Writes the trials and answers to a file of this kind, "csv" or "parquet"."""
    studies = {
        study.id: {f"study_{name}": value for name, value in study.to_dict().items() if name != "id"}
        for study in contents.studies
    }
    rows = [{"record": "trial", **trial.to_dict(), **studies[trial.study]} for trial in contents.trials]
    rows += [{"record": "answer", **answer.to_dict()} for answer in contents.answers]
    cells = [
        {name: canonical(value) if name in _NESTED else value for name, value in row.items() if value is not None}
        for row in rows
    ]
    columns = {
        name: pd.array([row.get(name) for row in cells], dtype=_dtype(name)) for name in _COLUMNS
    }
    frame = pd.DataFrame(columns)
    if kind == "csv":
        frame.to_csv(path, index=False, lineterminator="\n", encoding="utf-8")
    else:
        frame.to_parquet(path, engine="pyarrow", index=False)


def read(path: pathlib.Path, kind: str) -> dict[str, list[dict[str, Any]]]:
    """The plain data of the studies, trials and answers of a table, their values not checked yet.

    Raises:
        ExchangeError: the file cannot be parsed, a column is unknown or missing, or a cell does not belong there.
    """
    try:
        if kind == "csv":
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8", engine="c")
        else:
            frame = pd.read_parquet(path, engine="pyarrow")
    except OSError as error:
        raise ExchangeError("the file must be readable", f"{path}: {error}", "check the path") from None
    except Exception as error:  # the parsers raise what they like on a damaged file
        raise ExchangeError(f"the file must be {kind}", f"{path}: {error}", _REMEDY) from None
    if sorted(map(str, frame.columns)) != sorted(_COLUMNS) or not isinstance(frame.index, pd.RangeIndex):
        unknown, missing = set(map(str, frame.columns)) - set(_COLUMNS), set(_COLUMNS) - set(frame.columns)
        raise ExchangeError(
            f"the table has exactly the columns {', '.join(_COLUMNS)}",
            f"unknown {sorted(unknown)}, missing {sorted(missing)}",
            _REMEDY,
        )
    data: dict[str, list[dict[str, Any]]] = {"studies": [], "trials": [], "answers": []}
    studies: dict[str, dict[str, Any]] = {}
    for i, row in enumerate(frame.to_dict("records")):
        where = f"row {i + 1}"
        wanted = _ROWS.get(row["record"])
        if wanted is None:
            raise ExchangeError(f"{where}: `record` must be trial or answer", repr(row["record"]), _REMEDY)
        if kind == "csv" and not all(isinstance(value, str) for value in row.values()):
            raise ExchangeError(f"{where}: it must have a cell for every column", "fewer", _REMEDY)
        cells = {name: _cell(name, value, where) for name, value in row.items() if name != "record"}
        surplus = sorted(name for name, value in cells.items() if value is not None and name not in wanted)
        if surplus:
            raise ExchangeError(f"{where}: columns of the other record must be empty", ", ".join(surplus), _REMEDY)
        if row["record"] == "answer":
            data["answers"].append({name: cells[name] for name in wanted})
            continue
        study = {"id": cells["study"], **{name.removeprefix("study_"): cells[name] for name in _STUDY}}
        if studies.setdefault(str(study["id"]), study) != study:
            raise ExchangeError(f"{where}: the trials of a study must tell the same of it", repr(study["id"]), _REMEDY)
        data["trials"].append({name: cells[name] for name in wanted if name not in _STUDY})
    data["studies"] = list(studies.values())
    return data


def _dtype(name: str) -> str:
    return {"int": "Int64", "float": "Float64", "float | None": "Float64"}.get(_NUMBERS.get(name, ""), "string")


def _cell(name: str, value: Any, where: str) -> Any:
    """One cell as plain data; an empty one is None."""
    if isinstance(value, str):
        if value == "":
            return None
        try:
            if name in _NESTED:
                return json.loads(value, parse_constant=_refuse)
            if name in _NUMBERS:
                return int(value) if _NUMBERS[name] == "int" else float(value)
        except (ValueError, RecursionError):
            what = "JSON" if name in _NESTED else "a number"
            raise ExchangeError(f"{where}: `{name}` must be {what}", repr(value[:100]), _REMEDY) from None
        return value
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value):
        return None
    return value if name in _NUMBERS and not hasattr(value, "dtype") else _refuse_cell(name, value, where)


def _refuse(text: str) -> float:
    raise ValueError(text)


def _refuse_cell(name: str, value: Any, where: str) -> Any:
    raise ExchangeError(f"{where}: `{name}` must be of its type", repr(value)[:100], _REMEDY)
