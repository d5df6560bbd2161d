"""Timing: medians with their noise, rivals in turn, and a winner only beyond the noise."""

import time

import pytest

from sse_tune.tuning.measure import Timing, compare, measure


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
