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
    assert leaders.next(BASE) == ("scan", [configs[1], configs[2]])


def test_one_alone_has_no_rival():
    leaders = Leaders()
    leaders.note("scan", made("scan", 1), (10.0,))
    leaders.note("gradients", made("gradients", 1), (10.0,))
    assert leaders.next(BASE) is None


def test_the_stage_with_the_fewest_samples_comes_first_until_all_have_enough():
    leaders = Leaders()
    pairs = {stage: [made(stage, 1), made(stage, 2)] for stage in ("scan", "gradients")}
    samples, order = {"scan": 5, "gradients": 3}, []

    def note(stage):
        for config in pairs[stage]:
            leaders.note(stage, config, (10.0,) * samples[stage])

    for stage in pairs:
        note(stage)
    while (chosen := leaders.next(BASE)) is not None:
        stage, configs = chosen
        assert configs == pairs[stage]
        order.append(stage)
        samples[stage] += 60
        note(stage)
        leaders.ran(stage)
    assert order == ["gradients", "scan"] * 4, "four times each until two hundred"


def test_what_is_being_run_is_not_given_out_again_nor_what_failed():
    leaders = Leaders()
    configs = [made("scan", n) for n in (1, 2, 3)]
    for config in configs:
        leaders.note("scan", config, (10.0,))
    assert leaders.next(BASE) == ("scan", configs)
    assert leaders.next(BASE) is None
    leaders.ran("scan", failed=configs[:1])
    assert leaders.next(BASE) == ("scan", configs[1:])


def test_buffers_of_another_base_are_left_alone():
    leaders = Leaders()
    for number in (1, 2):
        leaders.note("scan", made("scan", number), (10.0,))
    other = BASE.replace_stage("scan", made("scan", 4).plan.stages["scan"])
    assert leaders.next(other) is None
