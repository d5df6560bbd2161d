"""Sides are timed in turn, by the call a user makes; our own call is the operation."""

import pytest
import torch

from sse_tune.bench import sides
from sse_tune.bench.sides import Side
from sse_tune.device import Device
from sse_tune.problem import Problem
from sse_tune.templates.registry import default_plan
from sse_tune.tuning.compare import exact
from sse_tune.tuning.jobs import workload
from sse_tune.tuning.measure import Calls, Timing

CPU = Device.detect("cpu")


def test_all_sides_are_timed_in_turn_those_of_one_direction_beside_each_other():
    calls = []

    def side(name, direction):
        return Side(name, direction, lambda: calls.append((name, direction)), len(name))

    made = [side("a", "fwd"), side("a", "fwd+bwd"), side("b", "fwd"), side("b", "fwd+bwd"), side("c", "fwd")]
    results = sides.time_sides(made, "cpu", time_limit_s=0.01)
    order = [("a", "fwd"), ("b", "fwd"), ("c", "fwd"), ("a", "fwd+bwd"), ("b", "fwd+bwd")]
    assert [(result.name, result.direction) for result in results] == order
    assert len(calls) >= 6 * len(order)  # once to warm up, then at least five times
    assert calls == order * (len(calls) // len(order))
    # outliers are measured again: a round may leave a time out
    assert all(5 <= len(result.timing.times_us) < len(calls) // len(order) for result in results)
    assert results[0].to_dict().keys() == {"median_us", "noise_us", "repeats", "idle_us", "peak_bytes"}
    assert results[0].to_dict()["idle_us"] is None


def test_calls_behind_others_stand_beside_those_on_an_idle_gpu(monkeypatch):
    found = Calls(Timing((1.0, 2.0, 3.0)), Timing((5.0, 4.0, 9.0)))
    monkeypatch.setattr(sides, "compare_calls", lambda calls, where, time_limit_s: dict.fromkeys(calls, found))
    (result,) = sides.time_sides([Side("a", "fwd", lambda: None, 7)], "cuda", 1.0)
    assert (result.timing, result.idle) == (found.timing, found.idle)
    noise_us = found.timing.noise_us
    assert result.to_dict() == {
        "median_us": 2.0, "noise_us": noise_us, "repeats": 3, "idle_us": 5.0, "peak_bytes": 7
    }  # fmt: skip


def test_memory_is_not_known_on_a_cpu_but_a_call_that_fails_fails_there():
    calls = []
    assert sides.peak_bytes(lambda: calls.append(1), CPU) is None
    assert calls
    with pytest.raises(ZeroDivisionError):
        sides.peak_bytes(lambda: 1 / 0, CPU)


@pytest.mark.parametrize(
    "more",
    [{}, {"batch": 2}, {"num_sequences": 3}, {"shared": False, "read_k": 3}, {"num_partitions": 0, "top_k": 0}],
    ids=str,
)
@pytest.mark.parametrize("rule", ["gla", "gdn"])
def test_our_side_is_the_operation_in_both_directions(rule, more):
    problem = Problem(rule=rule, seq_len=20, num_heads=2, head_dim=8, norm="after", dtype="fp32", **more)
    case = workload(problem, "cpu")
    expected = exact(case).results
    calls = sides.own_calls(default_plan(problem, CPU), problem, CPU, case)
    found = calls["fwd+bwd"]()
    assert set(found) == set(expected)
    for name, x in expected.items():
        torch.testing.assert_close(found[name].double().reshape(x.shape), x, rtol=1e-3, atol=1e-4)
    forward = problem.replace(direction="fwd")
    (side,) = sides.own_sides("default", default_plan(forward, CPU), forward, CPU, case, sides.graph_pool(CPU), [])
    assert (side.direction, side.peak_bytes) == ("fwd", None)
    torch.testing.assert_close(side.call(), found["o"], rtol=1e-3, atol=1e-4)


def test_a_forward_problem_is_measured_forward_only():
    assert sides.directions_of(Problem.preset("demo", direction="fwd")) == ("fwd",)
    assert sides.directions_of(Problem.preset("demo")) == ("fwd", "fwd+bwd")
