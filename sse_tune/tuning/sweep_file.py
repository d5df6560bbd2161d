"""A recorded sweep: what every config of some spaces took on one machine, as compressed JSON that nothing executes.

    {"format": "sse-tune sweep", "version": 2, "problem": {...}, "device": "nvidia-h200", "arch": "sm_90",
     "toolchain": {...}, "sources": {...}, "created": "...", "how": {...},
     "spaces": [{"stage": "scan", "backend": "triton", "template": "gdn_scan", "outer": {"chunk_size": 64, ...},
                 "params": [{"name": "block_v", "values": [32, 64]}, ...], "default": [64, ...],
                 "rows": [[[64, ...], "ok", null, [301.5, ...]], [[32, ...], "compile_error", "why", []], ...]}],
     "plans": [...]}

A row holds the values of the parameters, the outcome, its reason and every raw timing in microseconds. There is a row
for each config that passes the constraints, or for those nearest to the default. `stage` is "whole" where a plan of one
stage was measured end to end. `plans` holds whole plans of several stages that were measured end to end, all other
stages at their defaults (`sweep_plans.py`); it may be empty, and version 1, which is read too, does not have it.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from sse_tune.database.exchange import expect_fields, expect_head, parse_json, write_atomically
from sse_tune.database.fields import CHECKS
from sse_tune.errors import ExchangeError, ProblemError
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.tuning.sweep_plans import plans_from_data, plans_to_data
from sse_tune.tuning.sweep_spaces import REMEDY, RecordedSpace, Row, checked, space_from_data, space_to_data

_HEAD: dict[str, Any] = {"format": "sse-tune sweep", "version": 2}
_DESCRIPTION = {"device": "str", "arch": "str", "toolchain": "Words", "sources": "Words", "created": "Moment",
                "how": "Json"}  # fmt: skip
_MAX_BYTES = 256 * 2**20  # unpacked: a small file may claim to hold a large one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A recorded sweep.

    Args:
        problem: what was measured.
        device, arch: on which device: `Device.slug` and `Device.arch`.
        toolchain, sources: as in `records.Answer`.
        created: ISO 8601 with a time zone.
        how: the command, and whatever else tells how it was made.
        spaces: the results, stage by stage.
        plans: the results of whole plans, which name the stages of `spaces` alone; none: only stages were measured.
    """

    problem: Problem
    device: str
    arch: str
    toolchain: dict[str, str]
    sources: dict[str, str]
    created: str
    how: dict[str, Any]
    spaces: tuple[RecordedSpace, ...]
    plans: Mapping[Plan, Row] = dataclasses.field(default_factory=dict)


def write_sweep(sweep: Sweep, path: pathlib.Path) -> None:
    """Writes a sweep; the same sweep gives the same bytes."""
    data = _HEAD | {"problem": sweep.problem.to_dict()} | {name: getattr(sweep, name) for name in _DESCRIPTION}
    data["spaces"] = [space_to_data(space) for space in sweep.spaces]
    data["plans"] = plans_to_data(sweep.plans, sweep.problem, sweep.spaces)
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
        raise ExchangeError("a sweep must be a gzip file", f"{path}: {error}", REMEDY) from None
    if len(content) > _MAX_BYTES:
        raise ExchangeError("a sweep must unpack to 256 MiB at most", f"{path}", REMEDY)
    try:
        data = parse_json(content.decode("utf-8"), path)
    except UnicodeDecodeError as error:
        raise ExchangeError("a sweep must be UTF-8", f"{path}: {error}", REMEDY) from None
    fields = {*_HEAD, "problem", *_DESCRIPTION, "spaces"}
    if type(data.get("version")) is int and data["version"] == 1:
        expect_fields(data, fields, "a sweep of version 1")
        data |= {"version": _HEAD["version"], "plans": []}
    expect_fields(data, {*fields, "plans"}, "a sweep")
    expect_head(data, _HEAD)
    described = {name: checked(name, CHECKS[kind], data[name]) for name, kind in _DESCRIPTION.items()}
    try:
        problem = Problem.from_dict(data["problem"])
    except (ProblemError, TypeError) as error:
        raise ExchangeError("a sweep's problem must be one", str(error), REMEDY) from None
    if not isinstance(data["spaces"], list) or not data["spaces"]:
        raise ExchangeError("a sweep's `spaces` must be a list with an entry", repr(data["spaces"])[:100], REMEDY)
    spaces = tuple(space_from_data(f"spaces[{i}]", entry) for i, entry in enumerate(data["spaces"]))
    plans = plans_from_data(data["plans"], problem, spaces)
    return Sweep(problem=problem, spaces=spaces, plans=plans, **described)
