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


def test_the_best_of_every_stage_first_then_one_stage_by_another_leader_then_several():
    rehearsal = Rehearsal(BASE)
    assert rehearsal.next(RANKINGS) == plan(scan=1, gradients=2)
    rehearsal.tell(plan(scan=1, gradients=2), 150.0)
    assert rehearsal.next(RANKINGS) == plan(scan=1, gradients=1), "of the dearest stage first"
    assert rehearsal.next(RANKINGS) == plan(scan=2, gradients=2)
    assert rehearsal.next(RANKINGS) == plan(scan=2, gradients=1)
    assert rehearsal.next(RANKINGS) is None, "the third scan is clearly slower"


def test_several_stages_by_other_leaders_the_least_sum_first():
    rankings = {
        "scan": choices("scan", 100.0, 104.0, 103.0), "gradients": choices("gradients", 100.0, 101.0, 105.0, 106.0),
    }  # fmt: skip
    rehearsal = Rehearsal(BASE)
    found = []
    while (asked := rehearsal.next(rankings)) is not None:
        found.append(asked)
    around = [(2, 1), (3, 1), (1, 2), (1, 3)]  # one stage by another; none was told, so the first stays the favourite
    both = [(3, 2), (2, 2), (3, 3), (2, 3)]  # 204, 205, 208 and 209 us; the fourth config is too far from the best
    assert sorted(map(str, found[1:5])) == sorted(str(plan(scan=s, gradients=g)) for s, g in around)
    assert found[5:] == [plan(scan=s, gradients=g) for s, g in both]


def test_a_plan_that_was_chosen_gives_way_to_one_that_is_clearly_faster():
    rehearsal = Rehearsal(BASE)
    chosen, near, faster = plan(scan=1), plan(scan=2), plan(scan=3)
    assert rehearsal.ahead_of(chosen) is None, "nothing was rehearsed"
    rehearsal.tell(chosen, 100.0)
    rehearsal.tell(near, 99.5)
    assert rehearsal.ahead_of(chosen) is None
    rehearsal.tell(faster, 98.0)
    assert rehearsal.ahead_of(chosen) == faster
    rehearsal.tell(faster, 99.2)
    assert rehearsal.ahead_of(chosen) is None, "measured again it is not"


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
