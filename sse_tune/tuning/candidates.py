"""What a strategy and its driver hand each other: candidates, earlier results, and how to search."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import optuna

from sse_tune.database.fields import digest
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.templates.stages import stage_contract


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What a strategy wants to know the time of.

    Args:
        kind: "plan", end to end; "stage", one stage alone; "combination", end to end too, for a sweep: admitted by the
            case "ordinary" alone, so that no search takes it for a plan that was admitted.
        plan: the plan; for a stage, `base` with that stage's choice.
        base: for a stage: the admitted plan on whose buffers it runs.
        stage: its name.
    """

    kind: str
    plan: Plan
    base: Plan | None = None
    stage: str | None = None

    def key(self, problem: Problem) -> str:
        """Thirty-two hex digits: the same for one stage's choice at all outer points of one contract."""
        if self.stage is None:
            return digest([self.kind, self.plan.to_dict()])
        contract = stage_contract(self.stage, problem, self.plan.outer)
        return digest(["stage", self.stage, contract, self.plan.stages[self.stage].to_dict()])


@dataclasses.dataclass(frozen=True)
class Known:
    """The result of an earlier trial: its time, or None where it failed."""

    time_us: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a strategy searches.

    Args:
        sampler: one of `samplers.SAMPLERS`; "auto": exhaustive where the space fits what is left, else TPE.
        seed: of the samplers.
        target: end the tuning of an outer point once its stages are estimated to be within this factor of their best.
        max_stage_trials: of one template at one contract, for samplers that do not try everything.
        max_points: outer points to try.
        used: how much of the budget is used, 0..1: each outer point gets its share of it.
        room: about how many more trials the budget holds.
        known: the result of a candidate if an earlier trial has it.
        on_rejected: told of each proposal that breaks a constraint, with the reason.
        storage, study: where Optuna shares its studies with other hosts, and their common prefix; None: it does not.
    """

    sampler: str = "auto"
    seed: int = 0
    target: float | None = None
    max_stage_trials: int = 64
    max_points: int = 4
    used: Callable[[], float] = lambda: 0.0
    room: Callable[[], float] = lambda: float("inf")
    known: Callable[[Candidate], Known | None] = lambda candidate: None
    on_rejected: Callable[[Candidate, str], None] = lambda candidate, reason: None
    storage: optuna.storages.BaseStorage | None = None
    study: str = ""

    def sampler_for(self, configs: int) -> str:
        """What "auto" means for a space of so many configs."""
        if self.sampler != "auto":
            return self.sampler
        return "exhaustive" if configs <= self.room() else "tpe"
