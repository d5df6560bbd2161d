"""The whole search on a CPU: an answer in the database, every trial kept, Ctrl-C and resume, bad candidates."""

import signal
import threading

import pytest

from sse_tune.database.store import TuningDatabase
from sse_tune.device import Device
from sse_tune.errors import SearchError
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.templates.registry import default_plan, validate_plan
from sse_tune.templates.stages import GRAPHS
from sse_tune.tuning import machine
from sse_tune.tuning.jobs import Attempt
from sse_tune.tuning.landscape import PRUNE_RATIO, Templates, predicted_us
from sse_tune.tuning.report import SearchInterrupted
from sse_tune.tuning.search import search
from sse_tune.tuning.worker import JobResult
from sse_tune.tuning.workload import Workload
from tests.tuning.test_finals import answer_of, varied


@pytest.fixture
def database(tmp_path):
    with TuningDatabase(tmp_path / "tuning.db") as database:
        yield database


def test_search_ends_with_an_admitted_answer(small, database, cpu):
    seen = []
    report = search(small, 40, database=database, trials=4, device="cpu", progress=lambda *told: seen.append(told))
    validate_plan(report.plan, small, cpu)
    assert report.default is not None
    assert report.speedup >= 1.0
    assert 0 < report.error < 1e-4
    assert {"o", "d_q", "d_router_logits"} <= set(report.errors)
    assert report.outcomes["ok"] == 4
    trials = database.trials(report.study)
    assert [trial.number for trial in trials] == list(range(len(trials)))
    ok = [trial for trial in trials if trial.outcome == "ok"]
    assert len(ok) == 4
    assert Plan.from_dict(ok[0].plan) == default_plan(small, cpu)
    assert all(trial.timings_us and trial.errors for trial in ok)
    (answer,) = database.answers()
    assert (answer.plan, answer.bucket) == (report.plan, small.bucket.name)
    assert answer.timings_us == report.best.times_us
    assert answer.how["study"] == report.study
    assert seen[0][0] == "admitting the default"
    assert seen[-1][0] == "done"
    assert any("speed-up" in line for line in report.lines())
    assert 0 < report.busy.share <= 1
    assert answer.how["busy"] == report.to_dict()["busy"] == report.busy.to_dict()
    assert any(report.busy.line() in line for line in report.lines())


def test_interrupted_search_keeps_its_trials_and_resumes(small, database):
    main = threading.main_thread().ident

    def stop_in_the_third_trial(phase, done, total, best_us):
        if phase == "plans" and done == 2:
            threading.Timer(0.02, signal.pthread_kill, (main, signal.SIGINT)).start()

    with pytest.raises(SearchInterrupted, match="go on with resume=True") as stopped:
        search(small, 60, database=database, device="cpu", progress=stop_in_the_third_trial)
    kept = database.trials(stopped.value.study)
    ok = [trial for trial in kept if trial.outcome == "ok"]
    assert len(ok) >= 2
    assert [trial.outcome for trial in kept].count("interrupted") == 1
    report = search(small, 60, database=database, resume=True, trials=2, device="cpu")
    assert report.study == stopped.value.study
    plans = [Plan.from_dict(t.plan) for t in database.trials(report.study) if t.outcome == "ok"]
    assert len(plans) == len(set(plans)), "a resumed search must not repeat what was done"
    assert len(plans) == len(ok) + 2


def test_what_would_run_without_the_search_is_measured_even_if_its_turn_does_not_come(small, cpu, database):
    """The answer of a neighbour: a search that ended before it was tried would store a slower one over it."""
    neighbour = varied(default_plan(small, cpu), chunk_size=16)
    database.put_answer(answer_of(small.replace(seq_len=2 * small.seq_len), cpu, neighbour))
    report = search(small, 40, database=database, trials=1, device="cpu")
    tried = [Plan.from_dict(trial.plan) for trial in database.trials(report.study) if trial.outcome == "ok"]
    assert tried == [default_plan(small, cpu), neighbour]


class PlantedWorker:
    """Answers of a worker whose candidates are bad in turn; the default is good, and so is the last."""

    def __init__(self, bad):
        self.bad, self.runs = bad, 0

    def close(self):
        pass

    def run(self, job, *arguments, deadline_s):
        if job.__name__ == "time_in_turn":
            times = {key: (100.0 - number,) * 7 for number, key in enumerate(arguments[0])}
            return JobResult("ok", times, None, 0.1)
        if job.__name__ == "check":
            return JobResult("ok", Attempt("ok", None, (), {"o": 1e-7}), None, 0.1)
        self.runs += 1
        if 1 < self.runs <= 1 + len(self.bad):
            outcome = self.bad[self.runs - 2]
            if outcome == "wrong":
                return JobResult("ok", Attempt("wrong", "case gates: d_q: relative error 1 > 1e-5"), None, 0.1)
            return JobResult(outcome, None, f"planted {outcome}", 0.1)
        return JobResult("ok", Attempt("ok", None, (100.0, 101.0, 99.0), {"o": 1e-7}), None, 0.1)


def test_bad_candidates_are_recorded_and_not_tried_again(small, database, cpu, monkeypatch):
    bad = ("wrong", "crash", "timeout", "out_of_memory")
    monkeypatch.setattr(machine, "Worker", lambda gpu, threads: PlantedWorker(bad))
    report = search(small, 30, database=database, device=cpu)
    for outcome in bad:
        (trial,) = [trial for trial in database.trials(report.study) if trial.outcome == outcome]
        assert trial.reason
        assert trial.time_us is None
    refused = database.quarantined()
    assert sorted(record.reason.split(":")[0] for record in refused) == ["case gates", "planted crash"]
    again = search(small, 30, database=database, device=cpu)
    quarantined = [t for t in database.trials(again.study) if t.reason and t.reason.startswith("quarantined")]
    assert len(quarantined) == 2
    assert again.outcomes["rejected"] >= 2


def test_an_answer_names_what_it_was_measured_beside_and_outdoes_it(small, database, cpu, monkeypatch):
    """The stored one was measured on a day with higher clocks."""
    compared = []

    class Noting(PlantedWorker):
        def run(self, job, *arguments, deadline_s):
            if job.__name__ == "time_in_turn":
                compared.append(list(arguments[0]))
            return super().run(job, *arguments, deadline_s=deadline_s)

    monkeypatch.setattr(machine, "Worker", lambda gpu, threads: Noting(()))
    stored = varied(default_plan(small, cpu), chunk_size=16)
    database.put_answer(answer_of(small, cpu, stored, 50.0))
    report = search(small, 30, database=database, trials=3, device=cpu)
    assert report.plan != stored
    (answer,) = database.answers()
    assert (answer.plan, answer.time_us) == (report.plan, report.best.median_us)
    assert report.stored and answer.time_us > 50.0
    assert stored.key in answer.how["beside"]
    assert answer.how["beside"] == [key for key in compared[-1] if key != report.plan.key]


def test_default_stays_unless_beaten_beyond_the_noise(small, database, cpu, monkeypatch):
    class Tied(PlantedWorker):
        def run(self, job, *arguments, deadline_s):
            if job.__name__ == "time_in_turn":
                times = {key: (100.0, 90.0 + number, 110.0, 95.0, 105.0) for number, key in enumerate(arguments[0])}
                return JobResult("ok", times, None, 0.1)
            return super().run(job, *arguments, deadline_s=deadline_s)

    monkeypatch.setattr(machine, "Worker", lambda gpu, threads: Tied(()))
    report = search(small, 30, database=database, device=cpu)
    assert report.is_default
    assert report.plan == default_plan(small, cpu)


def test_nothing_admitted_is_an_error(small, database, cpu, monkeypatch):
    class Wrong(PlantedWorker):
        def run(self, job, *arguments, deadline_s):
            return JobResult("timeout", None, "planted", 0.1)

    monkeypatch.setattr(machine, "Worker", lambda gpu, threads: Wrong(()))
    with pytest.raises(SearchError, match="the default failed: timeout, planted"):
        search(small, 30, database=database, device=cpu)
    assert {t.outcome for t in database.trials()} <= {"timeout", "rejected"}


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (dict(budget_s=0), "budget must be positive"),
        (dict(trials=0), "budget must be positive"),
        (dict(backends=["nonsense"]), "backends must be known"),
        (dict(backends=["triton"]), "kernels need a GPU"),
    ],
)
def test_bad_arguments(small, database, cpu, arguments, rule):
    with pytest.raises(SearchError, match=rule):
        search(small, database=database, device=cpu, **arguments)


def test_outer_points_far_behind_in_the_model_are_refused_with_the_reason():
    problem, gpu = Problem.preset("spikingbrain2-5b"), Device.from_arch("sm_90")
    outer = Templates(problem, gpu, ("triton",)).outer
    kept, declared = set(outer.configs(problem, gpu)), set(GRAPHS["staged"].configs(problem, gpu))
    best = min(predicted_us(Workload.of(problem), gpu, point) for point in declared)
    assert default_plan(problem, gpu).outer in kept
    assert kept < declared
    for point in declared - kept:
        predicted, reasons = predicted_us(Workload.of(problem), gpu, point), outer.violations(problem, point, gpu)
        if predicted > PRUNE_RATIO * best:
            assert "the roofline must predict at most 1.5 times" in reasons[0]
        else:
            assert predicted >= predicted_us(Workload.of(problem), gpu, point.replace(split=0))
            assert "the roofline must predict that split gains" in reasons[0]
    assert all(point.split == 0 for point in kept)
    few = problem.replace(num_heads=4, seq_len=131072)
    assert any(point.split for point in Templates(few, gpu, ("triton",)).outer.configs(few, gpu))
