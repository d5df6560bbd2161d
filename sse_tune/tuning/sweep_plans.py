"""The whole plans of a recorded sweep, as they stand in its file: numbers that point into its spaces.

    "plans": [{"outer": {"chunk_size": 64, ...}, "rows": [[[[0, 5], [2, 1]], "ok", null, [571.2, ...]], ...]}]

A row names for each stage of the sweep, in the order in which its spaces come, the number of the space and of the row
in it that the plan uses; then the outcome, its reason and every raw timing, as a row of a space does. At an outer point
that has plans every combination of the configs that ran has its row, so that none must be made up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sse_tune.database.exchange import expect_fields
from sse_tune.errors import ExchangeError, PlanError
from sse_tune.plan import Plan, StageChoice
from sse_tune.problem import Problem
from sse_tune.space import Config
from sse_tune.templates.stages import stage_contract
from sse_tune.tuning.sweep_spaces import RecordedSpace, Row, row_from_data, row_to_data

REMEDY = "record it again with `sse-tune sweep --whole-plans`"


def plans_to_data(plans: Mapping[Plan, Row], problem: Problem, spaces: Sequence[RecordedSpace]) -> list[dict[str, Any]]:
    numbers = {
        (space.stage, stage_contract(space.stage, problem, space.outer), space.choice(config)): [number, row]
        for number, space in enumerate(spaces)
        for row, config in enumerate(space.rows)
    }
    rows: dict[Config, list[Any]] = {}
    for plan, row in plans.items():
        used = [
            numbers[stage, stage_contract(stage, problem, plan.outer), plan.stages[stage]]
            for stage in stages_of(spaces)
        ]  # fmt: skip
        rows.setdefault(plan.outer, []).append([used, *row_to_data(row)])
    return [{"outer": dict(outer), "rows": of_outer} for outer, of_outer in rows.items()]


def plans_from_data(data: Any, problem: Problem, spaces: Sequence[RecordedSpace]) -> dict[Plan, Row]:
    """The plans of a file.

    Raises:
        ExchangeError: one points at nothing that ran at its outer point, is there twice, or some are missing.
    """
    if not isinstance(data, list):
        raise ExchangeError("a sweep's `plans` must be a list", type(data).__name__, REMEDY)
    stages = stages_of(spaces)
    if data and len(stages) < 2:
        raise ExchangeError("whole plans must be of two stages or more", ", ".join(stages), REMEDY)
    plans: dict[Plan, Row] = {}
    for number, entry in enumerate(data):
        where = f"plans[{number}]"
        if not isinstance(entry, dict):
            raise ExchangeError(f"{where} must be an object", type(entry).__name__, REMEDY)
        expect_fields(entry, {"outer", "rows"}, where)
        try:
            outer = Config(entry["outer"])
            # by stage, what ran there: the two numbers and the choice
            ran = [_ran(stage, outer, problem, spaces) for stage in stages]
            of_entry = {}
            for i, (used, *row) in enumerate(entry["rows"]):
                at = [(space, config) for space, config in used]
                if len(at) != len(stages) or any(one not in known for one, known in zip(at, ran)):
                    raise ExchangeError(
                        f"{where} row {i} must name a config that ran for each stage", str(used)[:100], REMEDY
                    )
                chosen = dict(zip(stages, (known[one] for one, known in zip(at, ran))))
                of_entry[Plan("staged", outer, chosen)] = row_from_data(f"{where} row {i}", row)
        except ExchangeError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, PlanError) as error:
            raise ExchangeError(f"{where} must have the shape of an outer point's plans", repr(error), REMEDY) from None
        wanted = math.prod(len(known) for known in ran)
        if len(entry["rows"]) != wanted or len(of_entry) != wanted or plans.keys() & of_entry.keys():
            raise ExchangeError(
                f"{where} must hold each combination of the configs that ran, once",
                f"{len(of_entry)} different ones in {len(entry['rows'])} rows, of {wanted}", REMEDY,
            )
        plans |= of_entry
    return plans


def stages_of(spaces: Sequence[RecordedSpace]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(space.stage for space in spaces))


def _ran(
    stage: str, outer: Config, problem: Problem, spaces: Sequence[RecordedSpace]
) -> dict[tuple[int, int], StageChoice]:
    """What ran for a stage at the contract of an outer point, by the numbers of its space and row."""
    contract = stage_contract(stage, problem, outer)
    return {
        (number, i): space.choice(config)
        for number, space in enumerate(spaces)
        if space.stage == stage and stage_contract(stage, problem, space.outer) == contract
        for i, (config, row) in enumerate(space.rows.items())
        if row.outcome == "ok"
    }
