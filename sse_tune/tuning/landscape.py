"""What a search may choose from: the outer choices, and for each stage the templates with their spaces.

A strategy sees templates only through this, so that a recorded sweep can stand in for them (`replay.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from typing import Protocol

from sse_tune.device import Device
from sse_tune.errors import ConstraintError
from sse_tune.plan import Plan, StageChoice
from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Space
from sse_tune.templates.registry import default_plan, graph_of, templates_for
from sse_tune.templates.roofline import DATA_CENTRE, floor_of
from sse_tune.templates.stages import GRAPHS, stage_contract

PRUNE_RATIO = 1.5  # of the best prediction: what the model puts beyond it is not tried


@dataclasses.dataclass(frozen=True)
class Slot:
    """A template that can run a stage."""

    backend: str
    template: str
    space: Space

    def choice(self, config: Config) -> StageChoice:
        return StageChoice(self.backend, self.template, config)

    def count(self, landscape: Landscape, outer: Config) -> int:
        """How many configs pass the constraints."""
        return sum(1 for _ in self.space.configs(landscape.problem, landscape.device, outer))


class Landscape(Protocol):
    """What can be chosen for one problem on one device, all in one stage graph."""

    problem: Problem
    device: Device

    @property
    def outer(self) -> Space:
        """The choices shared by all stages, with what prunes them."""

    def base(self, outer: Config | None) -> Plan:
        """The default plan at an outer point; None: the default one. Raises ConstraintError when there is none."""

    def slots(self, stage: str) -> tuple[Slot, ...]:
        """The templates of a stage."""

    def contract(self, stage: str, outer: Config) -> Hashable:
        """Equal for outer points at which the stage is the same."""


class Templates:
    """The templates of some backends of one graph.

    Args:
        problem, device: what is tuned.
        backends: of one graph; the first one's defaults are the base.
    """

    def __init__(self, problem: Problem, device: Device, backends: tuple[str, ...]) -> None:
        self.problem, self.device, self.backends = problem, device, backends
        self.graph = graph_of(backends[0])

    @functools.cached_property
    def outer(self) -> Space:
        declared = GRAPHS[self.graph]
        if self.graph != "staged":
            return declared
        pruned = (roofline_constraint(self.problem, self.device), SPLIT_PAYS)
        return Space(declared.params, (*declared.constraints, *pruned))

    def base(self, outer: Config | None) -> Plan:
        return default_plan(self.problem, self.device, self.backends[0], outer)

    def slots(self, stage: str) -> tuple[Slot, ...]:
        found = templates_for(stage, self.problem, self.backends)
        return tuple(Slot(template.backend, template.name, template.space) for template in found)

    def contract(self, stage: str, outer: Config) -> Hashable:
        return stage_contract(stage, self.problem, outer)


def predicted_us(problem: Problem, device: Device, outer: Config) -> float:
    """The roofline's time of the staged graph at some outer choices, at a data-centre GPU's rates."""
    return floor_of(problem, device, DATA_CENTRE, outer).time_us


# twice the work for fewer steps in a row: where those do not decide, its points would take the others' share
SPLIT_PAYS = Constraint(
    "the roofline must predict that split gains",
    lambda p, c, d: c["split"] == 0 or predicted_us(p, d, c) < predicted_us(p, d, c.replace(split=0)),
)


def roofline_constraint(problem: Problem, device: Device) -> Constraint:
    """Refuses the outer choices that the roofline puts far behind the best; the declared default stays."""
    try:
        default = default_plan(problem, device, None).outer
    except ConstraintError:
        default = Config()
    best = min(
        (predicted_us(problem, device, outer) for outer in GRAPHS["staged"].configs(problem, device)), default=0.0
    )

    def holds(p: Problem, config: Config, d: Device) -> bool:
        return config == default or predicted_us(problem, device, config) <= PRUNE_RATIO * best

    return Constraint(f"the roofline must predict at most {PRUNE_RATIO} times the {best:.0f} us of the best", holds)
