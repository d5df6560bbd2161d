"""What a search may choose from: the outer choices, and for each stage the templates with their spaces.

A strategy sees templates only through this, so that a recorded sweep can stand in for them (`replay.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Hashable, Iterable
from typing import Protocol

from sse_tune.device import Device
from sse_tune.errors import ConstraintError
from sse_tune.plan import Plan, StageChoice
from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Space
from sse_tune.templates.outer import STAGE_CHOICES
from sse_tune.templates.registry import default_plan, graph_of, templates_for, validate_plan
from sse_tune.templates.roofline import DATA_CENTRE, floor_of
from sse_tune.templates.stages import GRAPHS, stage_contract, stage_names
from sse_tune.tuning.workload import Workload

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

    def promising(self, without: Collection[Config] = ()) -> Config | None:
        """The outer point to try right after the default one, of other stages than some: `fastest_predicted`; None:
        there is none."""

    def slots(self, stage: str) -> tuple[Slot, ...]:
        """The templates of a stage."""

    def contract(self, stage: str, outer: Config) -> Hashable:
        """Equal for outer points at which the stage is the same."""


class Templates:
    """The templates of some backends of one graph, with what all entries of a workload let them do.

    Args:
        problem, device: what is tuned: a problem, or a workload.
        backends: of one graph; the first one's defaults are the base.
    """

    def __init__(self, problem: Problem | Workload, device: Device, backends: tuple[str, ...]) -> None:
        self.workload = Workload.of(problem)
        self.problem, self.device, self.backends = self.workload.problem, device, backends
        self.graph = graph_of(backends[0])

    @functools.cached_property
    def outer(self) -> Space:
        declared = GRAPHS[self.graph]
        if self.graph != "staged":
            return declared
        joint = self.workload.joint(declared)
        pruned = (roofline_constraint(self.workload, self.device), split_pays(self.workload, self.device))
        return Space(joint.params, (*joint.constraints, *pruned))

    def base(self, outer: Config | None) -> Plan:
        return base_plan(self.workload, self.device, self.backends[0], outer)

    def promising(self, without: Collection[Config] = ()) -> Config | None:
        outers = of_other_stages(self.graph, self.problem, self.outer.configs(self.problem, self.device), without)
        return fastest_predicted(self.workload, self.device, self.base(None).outer, outers)

    def slots(self, stage: str) -> tuple[Slot, ...]:
        found = templates_for(stage, self.problem, self.backends)
        return tuple(Slot(one.backend, one.name, self.workload.joint(one.space)) for one in found)

    def contract(self, stage: str, outer: Config) -> Hashable:
        # the shapes of buffers follow from C, which is in it, and from each problem: what is equal for one entry is
        # equal for all
        return stage_contract(stage, self.problem, outer)


def other_defaults(landscape: Landscape, base: Plan) -> list[tuple[str, StageChoice]]:
    """The default of every template that is not in a base plan, by stage: what its tuning begins with."""
    found = []
    for stage, chosen in base.stages.items():
        for slot in landscape.slots(stage):
            if (slot.backend, slot.template) != (chosen.backend, chosen.template) and slot.count(landscape, base.outer):
                config = slot.space.default(landscape.problem, landscape.device, base.outer)
                found.append((stage, slot.choice(config)))
    return found


def base_plan(workload: Workload, device: Device, backend: str | None = None, outer: Config | None = None) -> Plan:
    """The default plan of the heaviest entry whose default all entries can run.

    Raises:
        ConstraintError: there is none.
    """
    refused: ConstraintError | None = None
    for problem in workload.problems:
        try:
            plan = default_plan(problem, device, backend, outer)
            for other in workload.problems:
                if other != problem:
                    validate_plan(plan, other, device)
            return plan
        except ConstraintError as error:
            refused = refused or error
    assert refused is not None
    raise refused


@functools.lru_cache(maxsize=None)
def predicted_us(workload: Workload, device: Device, outer: Config) -> float:
    """The roofline's time of the staged graph at some outer choices, at a data-centre GPU's rates; expected over the
    entries."""
    times = (floor_of(entry.problem, device, DATA_CENTRE, outer).time_us for entry in workload.entries)
    return math.fsum(entry.weight * time_us for entry, time_us in zip(workload.entries, times))


def fastest_predicted(
    workload: Workload, device: Device, default: Config, outers: Iterable[Config]
) -> Config | None:
    """Of outer points with other stages than the default's, all else equal, the one of the least predicted time; None:
    none is predicted to be faster. What a stage that falls away saves the model knows, and no trial tells before; of
    chunk sizes it knows bytes and steps, and nothing of what narrow tiles cost."""
    others = [outer for outer in outers if outer.replace(**{name: default[name] for name in STAGE_CHOICES}) == default]
    best = min((default, *others), key=lambda outer: predicted_us(workload, device, outer))
    return None if best == default else best


def of_other_stages(
    graph: str, problem: Problem, outers: Iterable[Config], without: Collection[Config]
) -> list[Config]:
    """Outer points but those that have the stages of one of some."""
    refused = {stage_names(graph, problem, outer) for outer in without}
    return [outer for outer in outers if stage_names(graph, problem, outer) not in refused]


def split_pays(workload: Workload, device: Device) -> Constraint:
    """Refuses splits that do not gain: they are twice the work for fewer steps in a row, and where those do not decide,
    their points would take the others' share of the budget."""

    def holds(p: Problem, config: Config, d: Device) -> bool:
        whole = config.replace(split=0)
        return config == whole or predicted_us(workload, device, config) < predicted_us(workload, device, whole)

    return Constraint("the roofline must predict that split gains", holds)


def roofline_constraint(workload: Workload, device: Device) -> Constraint:
    """Refuses the outer choices that the roofline puts far behind the best; the declared default stays."""
    try:
        default = base_plan(workload, device).outer
    except ConstraintError:
        default = Config()
    configs = workload.joint(GRAPHS["staged"]).configs(workload.problem, device)
    best = min((predicted_us(workload, device, outer) for outer in configs), default=0.0)

    def holds(p: Problem, config: Config, d: Device) -> bool:
        return config == default or predicted_us(workload, device, config) <= PRUNE_RATIO * best

    return Constraint(f"the roofline must predict at most {PRUNE_RATIO} times the {best:.0f} us of the best", holds)
