"""What tells plans apart whose times the noise cannot: their stages' own times."""

import dataclasses

import pytest

from sse_tune.device import ARCHS
from sse_tune.templates.registry import default_plan
from sse_tune.tuning.ties import saved_by_stages, with_faster_stages
from tests.templates.against_reference import problem_of

PLAN = default_plan(problem_of("gdn"), ARCHS["sm_90"], "triton")


def with_warps(plan, **warps):
    for stage, number in warps.items():
        choice = plan.stages[stage]
        plan = plan.replace_stage(stage, dataclasses.replace(choice, config=choice.config.replace(num_warps=number)))
    return plan


OTHER = with_warps(PLAN, routing=8, scan=2)


@pytest.mark.parametrize(
    ("routing_us", "scan_us", "expected"),
    [
        ((10, 15), (100, 100), 5.0),
        ((10, 15), (101, 100), 4.0),
        ((10, 15), (103, 100), -1.0),
        ((14.5, 15), (100, 100), -1.0),
        ((10, 15), (None, 100), -1.0),
        ((10, 15), (100, None), -1.0),
    ],
    ids=["one is", "within the margin", "another is slower", "not clearly", "not known", "not known of the holder"],
)
def test_one_stage_must_be_faster_and_none_slower(routing_us, scan_us, expected):
    times = {"routing": routing_us, "scan": scan_us}
    assert saved_by_stages(OTHER, PLAN, lambda plan, stage: times[stage][plan == PLAN]) == expected


def test_only_what_differs_is_asked_for_and_the_holder_saves_nothing():
    asked = []
    saved_by_stages(OTHER, PLAN, lambda plan, stage: asked.append(stage) or 1.0)
    assert set(asked) == {"routing", "scan"}
    assert saved_by_stages(PLAN, PLAN, None) == 0.0


def test_plans_of_other_outer_choices_are_not_compared():
    other = dataclasses.replace(OTHER, outer=OTHER.outer.replace(chunk_size=32))
    assert saved_by_stages(other, PLAN, lambda plan, stage: 1.0 + (plan == PLAN)) == -1.0


def test_of_choices_that_are_clearly_faster_the_fastest_is_put_in():
    one, other = (with_warps(PLAN, routing=number) for number in (2, 8))
    choices = [("routing", one.stages["routing"]), ("routing", other.stages["routing"]), ("scan", OTHER.stages["scan"])]
    times = {PLAN.stages["routing"]: 15.0, one.stages["routing"]: 12.0, other.stages["routing"]: 9.0,
             PLAN.stages["scan"]: 100.0, OTHER.stages["scan"]: 95.0}  # fmt: skip

    def time_of(plan, stage):
        return times[plan.stages[stage]]

    for order in (choices, choices[::-1]):
        assert with_faster_stages(PLAN, [*order, ("output", PLAN.stages["scan"])], time_of) == other
    assert with_faster_stages(PLAN, choices, lambda plan, stage: None) == PLAN
    assert with_faster_stages(PLAN, [], time_of) == PLAN
