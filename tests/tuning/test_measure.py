"""Timing: medians with their noise, rivals in turn, and a winner only beyond the noise."""

import contextlib
import time
import types

import pytest
import torch

from sse_tune.device import ARCHS
from sse_tune.problem import Problem
from sse_tune.templates.registry import default_plan
from sse_tune.tuning import jobs
from sse_tune.tuning import measure as measuring
from sse_tune.tuning.jobs import Attempt
from sse_tune.tuning.measure import Timing, compare, compare_calls, measure
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


class FakeGpu:
    """A GPU that runs what the host launched in order, on a clock of its own in microseconds."""

    def __init__(self):
        self.log, self.host, self.done = [], 0.0, 0.0
        self.int8 = torch.int8
        self.device = torch.device
        self.cuda = types.SimpleNamespace(Event=self.event, device=lambda device: contextlib.nullcontext())

    def launch(self, name, gpu_us):
        self.log.append(name)
        self.done = max(self.done, self.host) + gpu_us

    def wait(self):
        self.host = max(self.host, self.done)

    def empty(self, size, dtype, device):
        return types.SimpleNamespace(zero_=lambda: self.launch("flush", 50.0))

    def event(self, enable_timing):
        made = types.SimpleNamespace()

        def record():
            self.launch("event", 0.0)
            made.at = self.done

        def synchronize():
            self.log.append("synchronize")
            self.host = max(self.host, made.at)

        made.record, made.synchronize = record, synchronize
        made.elapsed_time = lambda stop: (stop.at - made.at) / 1e3
        return made

    def side(self, name, host_us=100.0, gpu_us=(300.0,), waits=False):
        """A call: the host works, then launches; the last of `gpu_us` repeats."""
        times = list(gpu_us)

        def call():
            if waits:
                self.wait()
            self.host += host_us
            self.launch(name, times.pop(0) if len(times) > 1 else times[0])

        return call


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu()
    monkeypatch.setattr(measuring, "torch", fake)
    return fake


def test_a_row_of_calls_waits_once_at_its_end_and_sides_take_turns(gpu):
    compare_calls({name: gpu.side(name) for name in "ab"}, "cuda", time_limit_s=0, min_repeats=5)
    rows = [["flush", "event", name, "event"] * 4 + ["synchronize"] for name in "ab"]
    assert gpu.log == (rows[0] + rows[1]) * 3, "one to warm up; two have five calls"


def test_what_the_host_does_ahead_counts_for_a_call_on_an_idle_gpu_only(gpu):
    sides = {"ahead": gpu.side("ahead"), "waits": gpu.side("waits", waits=True)}
    found = compare_calls(sides, "cuda", time_limit_s=0, min_repeats=8)
    assert found["ahead"].timing.times_us == pytest.approx((300.0,) * 6)
    assert found["ahead"].idle.times_us == pytest.approx((350.0,) * 2), "the flush hides half of the host's work"
    assert found["waits"].timing.times_us == pytest.approx((400.0,) * 6), "the host is never ahead"
    assert found["waits"].idle.times_us == pytest.approx((400.0,) * 2)


def test_samples_behind_one_another_are_in_the_order_taken(gpu):
    times = [float(100 * (1 + i)) for i in range(12)]  # the first four to warm up
    (found,) = compare_calls({"a": gpu.side("a", 0.0, times)}, "cuda", time_limit_s=0, min_repeats=8).values()
    assert found.idle.times_us == pytest.approx((500.0, 900.0))
    assert found.timing.times_us == pytest.approx((600.0, 700.0, 800.0, 1000.0, 1100.0, 1200.0))


def test_no_more_calls_than_repeats_are_allowed(gpu):
    (found,) = compare_calls({"a": gpu.side("a")}, "cuda", time_limit_s=60).values()
    assert (len(found.timing.times_us), len(found.idle.times_us)) == (300, 100)


@pytest.mark.parametrize("place", [0, 2])
def test_a_row_with_an_outlier_is_taken_again_in_turn(gpu, place):
    times = [300.0] * 24
    times[4 + 2 * 4 + place] = 9000.0  # of the third row after the one to warm up
    sides = {"a": gpu.side("a", 0.0, [*times, 301.0]), "b": gpu.side("b", 0.0, [400.0] * 24 + [401.0])}
    found = compare_calls(sides, "cuda", time_limit_s=0, min_repeats=20)
    for name, usual, again in (("a", 300.0, 301.0), ("b", 400.0, 401.0)):
        assert found[name].timing.times_us == pytest.approx((*[usual] * 6, *[again] * 3, *[usual] * 6))
        assert found[name].idle.times_us == pytest.approx((usual, usual, again, usual, usual))
    assert gpu.log.count("a") == gpu.log.count("b") == 7 * 4


def test_one_call_a_sample_where_rows_are_not_asked_for(gpu):
    """As a search measures: the host waits after each."""
    timing = measure(gpu.side("a"), "cuda", time_limit_s=0)
    assert gpu.log == ["flush", "event", "a", "event", "synchronize"] * 6
    assert timing.times_us == pytest.approx((350.0,) * 5)


def test_a_cpu_runs_nothing_ahead(scripted):
    sampler = scripted(a=[1.0, 100.0, 101.0, 900.0, 99.0, 100.0, 101.0])
    (found,) = compare_calls({"a": lambda: "a"}, "cpu", time_limit_s=0).values()
    assert found == measuring.Calls(Timing((100.0, 101.0, 101.0, 99.0, 100.0)))
    assert found.idle is None
    assert sampler.taken == {"a": 7}


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
