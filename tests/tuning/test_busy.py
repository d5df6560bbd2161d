"""Which share of a search its devices were measuring, by a clock that the test sets; lanes tell of their jobs."""

import time

import pytest

from sse_tune.tuning.busy import Stopwatch
from sse_tune.tuning.evaluate import Job
from sse_tune.tuning.lanes import Lanes
from sse_tune.tuning.worker import JobResult


@pytest.fixture
def now():
    return [1000.0]


def test_the_first_minute_is_told_apart(now):
    stopwatch = Stopwatch(1, lambda: now[0])
    now[0] += 50
    stopwatch.ran(10)  # 40..50
    now[0] += 30
    stopwatch.ran(25)  # 55..80, of which 60..80
    now[0] += 80
    stopwatch.ran(55)  # 105..160
    busy = stopwatch.busy(compile_wait_s=4.26)
    assert busy.share == pytest.approx(90 / 160)
    assert busy.share_after_first_minute == pytest.approx(75 / 100)
    shown = "measuring 75% of the time after the first minute, 56% of all; 4.3 s spent waiting for compilers"
    assert busy.line() == shown
    assert busy.to_dict() == {
        "share": 0.5625, "share_after_first_minute": 0.75, "compile_wait_s": 4.26, "wall_s": 160.0, "devices": 1
    }  # fmt: skip


def test_a_short_search_has_no_time_after_the_first_minute(now):
    stopwatch = Stopwatch(1, lambda: now[0])
    assert stopwatch.busy().share == 0.0
    now[0] += 60
    stopwatch.ran(30)
    assert stopwatch.busy().share_after_first_minute is None
    assert stopwatch.busy().line() == "measuring 50% of all; 0.0 s spent waiting for compilers"


def test_devices_share_the_time(now):
    stopwatch = Stopwatch(2, lambda: now[0])
    now[0] += 100
    stopwatch.ran(100)
    stopwatch.ran(20)
    busy = stopwatch.busy()
    assert (busy.share, busy.share_after_first_minute) == (0.6, 0.75)


class Sleeper:
    def run(self, job, *arguments, deadline_s):
        time.sleep(0.05)
        return JobResult("ok", None, None, 0.05)

    def close(self):
        pass


def test_lanes_tell_of_their_jobs():
    lanes = Lanes([Sleeper(), Sleeper()])
    try:
        lanes.run_in_each(Job(print, (), 1.0))
        lanes.run(Job(print, (), 1.0))
        busy = lanes.stopwatch.busy()
    finally:
        lanes.close()
    assert busy.devices == 2
    assert busy.share * 2 * busy.wall_s == pytest.approx(0.15)
