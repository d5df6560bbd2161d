"""The answers shipped with the package, one readable JSON file per GPU and bucket: `tuning_db/<gpu>/<bucket>.json`.

A file holds one answer for each toolchain that was measured. They are read by the same strict rules as an import;
whether one is used is decided later, by `keys.fits` and the constraints of the problem at hand.
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

from sse_tune.database.exchange import expect_fields, expect_head, read_json, read_records, write_atomically
from sse_tune.database.records import Answer
from sse_tune.device import Device
from sse_tune.errors import ExchangeError

_HEAD: dict[str, Any] = {"format": "sse-tune answers", "version": 1}


def shipped_root() -> pathlib.Path | None:
    """The folder of the shipped answers: inside the installed package, or at the top of a source checkout."""
    package = pathlib.Path(__file__).parents[1]
    for root in (package / "_tuning_db", package.parent / "tuning_db"):
        if (root / "__init__.py").is_file():
            return root
    return None


def shipped_answers(device: Device | str | None = None, root: pathlib.Path | None = None) -> tuple[Answer, ...]:
    """The answers shipped for a device, or for all of them.

    Args:
        device: a device or its slug; None: all.
        root: the folder; None: `shipped_root()`.

    Raises:
        ExchangeError: a file does not fit the format, or lies in the wrong place.
    """
    root = root if root is not None else shipped_root()
    slug = device.slug if isinstance(device, Device) else device
    if root is None:
        return ()
    files = sorted(root.glob("*/*.json") if slug is None else (root / slug).glob("*.json"))
    return tuple(answer for path in files for answer in read_shipped(path))


def read_shipped(path: pathlib.Path) -> tuple[Answer, ...]:
    """The answers of one file; raises ExchangeError when it does not fit the format or its place."""
    data = read_json(path)
    expect_fields(data, {*_HEAD, "answers"}, f"{path.parent.name}/{path.name}")
    expect_head(data, _HEAD)
    answers = read_records(data["answers"], Answer, f"{path.parent.name}/{path.name}: answers")
    for answer in answers:
        if (answer.device, answer.bucket) != (path.parent.name, path.stem):
            raise ExchangeError(
                "a shipped answer lies in <device>/<bucket>.json",
                f"the answer for {answer.device}/{answer.bucket} in {path.parent.name}/{path.name}",
                "move it there",
            )
    return answers


def write_shipped(answer: Answer, root: pathlib.Path | str) -> pathlib.Path:
    """Puts an answer into the folder of shipped ones and returns its file.

    An earlier answer for the same toolchain gives way, unless it outdoes this one, or has the same template sources and
    this one does not replace it (`Answer.replaces`).
    """
    path = pathlib.Path(root) / answer.device / f"{answer.bucket}.json"
    present = list(read_shipped(path)) if path.exists() else []
    rivals = [other for other in present if other.toolchain == answer.toolchain]
    same = [other for other in rivals if other.identity == answer.identity]
    if any(other.outdoes(answer) for other in rivals) or not all(answer.replaces(other) for other in same):
        return path
    kept = [other for other in present if other not in rivals]
    ordered = sorted([*kept, answer], key=lambda one: sorted(one.toolchain.items()))
    text = json.dumps(_HEAD | {"answers": [one.to_dict() for one in ordered]}, indent=2, allow_nan=False)
    write_atomically(path, lambda temporary: temporary.write_text(_compact(text) + "\n", encoding="utf-8"))
    return path


def _compact(text: str) -> str:
    """Innermost lists and objects on one line, where they fit; line breaks occur only between JSON tokens."""

    def one_line(match: re.Match[str]) -> str:
        inner = re.sub(r"^\n\s*|\n\s*$", "", match.group()[1:-1])
        line = match.group()[0] + re.sub(r"\n\s*", " ", inner) + match.group()[-1]
        return line if len(line) <= 100 else match.group()

    return re.sub(r"\[[^\[\]{}]*\]|\{[^\[\]{}]*\}", one_line, text)
