"""A recorded sweep: what every config of some spaces took on one machine, as compressed JSON that nothing executes.

    {"format": "sse-tune sweep", "version": 1, "problem": {...}, "device": "nvidia-h200", "arch": "sm_90",
     "toolchain": {...}, "sources": {...}, "created": "...", "how": {...},
     "spaces": [{"stage": "scan", "backend": "triton", "template": "gdn_scan", "outer": {"chunk_size": 64, ...},
                 "params": [{"name": "block_v", "values": [32, 64]}, ...], "default": [64, ...],
                 "rows": [[[64, ...], "ok", null, [301.5, ...]], [[32, ...], "compile_error", "why", []], ...]}]}

A row holds the values of the parameters, the outcome, its reason and every raw timing in microseconds. There is a row
for each config that passes the constraints. `stage` is "whole" where a plan of one stage was measured end to end.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import pathlib
import statistics
from typing import Any

from sse_tune.database.exchange import expect_fields, expect_head, parse_json, write_atomically
from sse_tune.database.fields import CHECKS
from sse_tune.database.records import OUTCOMES
from sse_tune.errors import ExchangeError, ProblemError
from sse_tune.plan import StageChoice
from sse_tune.problem import Problem
from sse_tune.space import Config, Param

_HEAD: dict[str, Any] = {"format": "sse-tune sweep", "version": 1}
_DESCRIPTION = {"device": "str", "arch": "str", "toolchain": "Words", "sources": "Words", "created": "Moment",
                "how": "Json"}  # fmt: skip
_MAX_BYTES = 256 * 2**20  # unpacked: a small file may claim to hold a large one
_REMEDY = "record it again with `sse-tune sweep`"


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one config."""

    outcome: str
    reason: str | None
    times_us: tuple[float, ...]

    @property
    def time_us(self) -> float | None:
        """The median; None: it failed."""
        return statistics.median(self.times_us) if self.outcome == "ok" else None


@dataclasses.dataclass(frozen=True)
class RecordedSpace:
    """Every config of one template for one stage at one outer point, with what it took."""

    stage: str
    backend: str
    template: str
    outer: Config
    params: tuple[Param, ...]
    rows: dict[Config, Row]

    @property
    def default(self) -> StageChoice:
        return self.choice(Config({param.name: param.default for param in self.params}))

    def choice(self, config: Config) -> StageChoice:
        return StageChoice(self.backend, self.template, config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A recorded sweep.

    Args:
        problem: what was measured.
        device, arch: on which device: `Device.slug` and `Device.arch`.
        toolchain, sources: as in `records.Answer`.
        created: ISO 8601 with a time zone.
        how: the command, and whatever else tells how it was made.
        spaces: the results.
    """

    problem: Problem
    device: str
    arch: str
    toolchain: dict[str, str]
    sources: dict[str, str]
    created: str
    how: dict[str, Any]
    spaces: tuple[RecordedSpace, ...]


def write_sweep(sweep: Sweep, path: pathlib.Path) -> None:
    """Writes a sweep; the same sweep gives the same bytes."""
    data = _HEAD | {"problem": sweep.problem.to_dict()} | {name: getattr(sweep, name) for name in _DESCRIPTION}
    data["spaces"] = [_space_to_data(space) for space in sweep.spaces]
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
        file.write(json.dumps(data, separators=(",", ":"), allow_nan=False).encode())
    write_atomically(path, lambda temporary: temporary.write_bytes(packed.getvalue()))


def read_sweep(path: pathlib.Path) -> Sweep:
    """The sweep of a file.

    Raises:
        ExchangeError: the file does not fit the format; the message names the space, the row and the rule.
    """
    try:
        with gzip.open(path) as file:
            content = file.read(_MAX_BYTES + 1)
    except (OSError, EOFError) as error:
        raise ExchangeError("a sweep must be a gzip file", f"{path}: {error}", _REMEDY) from None
    if len(content) > _MAX_BYTES:
        raise ExchangeError("a sweep must unpack to 256 MiB at most", f"{path}", _REMEDY)
    try:
        data = parse_json(content.decode("utf-8"), path)
    except UnicodeDecodeError as error:
        raise ExchangeError("a sweep must be UTF-8", f"{path}: {error}", _REMEDY) from None
    expect_fields(data, {*_HEAD, "problem", *_DESCRIPTION, "spaces"}, "a sweep")
    expect_head(data, _HEAD)
    described = {name: _checked(name, CHECKS[kind], data[name]) for name, kind in _DESCRIPTION.items()}
    try:
        problem = Problem.from_dict(data["problem"])
    except (ProblemError, TypeError) as error:
        raise ExchangeError("a sweep's problem must be one", str(error), _REMEDY) from None
    if not isinstance(data["spaces"], list) or not data["spaces"]:
        raise ExchangeError("a sweep's `spaces` must be a list with an entry", repr(data["spaces"])[:100], _REMEDY)
    spaces = tuple(_space_from_data(f"spaces[{i}]", entry) for i, entry in enumerate(data["spaces"]))
    return Sweep(problem=problem, spaces=spaces, **described)


def _space_to_data(space: RecordedSpace) -> dict[str, Any]:
    names = [param.name for param in space.params]
    return {
        "stage": space.stage, "backend": space.backend, "template": space.template, "outer": dict(space.outer),
        "params": [{"name": param.name, "values": list(param.values)} for param in space.params],
        "default": [param.default for param in space.params],
        "rows": [
            [[config[name] for name in names], row.outcome, row.reason, [round(t, 2) for t in row.times_us]]
            for config, row in space.rows.items()
        ],
    }  # fmt: skip


def _space_from_data(where: str, data: Any) -> RecordedSpace:
    if not isinstance(data, dict):
        raise ExchangeError(f"{where} must be an object", type(data).__name__, _REMEDY)
    expect_fields(data, {"stage", "backend", "template", "outer", "params", "default", "rows"}, where)
    try:
        names = [str(entry["name"]) for entry in data["params"]]
        params = tuple(
            Param(name, tuple(entry["values"]), default, name)
            for name, entry, default in zip(names, data["params"], data["default"], strict=True)
        )
        rows = {}
        for i, (values, outcome, reason, times) in enumerate(data["rows"]):
            config = Config(dict(zip(names, values, strict=True)))
            bad = [p.name for p in params if config[p.name] not in p.values]
            if bad or config in rows or outcome not in OUTCOMES or (outcome == "ok") != bool(times):
                raise ExchangeError(
                    f"{where} row {i}: values of its parameters, each config once, times exactly if it is ok",
                    f"{values}, {outcome!r}, {len(times)} times", _REMEDY,
                )
            taken = _checked(f"{where} row {i}", CHECKS["Times"], times)
            rows[config] = Row(outcome, _checked(f"{where} row {i}", CHECKS["str | None"], reason), taken)
        outer = Config(data["outer"])
        if not rows or any(p.default not in p.values for p in params):
            raise ValueError("no rows, or a default that is no value")
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        if isinstance(error, ExchangeError):
            raise
        raise ExchangeError(f"{where} must have the shape of a space", repr(error), _REMEDY) from None
    return RecordedSpace(str(data["stage"]), str(data["backend"]), str(data["template"]), outer, params, rows)


def _checked(where: str, check: tuple[str, Any], value: Any) -> Any:
    what, convert = check
    try:
        return convert(value)
    except (TypeError, ValueError):
        raise ExchangeError(f"`{where}` must be {what}", repr(value)[:100], _REMEDY) from None
