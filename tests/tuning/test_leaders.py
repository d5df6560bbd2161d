"""Leaders: which configs run in turn again, and when that is enough."""

import dataclasses

from sse_tune.device import ARCHS
from sse_tune.problem import Problem
from sse_tune.templates.registry import default_plan
from sse_tune.tuning.candidates import Candidate
from sse_tune.tuning.leaders import Leaders

BASE = default_plan(Problem.preset("spikingbrain2-5b"), ARCHS["sm_90"])


def made(stage, number, base=BASE):
    choice = base.stages[stage]
    other = dataclasses.replace(choice, config=choice.config.replace(num_stages=number))
    return Candidate("stage", base.replace_stage(stage, other), base, stage)


def test_only_those_that_no_other_is_clearly_ahead_of_run_again():
    leaders = Leaders()
    configs = [made("scan", n) for n in (1, 2, 3, 4)]
    for config, time_us in zip(configs, (100.0, 90.0, 92.0, 96.0)):
        leaders.note("scan", config, (time_us,) * 3)
    assert leaders.next(BASE) == [configs[1], configs[2]]


def test_one_alone_has_no_rival():
    leaders = Leaders()
    leaders.note("scan", made("scan", 1), (10.0,))
    leaders.note("gradients", made("gradients", 1), (10.0,))
    assert leaders.next(BASE) == []


def test_the_stage_with_the_fewest_samples_comes_first_until_all_have_enough():
    leaders = Leaders()
    pairs = {stage: [made(stage, 1), made(stage, 2)] for stage in ("scan", "gradients")}
    samples = {"scan": 5, "gradients": 3}
    order = []
    while chosen := leaders.next(BASE) if order else pairs["gradients"]:
        order.append(chosen[0].stage)
        samples[order[-1]] += 60
        for stage, pair in pairs.items():
            for config in pair:
                leaders.note(stage, config, (10.0,) * samples[stage])
    assert set(order[:3]) == {"scan", "gradients"}
    assert len(order) == 8, "four times each until two hundred"


def test_buffers_of_another_base_are_left_alone():
    leaders = Leaders()
    for number in (1, 2):
        leaders.note("scan", made("scan", number), (10.0,))
    other = BASE.replace_stage("scan", made("scan", 4).plan.stages["scan"])
    assert leaders.next(other) == []
