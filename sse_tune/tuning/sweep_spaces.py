"""The spaces of a recorded sweep: the configs of a template for a stage with what each took, and their plain data.

The format is described in `sweep_file.py`.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from sse_tune.database.exchange import expect_fields
from sse_tune.database.fields import CHECKS
from sse_tune.database.records import OUTCOMES
from sse_tune.errors import ExchangeError
from sse_tune.plan import StageChoice
from sse_tune.space import Config, Param

REMEDY = "record it again with `sse-tune sweep`"


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one config, or of one whole plan."""

    outcome: str
    reason: str | None
    times_us: tuple[float, ...]

    @property
    def time_us(self) -> float | None:
        """The median; None: it failed."""
        return statistics.median(self.times_us) if self.outcome == "ok" else None


@dataclasses.dataclass(frozen=True)
class RecordedSpace:
    """The configs of one template for one stage at one outer point, with what each took."""

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


def space_to_data(space: RecordedSpace) -> dict[str, Any]:
    names = [param.name for param in space.params]
    return {
        "stage": space.stage, "backend": space.backend, "template": space.template, "outer": dict(space.outer),
        "params": [{"name": param.name, "values": list(param.values)} for param in space.params],
        "default": [param.default for param in space.params],
        "rows": [
            [[config[name] for name in names], *row_to_data(row)] for config, row in space.rows.items()
        ],
    }  # fmt: skip


def space_from_data(where: str, data: Any) -> RecordedSpace:
    if not isinstance(data, dict):
        raise ExchangeError(f"{where} must be an object", type(data).__name__, REMEDY)
    expect_fields(data, {"stage", "backend", "template", "outer", "params", "default", "rows"}, where)
    try:
        names = [str(entry["name"]) for entry in data["params"]]
        params = tuple(
            Param(name, tuple(entry["values"]), default, name)
            for name, entry, default in zip(names, data["params"], data["default"], strict=True)
        )
        rows = {}
        for i, (values, *row) in enumerate(data["rows"]):
            config = Config(dict(zip(names, values, strict=True)))
            if config in rows or any(config[p.name] not in p.values for p in params):
                raise ExchangeError(
                    f"{where} row {i} must hold values of its parameters, each config once", str(values), REMEDY
                )
            rows[config] = row_from_data(f"{where} row {i}", row)
        outer = Config(data["outer"])
        if not rows or any(p.default not in p.values for p in params):
            raise ValueError("no rows, or a default that is no value")
    except ExchangeError:
        raise
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise ExchangeError(f"{where} must have the shape of a space", repr(error), REMEDY) from None
    return RecordedSpace(str(data["stage"]), str(data["backend"]), str(data["template"]), outer, params, rows)


def row_to_data(row: Row) -> list[Any]:
    return [row.outcome, row.reason, [round(time_us, 2) for time_us in row.times_us]]


def row_from_data(where: str, data: list[Any]) -> Row:
    """The last three entries of a row."""
    outcome, reason, times = data
    taken = checked(where, CHECKS["Times"], times)
    if outcome not in OUTCOMES or (outcome == "ok") != bool(taken):
        raise ExchangeError(
            f"{where} must have an outcome, and times exactly if it is ok", f"{outcome!r}, {len(taken)} times", REMEDY
        )
    return Row(outcome, checked(where, CHECKS["str | None"], reason), taken)


def checked(where: str, check: tuple[str, Any], value: Any) -> Any:
    what, convert = check
    try:
        return convert(value)
    except (TypeError, ValueError):
        raise ExchangeError(f"`{where}` must be {what}", repr(value)[:100], REMEDY) from None
