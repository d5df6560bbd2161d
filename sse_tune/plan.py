"""A plan: the choices shared by all stages, and for each stage a template and its config. What the database stores."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping

from sse_tune.errors import PlanError
from sse_tune.space import Config, Value


@dataclasses.dataclass(frozen=True)
class StageChoice:
    """The template that runs a stage, and its config."""

    backend: str
    template: str
    config: Config

    def to_dict(self) -> dict[str, object]:
        return {"backend": self.backend, "template": self.template, "config": dict(self.config)}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides how a problem is computed.

    Args:
        graph: name of the stage graph, "staged" or "whole" (`templates/stages.py`).
        outer: the choices shared by all stages, such as `chunk_size`.
        stages: stage name to its choice, one for each stage of the graph.
    """

    graph: str
    outer: Config
    stages: Mapping[str, StageChoice]

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def key(self) -> str:
        """Sixteen hex digits that name this plan."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def replace_stage(self, stage: str, choice: StageChoice) -> Plan:
        return dataclasses.replace(self, stages={**self.stages, stage: choice})

    def to_dict(self) -> dict[str, object]:
        return {
            "graph": self.graph,
            "outer": dict(self.outer),
            "stages": {name: choice.to_dict() for name, choice in self.stages.items()},
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_dict(cls, data: object) -> Plan:
        """Reads the shape of a plan; whether its names and values exist is for `templates.registry.validate_plan`.

        Raises:
            PlanError: a field is missing, unknown or of the wrong type.
        """
        fields = _fields(data, "a plan", {"graph": str, "outer": dict, "stages": dict})
        stages = {}
        for name, choice in fields["stages"].items():
            part = _fields(choice, f"stage {name!r} of a plan", {"backend": str, "template": str, "config": dict})
            stages[str(name)] = StageChoice(part["backend"], part["template"], _config(part["config"], name))
        return cls(fields["graph"], _config(fields["outer"], "outer"), stages)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError("a plan must be JSON", str(error), "export it again") from None
        return cls.from_dict(data)


def _fields(data: object, what: str, types: dict[str, type]) -> dict:
    if not isinstance(data, dict) or set(data) != set(types):
        got = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise PlanError(f"{what} has exactly the fields {sorted(types)}", str(got), "export it again")
    for name, kind in types.items():
        if not isinstance(data[name], kind):
            raise PlanError(f"`{name}` of {what} must be a {kind.__name__}", repr(data[name]), "export it again")
    return data


def _config(values: dict[str, Value], where: str) -> Config:
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, (int, str, bool)):
            raise PlanError(
                f"a parameter of {where!r} must be an integer, a string or a boolean",
                f"{name}={value!r}",
                "fix the value",
            )
    return Config(values)
