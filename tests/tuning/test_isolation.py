"""Templates that hang, crash, lie or run out of memory: each costs one trial, and no bad one wins a search."""

import importlib
import pathlib
import types

import pytest

from sse_tune.database.store import TuningDatabase
from sse_tune.plan import Plan, StageChoice
from sse_tune.problem import Problem
from sse_tune.space import Config
from sse_tune.templates import registry
from sse_tune.tuning import evaluate, finals, jobs, search
from sse_tune.tuning.candidates import Candidate, Settings
from sse_tune.tuning.engine import Engine
from sse_tune.tuning.evaluate import Evaluator
from sse_tune.tuning.landscape import Templates
from sse_tune.tuning.lanes import Lanes
from sse_tune.tuning.recorder import Recorder
from sse_tune.tuning.strategy import WholePlans
from sse_tune.tuning.worker import Worker

EXPECTED = {
    "none": ("ok", None),
    "hangs": ("timeout", "no answer within"),
    "segfaults": ("crash", "SIGSEGV"),
    "wrong_gradient": ("wrong", "d_v: relative error"),
    "no_memory": ("out_of_memory", "MemoryError"),
    "device_error": ("crash", "illegal memory access"),
}


@pytest.fixture
def templates(monkeypatch):
    """The planted backend, here and in the workers, and a deadline that a hang is not waited out for long."""
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent))
    planted = importlib.import_module("planted_templates")
    named = ("check_and_time", "time_in_turn", "check")
    stand_in = types.SimpleNamespace(**{**vars(jobs), **{name: getattr(planted, name) for name in named}})
    monkeypatch.setattr(evaluate, "jobs", stand_in)
    monkeypatch.setattr(finals, "jobs", stand_in)
    monkeypatch.setattr(evaluate, "PLAN_DEADLINE_S", 25.0)
    with planted.installed():
        yield planted


def plan_of(problem, device, fault):
    choice = registry.default_plan(problem, device, "planted").stages["whole"]
    config = Config({**choice.config, "fault": fault})
    return Plan("whole", Config(), {"whole": StageChoice("planted", "planted", config)})


def test_bad_templates_cost_one_trial_each(templates, small, cpu, tmp_path):
    with TuningDatabase(tmp_path / "tuning.db") as database, Worker(threads=1) as worker:
        lanes = Lanes([worker])
        study = database.open_study("key", small, cpu, {})
        recorder = Recorder(database, study, small, resume=False, budget_s=600)
        engine = Engine(Evaluator(small, cpu, recorder), None, lanes)
        strategy = WholePlans(Templates(small, cpu, ("planted",)), Settings(sampler="exhaustive"))
        engine.run(strategy, 1.0)
        recorder.close()
        assert strategy.plans() == [plan_of(small, cpu, "none")], "no bad one has a time"
        trials = database.trials()
        assert len(trials) == len(EXPECTED)
        for trial in trials:
            fault = trial.plan["stages"]["whole"]["config"]["fault"]
            outcome, reason = EXPECTED[fault]
            assert trial.outcome == outcome, trial
            assert reason is None or reason in trial.reason
            assert (trial.time_us is None) == (fault != "none")
        # the hang and the crash each cost the process, what was merely wrong did not; the device error, which came
        # last, took it away for good
        assert worker.starts == 3
        assert worker.pid is None
        refused = {record.config["fault"] for record in database.quarantined()}
        assert refused == {"segfaults", "wrong_gradient", "device_error"}
        lanes.close()


def test_quarantine_is_for_head_sizes_and_dtype(templates, small, cpu, tmp_path):
    other = Problem(**{**small.to_dict(), "head_dim": 24, "head_dim_v": 16})
    with TuningDatabase(tmp_path / "tuning.db") as database, Worker(threads=1) as worker:
        lanes = Lanes([worker])
        wrong = Candidate("plan", plan_of(small, cpu, "wrong_gradient"))
        for problem in (small, small.replace(num_heads=3), other, small.replace(dtype="bf16")):
            study = database.open_study(str(problem), problem, cpu, {})
            recorder = Recorder(database, study, problem, resume=False, budget_s=600)
            attempt = Engine(Evaluator(problem, cpu, recorder), None, lanes).evaluate(wrong)
            recorder.close()
            again = problem.num_heads == 3
            assert attempt.outcome == ("rejected" if again else "wrong")
            assert attempt.reason.startswith("quarantined: case") == again
        keys = {(record.config["K"], record.config["V"], record.config["dtype"]) for record in database.quarantined()}
        assert keys == {(16, 16, "fp32"), (24, 16, "fp32"), (16, 16, "bf16")}
        with TuningDatabase(tmp_path / "other.db") as other_database:
            other_database.merge(database)
            assert other_database.quarantined() == database.quarantined()
        lanes.close()


def test_a_search_survives_them(templates, small, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "backends_for", lambda backends, device: ("planted",))
    report = search.search(small, 400, database=tmp_path / "tuning.db", device="cpu")
    assert report.plan.stages["whole"].config["fault"] == "none"
    assert report.outcomes == {"ok": 1, "timeout": 1, "crash": 2, "wrong": 1, "out_of_memory": 1}
