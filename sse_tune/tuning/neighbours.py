"""The plans beside a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from sse_tune.plan import Plan
from sse_tune.templates.registry import find_template
from sse_tune.tuning.engine import Engine


def neighbours(plan: Plan, stage: str, engine: Engine) -> Iterator[Plan]:
    """The plans that differ in one parameter of one stage by one step along its values."""
    choice = plan.stages[stage]
    space = engine.workload.joint(find_template(choice.backend, choice.template).space)
    for param in space.params:
        place = param.values.index(choice.config[param.name])
        for other in (place - 1, place + 1):
            if 0 <= other < len(param.values):
                config = choice.config.replace(**{param.name: param.values[other]})
                if not space.violations(engine.problem, config, engine.evaluator.device, plan.outer):
                    yield plan.replace_stage(stage, dataclasses.replace(choice, config=config))
