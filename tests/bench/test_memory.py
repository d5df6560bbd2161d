"""What runs out of memory is noted and its memory freed; what fails otherwise fails."""

import weakref

import pytest
import torch

from sse_tune.bench import memory, plans, sides
from sse_tune.bench.memory import LeftOut, leaving_out
from sse_tune.bench.sides import GRAPH, Side, time_what_fits
from sse_tune.device import Device
from sse_tune.problem import Problem
from sse_tune.templates.registry import default_plan
from sse_tune.templates.roofline import Ceilings
from sse_tune.tuning.inputs import workload
from sse_tune.tuning.measure import Calls, Timing

CPU = Device.detect("cpu")


def test_the_reason_says_how_much_was_asked_for_and_what_it_held_is_free(monkeypatch):
    held, alive = [], []

    def call():
        tensor = torch.zeros(8)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB. GPU 0 has 79 GiB. See the manual")

    monkeypatch.setattr(memory.gc, "collect", lambda: alive.append(held[0]()))
    left_out = []
    with leaving_out("best", "fwd", left_out):
        call()
    assert left_out == [
        LeftOut("best", "fwd", "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 MiB"),
    ]
    assert alive == [None]


def test_other_failures_go_on():
    with pytest.raises(ZeroDivisionError), leaving_out("best", "fwd", []):
        raise ZeroDivisionError


def test_a_call_that_does_not_fit_has_no_replay_and_a_replay_that_does_not_leaves_the_call(monkeypatch):
    problem = Problem(rule="gdn", seq_len=8, num_heads=1, head_dim=8, dtype="fp32", direction="fwd")
    case, plan = workload(problem, "cpu"), default_plan(problem, CPU)
    monkeypatch.setattr(sides, "in_graph", lambda plan, device: True)

    def no_memory(*arguments):
        raise MemoryError

    monkeypatch.setattr(sides.measure, "captured", no_memory)
    left_out = []
    (side,) = sides.own_sides("best", plan, problem, CPU, case, None, left_out)
    assert side.name == "best"
    assert [(part.name, part.direction) for part in left_out] == [("best, graph", "fwd")]
    monkeypatch.setattr(sides, "peak_bytes", no_memory)
    left_out.clear()
    assert sides.own_sides("best", plan, problem, CPU, case, None, left_out) == []
    assert [part.name for part in left_out] == ["best"]


@pytest.mark.parametrize(("most", "timed"), [(3, ["a", "a, graph", "b"]), (2, ["a", "b"]), (1, [])])
def test_replays_give_way_where_the_calls_do_not_fit_beside_them(monkeypatch, most, timed):
    def compare_calls(calls, where, *, time_limit_s):
        if len(calls) > most:
            raise MemoryError("planted")
        return {name: Calls(Timing((1.0,))) for name in calls}

    monkeypatch.setattr(sides, "compare_calls", compare_calls)
    made = [Side(name, "fwd", lambda: None) for name in ("a", "a" + GRAPH, "b")]
    left_out = []
    results = time_what_fits(made, "cpu", 0.1, left_out)
    assert [result.name for result in results] == timed
    assert {part.name for part in left_out} == {"a", "a, graph", "b"} - set(timed)
    assert all("planted" in part.reason for part in left_out)
    assert [side.name for side in made] == timed


def test_inputs_of_the_problem_before_are_gone_before_the_next_are_made(monkeypatch):
    kept = []
    monkeypatch.setattr(plans, "free", lambda: kept.append(workload.cache_info().currsize))
    problem = Problem(rule="gla", seq_len=8, num_heads=1, head_dim=8, dtype="fp32", direction="fwd")
    for seq_len in (8, 9):
        plans.bench(problem.replace(seq_len=seq_len), CPU, time_limit_s=0.01, ceilings=Ceilings(1e10, 1e11))
    assert kept == [0, 0]
    assert workload.cache_info().currsize == 1


def test_a_forward_problem_has_no_gradient_in_memory():
    problem = Problem.preset("demo", seq_len=64, direction="fwd")
    forward, both = workload(problem, "cpu"), workload(problem.replace(direction="fwd+bwd"), "cpu")
    assert forward.do.shape == both.do.shape
    assert forward.do.untyped_storage().nbytes() <= 8
    assert torch.equal(forward.inputs.v, both.inputs.v)
