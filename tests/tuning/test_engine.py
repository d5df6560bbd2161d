"""The engine: what is compiled runs, whatever was asked for before it; while nothing is, leaders run in turn."""

import concurrent.futures
import dataclasses
import threading
import types

import pytest

from sse_tune.database.store import TuningDatabase
from sse_tune.device import ARCHS
from sse_tune.problem import Problem
from sse_tune.templates.registry import default_plan
from sse_tune.tuning import jobs
from sse_tune.tuning.ahead import Compiled
from sse_tune.tuning.candidates import Candidate, Settings
from sse_tune.tuning.engine import Engine
from sse_tune.tuning.evaluate import Evaluator
from sse_tune.tuning.jobs import Attempt
from sse_tune.tuning.landscape import Templates
from sse_tune.tuning.lanes import Lanes
from sse_tune.tuning.recorder import Recorder
from sse_tune.tuning.strategy import Strategy, WholePlans
from sse_tune.tuning.worker import JobResult, Worker


class SlowFirst(Engine):
    """Its compilers take a tenth of a second, and for the first candidate until another one has ended."""

    def compile(self, candidate):
        future = concurrent.futures.Future()
        seconds = 0.1
        if not hasattr(self, "first"):
            self.first, self.ended, seconds = future, [], 20.0
        compiler = threading.Timer(seconds, lambda: future.done() or future.set_result(Compiled("ok", None, {})))
        compiler.daemon = True
        compiler.start()
        return [future]

    def _end(self, strategy, candidate, result, resources):
        super()._end(strategy, candidate, result, resources)
        self.ended.append(candidate)
        if not self.first.done():
            self.first.set_result(Compiled("ok", None, {}))


def test_a_candidate_that_takes_long_to_compile_holds_up_no_other(small, cpu, tmp_path):
    with TuningDatabase(tmp_path / "tuning.db") as database, Worker(threads=1) as worker:
        lanes = Lanes([worker])
        recorder = Recorder(database, database.open_study("key", small, cpu, {}), small, resume=False, budget_s=600)
        engine = SlowFirst(Evaluator(small, cpu, recorder), types.SimpleNamespace(size=1), lanes)
        landscape = Templates(small, cpu, ("torch",))
        strategy = WholePlans(landscape, Settings(sampler="exhaustive"))
        engine.run(strategy, 1.0)
        recorder.close()
        lanes.close()
    assert landscape.base(None) in [candidate.plan for candidate in engine.ended[1:]], "the first asked, not first run"
    assert len(engine.ended) == len(database.trials()) > 2
    assert 0.0 < engine.compile_wait_s < 10.0


def test_what_is_withdrawn_leaves_the_compilers_unless_others_need_it():
    shared, own = concurrent.futures.Future(), concurrent.futures.Future()
    engine, taken_back = Engine.__new__(Engine), []
    engine.ahead = types.SimpleNamespace(withdraw=taken_back.extend)
    engine._queue = [("dropped", [shared, own]), ("kept", [shared])]
    engine._withdraw(types.SimpleNamespace(withdraw=lambda candidate: candidate == "dropped"))
    assert engine._queue == [("kept", [shared])]
    assert taken_back == [own]


class Stages(Strategy):
    """Asks for the configs of a stage, and keeps what it is told."""

    def __init__(self, base, candidates):
        super().__init__()
        self._base, self.left, self.times, self.corrected = base, list(candidates), {}, {}
        self.plans_to_rehearse, self.heard = [], {}

    def ask(self):
        self.finished = not self.left
        return self.left.pop(0) if self.left else None

    def tell(self, candidate, time_us):
        self.times[candidate] = time_us

    def correct(self, candidate, time_us):
        self.corrected[candidate] = time_us

    def rehearse(self):
        return self.plans_to_rehearse.pop(0) if self.plans_to_rehearse else None

    def rehearsed(self, plan, time_us):
        self.heard[plan] = time_us
        return True

    def stop(self):
        raise AssertionError("the budget is large")

    def withdraw(self, candidate):
        raise AssertionError("the budget is large")

    def progress(self):
        return "stages", 0, 1

    @property
    def bases(self):
        return (self._base,)


class InstantLanes:
    """A lane whose jobs end when they are waited for: a stage alone is measured a little wrong, in turn right."""

    def __init__(self, first_us, true_us, fails=False, rehearsals=0):
        self.first_us, self.true_us, self.fails, self.rehearsals = first_us, true_us, fails, rehearsals
        self.running, self.in_turn, self.whole = [], [], []

    def __len__(self):
        return 1

    free = property(lambda self: 1 - len(self.running))
    busy = property(lambda self: bool(self.running))

    def submit(self, job, tag):
        self.running.append((job, tag))

    def wait(self, timeout_s):
        job, tag = self.running.pop()
        if job.function in (jobs.time_stage_in_turn, jobs.time_plans_in_turn):
            plans = job.arguments[0]
            self.in_turn.append(plans)
            if self.fails:
                return [(tag, JobResult("crash", None, "planted", 0.0))]
            return [(tag, JobResult("ok", [Attempt("ok", None, (self.true_us[p],) * 30) for p in plans], None, 0.0))]
        if job.function is jobs.check_and_time:
            self.whole.append(job.arguments[0])
            return [(tag, JobResult("ok", Attempt("ok", None, (500.0,) * 3), None, 0.0))]
        return [(tag, JobResult("ok", Attempt("ok", None, (self.first_us[job.arguments[0]],) * 3), None, 0.0))]


@pytest.fixture
def leaders_setting(tmp_path):
    """An engine on one stage's configs; the last is compiled once others have run in turn, or rehearsals are done."""
    device, problem = ARCHS["sm_90"], Problem.preset("spikingbrain2-5b")
    base = default_plan(problem, device)
    choice = base.stages["scan"]
    configs = [choice.config.replace(num_stages=n) for n in (1, 2, 3, 4)]
    candidates = [
        Candidate("stage", base.replace_stage("scan", dataclasses.replace(choice, config=config)), base, "scan")
        for config in configs
    ]
    recorders = []

    def make(lanes):
        database = TuningDatabase(tmp_path / "tuning.db")
        recorder = Recorder(database, database.open_study("key", problem, device, {}), problem, resume=False,
                            budget_s=600)  # fmt: skip
        recorders.append(recorder)
        engine = Engine(Evaluator(problem, device, recorder), types.SimpleNamespace(size=4), lanes)

        class Waiting(concurrent.futures.Future):
            def done(self):
                ran = len(lanes.in_turn) > 0 and not lanes.running and len(lanes.whole) >= lanes.rehearsals
                return ran or engine.compile_wait_s > 1.0

            def result(self, timeout=None):
                return Compiled("ok", None, {})

        engine.compile = lambda candidate: [Waiting()] if candidate == candidates[-1] else []
        return engine, Stages(base, candidates), [candidate.plan for candidate in candidates]

    yield make
    for recorder in recorders:
        recorder.close()


def test_leaders_run_in_turn_while_the_compilers_are_waited_for(leaders_setting):
    lanes = InstantLanes({}, {})
    engine, strategy, (first, second, far, last) = leaders_setting(lanes)
    lanes.first_us |= {first: 100.0, second: 101.0, far: 120.0, last: 150.0}
    lanes.true_us |= {first: 101.0, second: 99.0}
    engine.run(strategy, 1.0)
    assert lanes.in_turn == [[first, second]], "the two that are close, once they are the only thing to do"
    corrected = {candidate.plan: time_us for candidate, time_us in strategy.corrected.items()}
    assert corrected == {first: 101.0, second: 99.0}
    assert len(strategy.times) == 4
    known = {c.plan: engine.recorder.lookup(c).timings_us for c in strategy.times}
    assert [len(known[plan]) for plan in (first, second, far, last)] == [33, 33, 3, 3]
    written = [len(trial.timings_us) for trial in engine.recorder.database.trials()]
    assert sorted(written) == [3, 3, 3, 3, 33, 33], "the first trials stay, all samples follow"
    assert engine.recorder.outcomes["ok"] == 4, "a candidate counts once"


def test_leaders_that_fail_when_they_run_again_stay_as_they_were(leaders_setting):
    lanes = InstantLanes({}, {}, fails=True)
    engine, strategy, plans = leaders_setting(lanes)
    lanes.first_us |= dict.fromkeys(plans, 100.0)
    engine.run(strategy, 1.0)
    assert len(lanes.in_turn) == 1
    assert not strategy.corrected
    assert set(strategy.times.values()) == {100.0}


def test_what_was_measured_again_counts_when_a_search_is_resumed(leaders_setting):
    lanes = InstantLanes({}, {})
    engine, strategy, plans = leaders_setting(lanes)
    lanes.first_us |= dict.fromkeys(plans, 100.0)
    lanes.true_us |= dict.fromkeys(plans, 90.0)
    engine.run(strategy, 1.0)
    recorder = engine.recorder
    again = Recorder(recorder.database, recorder.study, recorder.problem, resume=True, budget_s=600)
    again.close()
    assert {len(trial.timings_us) for trial in again.known.values()} == {3, 33}
    assert again.outcomes == recorder.outcomes


def test_plans_of_leaders_are_rehearsed_once_the_leaders_are_known_well(leaders_setting):
    lanes = InstantLanes({}, {}, fails=True, rehearsals=2)
    engine, strategy, plans = leaders_setting(lanes)
    lanes.first_us |= dict.fromkeys(plans, 100.0)
    strategy.plans_to_rehearse, rehearsed = list(plans[:2]), list(plans[:2])
    late = []
    engine.recorder.may_go_on = lambda share=1.0: share == 1.0 or late.append(share)
    engine.run(strategy, 1.0)
    assert lanes.whole == rehearsed
    assert strategy.heard == dict.fromkeys(rehearsed, 500.0)
    kinds = [trial.kind for trial in engine.recorder.database.trials()]
    assert kinds.count("combination") == 2, "not a trial of the plan, which is admitted by more"
    assert engine.recorder.best_us is None
    assert late, "late in exploring the fastest goes to the compilers"
    assert engine.recorder.evaluated == len(plans), "what fills the time of an idle device is none that was asked for"


def test_plans_that_were_rehearsed_run_in_turn_too(leaders_setting):
    lanes = InstantLanes({}, {}, rehearsals=2)
    engine, strategy, plans = leaders_setting(lanes)
    lanes.first_us |= {plan: 100.0 * number for number, plan in enumerate(plans, start=1)}  # no stage has a rival
    lanes.true_us |= {plans[0]: 505.0, plans[1]: 495.0}
    strategy.plans_to_rehearse = list(plans[:2])
    engine.run(strategy, 1.0)
    assert lanes.in_turn == [plans[:2]]
    assert strategy.heard == {plans[0]: 505.0, plans[1]: 495.0}
    written = [len(t.timings_us) for t in engine.recorder.database.trials() if t.kind == "combination"]
    assert sorted(written) == [3, 3, 33, 33]
