"""What a field of a record may hold, by its declared type, and its way to and from plain data."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from sse_tune.plan import Plan

Moment = str
Times = tuple[float, ...]
Numbers = dict[str, float]
Words = dict[str, str]
Json = dict[str, Any]
# the declared types that a column holds as JSON text
JSON_FIELDS = ("Times", "Numbers", "Words", "Json", "Plan")


def canonical(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """Thirty-two hex digits over the canonical JSON of a value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:32]


def plain(value: Any) -> Any:
    if isinstance(value, Plan):
        return value.to_dict()
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise TypeError
    value.encode("utf-8")
    return str(value)


def _time(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise TypeError
    return float(value)


def _times(value: Any) -> Times:
    if not isinstance(value, (list, tuple)):
        raise TypeError
    return tuple(_time(item) for item in value)


def _error(value: Any) -> float:
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value < 2**31:
        raise TypeError
    return value


def _moment(value: Any) -> str:
    if datetime.datetime.fromisoformat(_text(value)).tzinfo is None:
        raise TypeError
    return str(value)


def _mapping(item: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    def convert(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise TypeError
        return {_text(name): item(entry) for name, entry in value.items()}

    return convert


def _json(value: Any) -> Any:
    """A copy that no caller can change: strings, booleans, integers, finite floats, None, lists and dicts of them."""
    if isinstance(value, Mapping):
        return _mapping(_json)(value)
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if isinstance(value, str):
        return _text(value) if value else value
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise TypeError


def _optional(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else convert(value)


# declared type of a field -> what it must be, and the function that takes it or raises
CHECKS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "str": ("a non-empty string", _text),
    "str | None": ("a non-empty string or null", _optional(_text)),
    "int": ("an integer, 0 or more", _count),
    "float": ("a positive, finite number", _time),
    "float | None": ("a positive, finite number or null", _optional(_time)),
    "Moment": ("an ISO 8601 time with its zone, 2026-01-31T12:00:00+00:00", _moment),
    "Times": ("a list of positive, finite numbers", _times),
    "Numbers": ("an object of numbers", _mapping(_error)),
    "Words": ("an object of non-empty strings", _mapping(_text)),
    "Json": ("an object of plain, finite data", _mapping(_json)),
    "Plan": ("a plan", lambda value: value if isinstance(value, Plan) else Plan.from_dict(value)),
}
