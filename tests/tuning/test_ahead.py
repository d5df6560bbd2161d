"""Compilation ahead: what is handed to the compilers, and that it is what a check will run."""

import concurrent.futures
import os
import threading

from sse_tune.database.store import TuningDatabase
from sse_tune.device import ARCHS, Device
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.templates.registry import default_plan
from sse_tune.tuning.ahead import CompileAhead, Compiled
from sse_tune.tuning.candidates import Candidate
from sse_tune.tuning.cases import CASES, case_names, case_problem
from sse_tune.tuning.evaluate import Evaluator
from sse_tune.tuning.machine import compilers_for
from sse_tune.tuning.recorder import Recorder

DEVICE = ARCHS["sm_90"]
PROBLEM = Problem.preset("spikingbrain2-5b")


class Noted(CompileAhead):
    """Compiles nothing and remembers what it was asked for."""

    def __init__(self):
        super().__init__(DEVICE, 1)
        self.asked = set()

    def submit(self, choice, problem, outer, *, with_states=False):
        self.asked.add((choice, problem, outer, with_states))
        done = concurrent.futures.Future()
        done.set_result(Compiled("ok", None, {}))
        return done


def default_of(problem):
    return default_plan(problem, DEVICE, "triton")


def test_every_stage_of_every_case_is_compiled():
    names = case_names(PROBLEM, quick=False, scale="full")
    with Noted() as ahead:
        submitted = ahead.submit_cases(default_of, PROBLEM, 64, names, "full")
    expected = set()
    for name in names:
        posed, _ = case_problem(name, PROBLEM, 64, "full")
        plan = default_of(posed)
        expected |= {(choice, posed, plan.outer, CASES[name].states) for choice in plan.stages.values()}
    assert ahead.asked == expected
    assert len(submitted) >= len(expected)


def test_it_takes_the_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(3, 9)), raising=False)
    with CompileAhead(DEVICE) as ahead:
        assert ahead.size == 4


def test_cases_that_do_not_apply_are_left_out():
    plan = default_of(PROBLEM)
    with Noted() as ahead:
        assert not ahead.submit_cases(lambda posed: plan, PROBLEM, 64, ("sizes_24_40",), "full")
        assert ahead.submit_cases(lambda posed: plan, PROBLEM, 64, ("gates",), "full")


def test_the_torch_backend_has_nothing_to_compile():
    def whole(posed) -> Plan:
        return default_plan(posed, DEVICE, "torch")

    with Noted() as ahead:
        assert not ahead.submit_cases(whole, PROBLEM, 64, ("gates",), "full")


def test_a_stage_is_compiled_in_another_process():
    plan = default_of(PROBLEM)
    with CompileAhead(DEVICE, 1) as ahead:
        compiled = ahead.submit(plan.stages["combine"], PROBLEM, plan.outer).result()
    assert compiled.outcome == "ok"
    assert compiled.resources["registers"] > 0


def test_what_is_withdrawn_before_it_began_is_not_compiled():
    """What a process is at goes on, what waits behind it is gone, and is compiled where it is asked for again."""
    began, go_on, compiled = threading.Event(), threading.Event(), []

    class Waiting(CompileAhead):
        def _compile(self, choice, *_):
            began.set()
            go_on.wait(20)
            compiled.append(choice)
            return Compiled("ok", None, {})

    plan = default_of(PROBLEM)
    running, waiting, other = (plan.stages[name] for name in ("combine", "scan", "prepare"))
    with Waiting(DEVICE, 1) as ahead:
        first, second = ahead.submit(running, PROBLEM, plan.outer), ahead.submit(waiting, PROBLEM, plan.outer)
        began.wait(20)
        ahead.withdraw([first, second])
        assert second.cancelled() and not first.cancelled()
        third = ahead.submit(other, PROBLEM, plan.outer)
        go_on.set()
        assert third.result(20).outcome == first.result(20).outcome == "ok"
        assert compiled == [running, other]
        assert ahead.submit(waiting, PROBLEM, plan.outer).result(20).outcome == "ok"


def test_what_is_urgent_comes_first_even_where_it_was_asked_for_before():
    began, go_on, compiled = threading.Event(), threading.Event(), []

    class Waiting(CompileAhead):
        def _compile(self, choice, *_):
            began.set()
            go_on.wait(20)
            compiled.append(choice)
            return Compiled("ok", None, {})

    plan = default_of(PROBLEM)
    running, first, second, third = (plan.stages[name] for name in ("combine", "scan", "prepare", "routing"))
    with Waiting(DEVICE, 1) as ahead:
        ahead.submit(running, PROBLEM, plan.outer)
        began.wait(20)
        waiting = [ahead.submit(choice, PROBLEM, plan.outer) for choice in (first, second, third)]
        again = ahead.submit(third, PROBLEM, plan.outer, urgent=True)
        assert again is waiting[2], "one compilation, asked for twice"
        go_on.set()
        assert all(future.result(20).outcome == "ok" for future in waiting)
    assert compiled == [running, third, first, second]


def test_closing_ends_what_waits():
    began, go_on = threading.Event(), threading.Event()

    class Waiting(CompileAhead):
        def _compile(self, choice, *_):
            began.set()
            go_on.wait(20)
            return Compiled("ok", None, {})

    plan = default_of(PROBLEM)
    with Waiting(DEVICE, 1) as ahead:
        first = ahead.submit(plan.stages["combine"], PROBLEM, plan.outer)
        second = ahead.submit(plan.stages["scan"], PROBLEM, plan.outer)
        began.wait(20)
        threading.Timer(0.2, go_on.set).start()
    assert first.result(0).outcome == "ok"
    assert second.cancelled()


def test_there_is_a_compiler_for_every_backend_that_needs_one():
    for backends in (("triton",), ("tilelang",), ("tilelang", "triton")):
        with compilers_for(backends, DEVICE) as ahead:
            assert ahead.device == DEVICE
    assert compilers_for(("torch",), DEVICE) is None
    assert compilers_for(("triton",), Device.detect("cpu")) is None


def test_a_whole_plan_that_must_not_run_is_refused(tmp_path):
    """A racy kernel may pass admission by luck: what the compiler says counts for plans as for stages."""

    def said(outcome, reason, registers):
        future = concurrent.futures.Future()
        future.set_result(Compiled(outcome, reason, {"registers": registers}))
        return future

    with TuningDatabase(tmp_path / "tuning.db") as database:
        study = database.open_study("0" * 32, PROBLEM, DEVICE, {})
        recorder = Recorder(database, study, PROBLEM, resume=False, budget_s=60)
        evaluator = Evaluator(PROBLEM, DEVICE, recorder)
        candidate = Candidate("plan", default_plan(PROBLEM, DEVICE))
        fine = [said("ok", None, 100), said("ok", None, 200)]
        attempt, resources = evaluator.refusal(candidate, fine)
        assert (attempt.outcome, resources) == ("ok", {"registers": 200})
        attempt, _ = evaluator.refusal(candidate, [*fine, said("rejected", "a race", 90)])
        assert (attempt.outcome, attempt.reason) == ("rejected", "a race")
        recorder.close()
