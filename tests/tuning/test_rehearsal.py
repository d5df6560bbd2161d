"""Rehearsals: which plans of leaders are measured, and which one is put together in the end."""

import dataclasses

from sse_tune.device import ARCHS
from sse_tune.problem import Problem
from sse_tune.templates.registry import default_plan
from sse_tune.tuning.rehearsal import Rehearsal

BASE = default_plan(Problem.preset("spikingbrain2-5b"), ARCHS["sm_90"])


def choices(stage, *times_us):
    """A ranking: the config with n stages in flight takes the n-th time."""
    found = []
    for number, time_us in enumerate(times_us, start=1):
        choice = BASE.stages[stage]
        found.append((dataclasses.replace(choice, config=choice.config.replace(num_stages=number)), time_us))
    return sorted(found, key=lambda pair: pair[1])


def plan(**numbers):
    found = BASE
    for stage, number in numbers.items():
        choice = BASE.stages[stage]
        found = found.replace_stage(
            stage, dataclasses.replace(choice, config=choice.config.replace(num_stages=number))
        )
    return found


RANKINGS = {"scan": choices("scan", 50.0, 51.0, 80.0), "gradients": choices("gradients", 101.0, 100.0), "combine": []}


def test_the_best_of_every_stage_first_then_one_stage_by_another_leader():
    rehearsal = Rehearsal(BASE)
    assert rehearsal.next(RANKINGS) == plan(scan=1, gradients=2)
    rehearsal.tell(plan(scan=1, gradients=2), 150.0)
    assert rehearsal.next(RANKINGS) == plan(scan=1, gradients=1), "of the dearest stage first"
    assert rehearsal.next(RANKINGS) == plan(scan=2, gradients=2)
    assert rehearsal.next(RANKINGS) is None, "the third scan is clearly slower"


def test_it_goes_on_around_what_was_the_fastest():
    rehearsal = Rehearsal(BASE)
    assert not rehearsal.tell(rehearsal.next(RANKINGS), None), "a failure is not the fastest"
    assert rehearsal.favourite is None
    assert rehearsal.tell(plan(scan=2, gradients=2), 149.0)
    assert not rehearsal.tell(plan(scan=1, gradients=1), 151.0)
    assert rehearsal.favourite == plan(scan=2, gradients=2)
    assert rehearsal.next(RANKINGS) == plan(scan=2, gradients=1)


def test_what_was_measured_as_a_whole_is_chosen_unless_stages_have_found_better_since():
    rehearsal = Rehearsal(BASE)
    assert rehearsal.chosen(RANKINGS) == plan(scan=1, gradients=2), "nothing was rehearsed"
    rehearsal.tell(plan(scan=2, gradients=1), 140.0)
    assert rehearsal.chosen(RANKINGS) == plan(scan=2, gradients=1), "the sum is a little more, the whole less"
    faster = RANKINGS | {"scan": choices("scan", 50.0, 51.0, 40.0)}
    assert rehearsal.chosen(faster) == plan(scan=3, gradients=2)
