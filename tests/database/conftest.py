"""Records to store: real plans for real problems, with times that tests choose."""

import dataclasses

import pytest

from sse_tune.database.keys import sources_of, toolchain_of
from sse_tune.database.records import Answer, Trial
from sse_tune.database.store import TuningDatabase
from sse_tune.device import Device, toolchain
from sse_tune.problem import Problem
from sse_tune.templates.registry import default_plan

CPU = Device("cpu", "Test CPU", "x86_64", 2)
H200 = Device("cuda", "NVIDIA H200", "sm_90", 132, 227 * 1024)
TRAINING = Problem.preset("spikingbrain2-5b")
DEMO = Problem.preset("demo")


@pytest.fixture
def cpu():
    return CPU


@pytest.fixture
def h200():
    return H200


@pytest.fixture
def demo():
    return DEMO


@pytest.fixture
def training():
    return TRAINING


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tuning.db"


@pytest.fixture
def make_answer():
    """make_answer(time_us, device, problem, **changes): an answer that fits this machine's toolchain and sources."""

    def make(time_us=100.0, device=CPU, problem=DEMO, **changes):
        plan = default_plan(problem, device)
        fields = dict(
            bucket=problem.bucket.name, device=device.slug, arch=device.arch, driver=None,
            toolchain=toolchain_of(plan, toolchain()), sources=sources_of(plan), problem=problem.to_dict(), plan=plan,
            time_us=time_us, default_time_us=1.5 * time_us, timings_us=(time_us, time_us + 0.1), errors={"o": 1e-7},
            how={"budget_s": 60, "note": "naïve, \"quoted\"", "nested": [1, 2.5, None, {"deep": True}]},
        )  # fmt: skip
        return Answer(**{**fields, **changes})

    return make


@pytest.fixture
def outdone(make_answer):
    """An answer, and a later one of the same identity that outdoes it, though it is slower as recorded. As text the
    later moment comes first."""
    first = make_answer(100.0, created="2026-01-02T00:30:00+00:00")
    choice = first.plan.stages["whole"]
    other = dataclasses.replace(choice, config=choice.config.replace(chunk_size=16))
    plan = first.plan.replace_stage("whole", other)
    beside = {"beside": ["0" * 16, first.plan.key]}
    return first, make_answer(101.0, plan=plan, how=beside, created="2026-01-02T00:00:00-01:00")


@pytest.fixture
def make_trial():
    """make_trial(study, **changes): an admitted plan trial."""

    def make(study, device=CPU, problem=DEMO, **changes):
        fields = dict(
            study=study, kind="plan", plan=default_plan(problem, device).to_dict(), outcome="ok", time_us=0.1 + 0.2,
            timings_us=(0.1 + 0.2, 12.0), errors={"o": 1e-7}, resources={"scan": {"registers": 128}},
        )  # fmt: skip
        return Trial(**{**fields, **changes})

    return make


@pytest.fixture
def filled(path, make_answer, make_trial):
    """A database with two studies, trials of every kind, two answers and a quarantined config."""
    with TuningDatabase(path) as database:
        first = database.open_study("key one", DEMO, CPU, {"backends": ["torch"]})
        second = database.open_study("key two", TRAINING, H200, {})
        database.add_trial(make_trial(first))
        database.add_trial(make_trial(first, outcome="wrong", time_us=None, timings_us=(), errors={"d_k": float("nan")},
                                      reason='d_k differs:\r\n"nan", not 0.5\nat [0, 1]'))  # fmt: skip
        database.add_trial(make_trial(second, H200, TRAINING, kind="stage", stage="scan"))
        database.put_answer(make_answer())
        database.put_answer(make_answer(2000.0, H200, TRAINING, driver="580.1"))
        database.quarantine("sm_90", "triton 3.6.0", "triton:scan", {"block_v": 64}, "abc", "races")
        yield database
