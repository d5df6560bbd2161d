"""Database to file and back. JSON holds everything; CSV and Parquet hold trials and answers, a row each.

A file is only ever parsed as data and must fit exactly: every field known and of its type, every time positive, every
parameter one that its template's space lists. One misfit and nothing of the file is taken.
"""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

from sse_tune.database.records import Answer, Contents, Quarantined, Record, Study, Trial
from sse_tune.device import ARCHS, Device
from sse_tune.errors import ConstraintError, DatabaseError, DeviceError, ExchangeError, PlanError, ProblemError
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.space import Space
from sse_tune.templates.registry import BACKENDS, find_template, validate_plan
from sse_tune.templates.stages import GRAPHS, stage_names

FORMATS = ("json", "csv", "parquet")
FORMAT_NAME, FORMAT_VERSION = "sse-tune database", 1
_HEAD = {"format": FORMAT_NAME, "version": FORMAT_VERSION}
_PARTS: dict[str, type[Record]] = {"studies": Study, "trials": Trial, "answers": Answer, "quarantine": Quarantined}
R = TypeVar("R", bound=Record)


def write_file(contents: Contents, path: pathlib.Path, format: str | None) -> None:
    """Writes records to a file, replaced at once; raises ExchangeError when the format or the path is no good."""
    kind = _format(path, format)
    if kind == "json":
        text = json.dumps(_HEAD | {part: [record.to_dict() for record in getattr(contents, part)] for part in _PARTS},
                          indent=1, allow_nan=False)  # fmt: skip
        write_atomically(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))
        return
    from sse_tune.database import tables

    write_atomically(path, lambda temporary: tables.write(contents, temporary, kind))


def read_file(path: pathlib.Path) -> Contents:
    """The records of a file, by its ending, all checked.

    Raises:
        ExchangeError: the file does not fit the format; the message names the record and the rule.
    """
    kind = _format(path, None)
    if kind == "json":
        data = read_json(path)
        expect_fields(data, {*_HEAD, *_PARTS}, "the file")
        expect_head(data, _HEAD)
    else:
        from sse_tune.database import tables

        data = tables.read(path, kind) | {"quarantine": []}
    records = {part: read_records(data[part], record, part) for part, record in _PARTS.items()}
    contents = Contents(**records)  # type: ignore[arg-type]
    _check_together(contents)
    return contents


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object of a JSON file; NaN, infinities and repeated names are refused.

    Raises:
        ExchangeError: there is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ExchangeError("the file must be readable", f"{path}: {error.strerror}", "check the path") from None
    except ValueError as error:
        raise ExchangeError("the file must be JSON", f"{path}: {error}", "export it again; nothing was taken") from None
    return parse_json(text, path)


def parse_json(text: str, path: pathlib.Path) -> dict[str, Any]:
    """As `read_json`, of the text of a file."""

    def number(text: str) -> float:
        raise ValueError(f"{text} is no number of JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"a name is repeated in {{{', '.join(sorted(names))[:100]}}}")
        return dict(pairs)

    try:
        data = json.loads(text, parse_constant=number, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ExchangeError("the file must be JSON", f"{path}: {error}", "export it again; nothing was taken") from None
    if not isinstance(data, dict):
        raise ExchangeError("the file must hold one JSON object", f"a {type(data).__name__}", "export it again")
    return data


def expect_fields(data: dict[str, Any], names: set[str], what: str) -> None:
    if set(data) != names:
        raise ExchangeError(
            f"{what} has exactly the fields {sorted(names)}",
            f"unknown {sorted(set(data) - names)}, missing {sorted(names - set(data))}",
            "export it again with this version; nothing was taken",
        )


def expect_head(data: dict[str, Any], head: dict[str, Any]) -> None:
    got = {name: data[name] for name in head}
    if got != head or type(got["version"]) is not int:
        raise ExchangeError(f"the file must say {head}", str(got), "export it again with this version")


def read_records(data: Any, record: type[R], part: str) -> tuple[R, ...]:
    if not isinstance(data, list):
        raise ExchangeError(f"`{part}` must be a list", type(data).__name__, "export it again; nothing was taken")
    return tuple(_located(f"{part}[{i}]", record.from_dict, item) for i, item in enumerate(data))


def check_answer(answer: Answer) -> None:
    """Whether an answer's parts agree and its plan is one that the templates here allow.

    Raises:
        ExchangeError: the bucket is not the problem's, a parameter is outside its template's space, ...
    """
    problem = _problem(answer.problem)
    if problem.bucket.name != answer.bucket:
        raise ExchangeError("`bucket` must be that of `problem`", f"{answer.bucket!r}, not {problem.bucket.name!r}")
    check_plan(answer.plan)
    if set(answer.plan.stages) != set(stage_names(answer.plan.graph, problem, answer.plan.outer)):
        raise ExchangeError("the plan must choose exactly the stages of its problem", str(sorted(answer.plan.stages)))
    used = {f"{choice.backend}:{choice.template}" for choice in answer.plan.stages.values()}
    if set(answer.sources) != used or set(answer.toolchain) != {name.split(":")[0] for name in used}:
        raise ExchangeError(
            "`sources` and `toolchain` must name exactly the plan's templates and backends",
            f"{sorted(answer.sources)} and {sorted(answer.toolchain)}",
        )
    # constraints need the device's limits: they are known for these architectures and for any CPU
    device = ARCHS.get(answer.arch)
    if device is None and not answer.arch.startswith("sm_"):
        device = Device("cpu", answer.device, answer.arch, 1)
    if device is not None:
        validate_plan(answer.plan, problem, device)


def check_plan(plan: Plan) -> None:
    """Whether every name and value of a plan is one that the stage graphs and templates here declare.

    Raises:
        ExchangeError: one is not, or a backend is not installed, so that its parameters cannot be checked.
    """
    if plan.graph not in GRAPHS:
        raise ExchangeError("the stage graph must be known", repr(plan.graph), f"use one of {', '.join(GRAPHS)}")
    _check_values(GRAPHS[plan.graph], plan.outer, "the plan's outer choices")
    unknown = sorted({choice.backend for choice in plan.stages.values()} - set(BACKENDS))
    if unknown:
        raise ExchangeError("the backend must be known", ", ".join(unknown), f"use one of {', '.join(BACKENDS)}")
    missing: DeviceError | None = None
    for stage, choice in plan.stages.items():
        try:
            template = find_template(choice.backend, choice.template)
        except DeviceError as error:
            missing = error  # the rest is checked first: what is wrong for sure is told first
            continue
        if template.stage != stage:
            raise ExchangeError(
                "a stage's template must be one written for it", f"{choice.template!r} for stage {stage!r}"
            )
        _check_values(template.space, choice.config, f"{choice.backend}:{choice.template}")
    if missing is not None:
        raise ExchangeError(
            "a plan's parameters are checked against its templates, which need their compiler",
            missing.rule, f"{missing.remedy}, or import on a machine that has it; all else was checked",
        )  # fmt: skip


def write_atomically(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Writes beside the file and then takes its place: whoever reads sees the old file or the new one, whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".sse-tune-") as folder:
            temporary = pathlib.Path(folder) / path.name
            write(temporary)
            os.replace(temporary, path)
    except OSError as error:
        raise ExchangeError("the file must be writable", f"{path}: {error.strerror}", "check the path") from None


def _check_values(space: Space, config: Any, where: str) -> None:
    allowed = {param.name: param.values for param in space.params}
    if set(config) != set(allowed):
        raise ExchangeError(f"{where} must have exactly the parameters {sorted(allowed)}", str(sorted(config)))
    for name, value in config.items():
        if not any(type(value) is type(known) and value == known for known in allowed[name]):
            raise ExchangeError(f"`{name}` of {where} must be one of {allowed[name]}", repr(value))


def _check_together(contents: Contents) -> None:
    """What holds between the records, and between them and this version's templates."""
    for i, study in enumerate(contents.studies):
        _located(f"studies[{i}]", _problem, study.problem)
    studies, numbers = {study.id for study in contents.studies}, set()
    if len(studies) < len(contents.studies):
        raise ExchangeError("the ids of studies must differ", "one that is repeated", "export it again")
    for i, trial in enumerate(contents.trials):
        if trial.study not in studies:
            raise ExchangeError(f"trials[{i}]: its study must be in the file", repr(trial.study), "export it again")
        if trial.number < 0 or (trial.study, trial.number) in numbers:
            raise ExchangeError(f"trials[{i}]: `number` must be 0 or more and new", str(trial.number), "renumber it")
        numbers.add((trial.study, trial.number))
        _located(f"trials[{i}]", _check_trial, trial)
    for i, answer in enumerate(contents.answers):
        _located(f"answers[{i}]", check_answer, answer)


def _problem(fields: dict[str, Any]) -> Problem:
    problem = Problem.from_dict(fields)
    if type(problem.shared) is not bool or not isinstance(problem.num_sequences, (int, type(None))):
        raise ExchangeError("a problem's fields must have their types", str(fields))
    return problem


def _check_trial(trial: Trial) -> None:
    check_plan(Plan.from_dict(trial.plan))


def _located(where: str, check: Callable[[Any], Any], record: Any) -> Any:
    """What `check(record)` gives; an error says which record of the file it is about, and that nothing was taken."""
    try:
        return check(record)
    except (DatabaseError, ProblemError, PlanError, ConstraintError) as error:
        remedy = error.remedy if isinstance(error, DatabaseError) and error.remedy else "correct the file"
        raise ExchangeError(f"{where}: {error.rule}", error.got, f"{remedy}; nothing was taken") from None
    except TypeError as error:
        raise ExchangeError(f"{where}: every value must be of its type", str(error), "nothing was taken") from None


def _format(path: pathlib.Path, format: str | None) -> str:
    kind = format if format is not None else path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise ExchangeError(f"the format must be one of {', '.join(FORMATS)}", repr(kind), "choose one of them")
    return kind
