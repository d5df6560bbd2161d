"""Timing: medians with their noise, rivals in turn, and a winner only beyond the noise."""

import time
import types

import pytest

from sse_tune.device import ARCHS
from sse_tune.problem import Problem
from sse_tune.templates.registry import default_plan
from sse_tune.tuning import jobs
from sse_tune.tuning import measure as measuring
from sse_tune.tuning.jobs import Attempt
from sse_tune.tuning.measure import Timing, compare, measure
from sse_tune.tuning.workload import Workload


def test_compare_ranks_and_interleaves():
    order = []

    def sleeper(name, seconds):
        def call():
            order.append(name)
            time.sleep(seconds)

        return call

    timings = compare({"slow": sleeper("slow", 0.01), "fast": sleeper("fast", 0.002)}, "cpu", time_limit_s=0.2)
    assert order[:6] == ["slow", "fast"] * 3
    assert timings["fast"].beats(timings["slow"])
    assert not timings["slow"].beats(timings["fast"])
    assert timings["slow"].median_us == pytest.approx(10_000, rel=0.5)
    assert len(timings["slow"].times_us) == len(timings["fast"].times_us) >= 5


def test_time_limit_ends_the_repeats():
    begin = time.perf_counter()
    timing = measure(lambda: time.sleep(0.001), "cpu", time_limit_s=0.1)
    assert time.perf_counter() - begin < 2
    assert 5 <= len(timing.times_us) <= 100


def test_noise_makes_a_tie():
    noisy = Timing((100.0, 150.0, 90.0, 130.0, 80.0))
    other = Timing((101.0, 149.0, 95.0, 133.0, 85.0))
    assert not noisy.beats(other)
    assert not other.beats(noisy)
    assert Timing((50.0,) * 5).beats(noisy)


def test_gain_within_the_margin_is_a_tie():
    assert not Timing((99.5,) * 9).beats(Timing((100.0,) * 9))


class Scripted:
    """A sampler that takes its times from a list, of each call in turn, and repeats the last."""

    def __init__(self, **times):
        self.times, self.taken = times, dict.fromkeys(times, 0)

    def __call__(self, call):
        name = call()
        number = self.taken[name]
        self.taken[name] += 1
        return self.times[name][min(number, len(self.times[name]) - 1)]


@pytest.fixture
def scripted(monkeypatch):
    def install(**times):
        sampler = Scripted(**times)
        monkeypatch.setattr(measuring, "_CpuSampler", lambda: sampler)
        return sampler

    return install


def test_repeats_end_when_the_median_is_known(scripted):
    steady = scripted(a=[100.0])
    assert measure(lambda: "a", "cpu", time_limit_s=5, min_repeats=3, until_precise=True).times_us == (100.0,) * 5
    assert steady.taken["a"] == 6, "one to warm up"
    wild = scripted(a=[100.0, 150.0, 90.0, 140.0, 95.0] * 100)
    timing = measure(lambda: "a", "cpu", time_limit_s=5, until_precise=True)
    assert len(timing.times_us) == measuring.MAX_REPEATS == wild.taken["a"] - 1 - len(timing.outliers)


def test_hopeless_is_left_after_two(scripted):
    sampler = scripted(a=[100.0])
    assert measure(lambda: "a", "cpu", min_repeats=3, give_up_us=60).times_us == (100.0, 100.0)
    assert sampler.taken["a"] == 3
    assert len(measure(lambda: "a", "cpu", give_up_us=110, time_limit_s=0).times_us) == 5


def test_outliers_are_measured_again_in_turn(scripted):
    sampler = scripted(a=[1.0, 100.0, 101.0, 900.0, 99.0, 100.0, 101.0], b=[1.0, 200.0, 201.0, 202.0, 199.0, 200.0])
    timings = compare({"a": lambda: "a", "b": lambda: "b"}, "cpu", time_limit_s=0, min_repeats=5)
    assert timings["a"].times_us == (100.0, 101.0, 101.0, 99.0, 100.0), "the third was taken again"
    assert timings["b"].times_us == (200.0, 201.0, 200.0, 199.0, 200.0), "and its neighbour with it"
    assert sampler.taken == {"a": 7, "b": 7}


def test_a_sample_that_is_slow_again_stays(scripted):
    scripted(a=[1.0, 100.0, 101.0, 900.0, 99.0, 100.0, 901.0])
    assert 901.0 in measure(lambda: "a", "cpu", time_limit_s=0, min_repeats=5).times_us


def test_a_stage_on_a_gpu_is_timed_in_a_graph(monkeypatch):
    """As whole plans are: launched by the host, a stage of several small kernels would be timed by their launches."""
    problem, device, graphs = Problem.preset("demo", dtype="bf16", head_dim=64), ARCHS["sm_90"], []

    def times(calls, load, device, time_limit_s, give_up_us, confirm_us, graph=False):
        graphs.append(graph)
        return (Timing((1.0,)),)

    monkeypatch.setattr(jobs, "check", lambda *arguments: Attempt("ok"))
    monkeypatch.setattr(jobs, "_running", lambda *arguments: (types.SimpleNamespace(run_stage=print),))
    monkeypatch.setattr(jobs, "_times", times)
    plan = default_plan(problem, device, "triton")
    assert jobs.check_and_time_stage(plan, plan, "scan", Workload.of(problem), device, 1.0).outcome == "ok"
    assert graphs == [True]
