"""Real Triton kernels that hang, write out of bounds, lie or race: each costs one trial, with its reason, on the GPU.

They go the way of a search: compiled ahead, claimed, run in a worker under a deadline, recorded. What needs no GPU of
it, the same way with the same kernels, runs in Triton's interpreter.
"""

import contextlib
import dataclasses
import importlib
import itertools
import pathlib
import re
import types

import pytest
import triton

from sse_tune.database.store import TuningDatabase
from sse_tune.device import ARCHS
from sse_tune.problem import Problem
from sse_tune.templates.registry import default_plan
from sse_tune.tuning import ahead, evaluate, jobs
from sse_tune.tuning.candidates import Candidate, Settings
from sse_tune.tuning.engine import Engine
from sse_tune.tuning.evaluate import Evaluator
from sse_tune.tuning.landscape import Templates
from sse_tune.tuning.lanes import Lanes
from sse_tune.tuning.machine import compilers_for, detect
from sse_tune.tuning.recorder import Recorder
from sse_tune.tuning.strategy import Decomposed
from sse_tune.tuning.worker import Worker

PROBLEM = Problem(
    rule="gla", seq_len=2048, num_heads=4, head_dim=64, num_partitions=4, top_k=2, norm="after", dtype="bf16"
)
OUTCOMES = {
    "none": ("ok", None),
    "hangs": ("timeout", "no answer within 5 s"),
    "out_of_bounds": ("crash", "case ordinary: .*illegal memory access"),
    "late_out_of_bounds": ("crash", "while it was timed: .*illegal memory access"),
    "wrong_gradient": ("wrong", "case ordinary: d_v: relative error .* > "),
    "unordered": ("wrong", "case ordinary: d_v: other bits on a repeat with the same inputs"),
    "overwritten_in_flight": ("rejected", "overwritten_in_flight_kernel: .* overwrites a slot of .* may still read"),
}
# each that costs the process is followed by one that must be timed well
ORDER = (
    ("none", 4), ("hangs", 4), ("none", 2), ("wrong_gradient", 4), ("unordered", 4), ("overwritten_in_flight", 4),
    ("out_of_bounds", 4), ("late_out_of_bounds", 4), ("none", 8),
)  # fmt: skip
COSTS_THE_PROCESS = ("hangs", "out_of_bounds", "late_out_of_bounds")
triton_3_6 = triton.__version__.startswith("3.6.")


class Impatient(Evaluator):
    """Waits less long for the candidate that hangs; the others have their time, also in a worker that is new."""

    def job(self, candidate, give_up_us, confirm_us):
        job = super().job(candidate, give_up_us, confirm_us)
        hangs = any(choice.config.get("fault") == "hangs" for choice in candidate.plan.stages.values())
        return dataclasses.replace(job, deadline_s=5.0) if hangs else job


@dataclasses.dataclass
class Story:
    """What became of the candidates: fault and warps -> the trial, and the worker's process number after it."""

    trials: dict
    pids: dict
    plans: list
    starts: int
    refused: set


@pytest.fixture
def planted(monkeypatch):
    """The planted backend: here, in the worker that measures and in those that compile."""
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent))
    module = importlib.import_module("planted_triton")
    named = ("check_and_time", "check_and_time_stage")
    stand_in = types.SimpleNamespace(**{**vars(jobs), **{name: getattr(module, name) for name in named}})
    monkeypatch.setattr(evaluate, "jobs", stand_in)
    monkeypatch.setattr(ahead, "compile_choice", module.compile_choice)
    with module.installed():
        yield module


def candidate_of(planted, base, fault, num_warps=4):
    choice = base.stages[planted.STAGE]
    config = choice.config.replace(fault=fault, num_warps=num_warps)
    plan = base.replace_stage(planted.STAGE, dataclasses.replace(choice, config=config))
    return Candidate("stage", plan, base, planted.STAGE)


def tell(planted, problem, device, path, order, *, search=True):
    """Runs candidates in their order, each once; then lets the strategy of a search go over the whole space."""
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(TuningDatabase(path / "tuning.db"))
        worker = Worker()
        lanes = Lanes([worker])
        stack.callback(lanes.close)
        device = detect(lanes, device)
        study = database.open_study("key", problem, device, {})
        recorder = Recorder(database, study, problem, resume=False, budget_s=3600)
        stack.callback(recorder.close)
        compilers = compilers_for((planted.BACKEND,), device)
        if compilers is not None:
            stack.enter_context(compilers)
        engine = Engine(Impatient(problem, device, recorder), compilers, lanes)
        base = default_plan(problem, device, planted.BACKEND)
        candidates = {key: candidate_of(planted, base, *key) for key in order}
        engine.compile(Candidate("plan", base))
        for candidate in candidates.values():
            engine.compile(candidate)
        pids = {}
        for key, candidate in candidates.items():
            engine.evaluate(candidate)
            pids[key] = worker.pid
        plans, starts = [], worker.starts
        if search:
            strategy = Decomposed(
                Templates(problem, device, (planted.BACKEND,)), Settings(sampler="exhaustive", max_points=1)
            )
            engine.run(strategy, 1.0)
            plans = strategy.plans()
        trials = {}
        for trial in database.trials():
            config = trial.plan["stages"][planted.STAGE]["config"]
            key = (config["fault"], config["num_warps"])
            if trial.kind == "stage":
                assert key not in trials, "no candidate is run twice"
                trials[key] = trial
            else:
                assert key[0] == "none", "no bad one becomes part of a plan"
        return Story(trials, pids, plans, starts, {record.config["fault"] for record in database.quarantined()})


def assert_caught(planted, story, order, outcomes):
    assert set(story.trials) == set(order)
    for (fault, warps), trial in story.trials.items():
        outcome, reason = outcomes[fault]
        assert trial.outcome == outcome, (fault, warps, trial.outcome, trial.reason)
        assert reason is None or re.search(reason, trial.reason), trial.reason
        if fault == "none":
            assert trial.time_us > 0
            assert story.pids[fault, warps] is not None
        else:
            assert trial.time_us is None
            assert trial.timings_us == ()
        # whoever may have harmed its process takes it away
        assert (story.pids[fault, warps] is None) == (fault in COSTS_THE_PROCESS)
    living = [pid for pid in story.pids.values() if pid is not None]
    changes = sum(a != b for a, b in itertools.pairwise(living))
    losses = [i for i, (fault, _) in enumerate(order) if fault in COSTS_THE_PROCESS]
    assert changes == sum(i + 1 not in losses for i in losses), "after each loss another process measures"
    assert story.starts == 1 + len(losses)
    quarantined = {fault for fault, _ in order if outcomes[fault][0] in evaluate.QUARANTINED}
    assert story.refused == quarantined, "what hangs may be the machine's fault, and is tried again another time"


@pytest.mark.gpu
def test_each_is_caught_with_its_reason(planted, tmp_path):
    order = [key for key in ORDER if triton_3_6 or key[0] != "overwritten_in_flight"]
    story = tell(planted, PROBLEM, "cuda", tmp_path, order)
    assert_caught(planted, story, order, OUTCOMES)
    assert story.plans, "the search goes on, and answers with plans"
    assert {plan.stages[planted.STAGE].config["fault"] for plan in story.plans} == {"none"}


@pytest.mark.interpret
def test_the_same_in_the_interpreter(planted, tmp_path):
    """All but what needs a GPU: its errors, a compiler, and blocks that run side by side."""
    device = dataclasses.replace(ARCHS["sm_90"], kind="cpu")
    problem = PROBLEM.replace(seq_len=32, num_heads=1, head_dim=16, num_partitions=2, top_k=1, dtype="fp32")
    order = [key for key in ORDER if key[0] in ("none", "hangs", "out_of_bounds", "wrong_gradient")]
    story = tell(planted, problem, device, tmp_path, order, search=False)
    killed = ("crash", "the worker process was lost: killed by SIGSEGV")
    assert_caught(planted, story, order, {**OUTCOMES, "out_of_bounds": killed})


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="Triton interprets: there is nothing to compile")
def test_the_compiler_sees_the_race_and_nothing_else(planted):
    device = ARCHS["sm_90"]
    base = default_plan(PROBLEM, device, planted.BACKEND)
    with ahead.CompileAhead(device, size=1) as compilers:
        for fault in planted.FAULTS:
            choice = candidate_of(planted, base, fault).plan.stages[planted.STAGE]
            answer = compilers.submit(choice, PROBLEM, base.outer).result()
            expected = "rejected" if fault == "overwritten_in_flight" and triton_3_6 else "ok"
            assert answer.outcome == expected, (fault, answer)
            assert expected == "ok" or re.search(OUTCOMES[fault][1], answer.reason)
