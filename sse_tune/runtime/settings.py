"""The plain values an operator takes beside its tensors; problem and plan as JSON, since it takes no objects."""

from __future__ import annotations

import dataclasses
import functools
import json

from sse_tune.plan import Plan
from sse_tune.problem import Problem


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every operator is told.

    Args:
        problem: `write_problem` of the problem.
        plan: `Plan.to_json` of the plan.
        scale: what multiplies q·k.
        output_final_state: whether the final state is a result too.
    """

    problem: str
    plan: str
    scale: float
    output_final_state: bool


@functools.lru_cache(maxsize=1024)
def write_problem(problem: Problem) -> str:
    return json.dumps(problem.to_dict(), sort_keys=True)


@functools.lru_cache(maxsize=1024)
def read_problem(text: str) -> Problem:
    return Problem.from_dict(json.loads(text))


@functools.lru_cache(maxsize=1024)
def read_plan(text: str) -> Plan:
    return Plan.from_json(text)
