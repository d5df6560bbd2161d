"""Prepared passes: what they launch is what the stages launch, on memory that is theirs, and nothing stale is used.

Triton's interpreter stands for the GPU: the bound launches get addresses, as on a GPU, and make tensors of them again.
"""

import ctypes
import dataclasses
import gc
import threading
import weakref

import pytest
import torch

from sse_tune.compilers.bound import ADDRESS_ALIGNMENT, Pointer
from sse_tune.device import ARCHS
from sse_tune.errors import ConstraintError
from sse_tune.problem import Problem
from sse_tune.runtime import prepared, recording
from sse_tune.runtime.pipeline import Execution, Inputs, gradient_names
from sse_tune.runtime.prepared import Pass, backward_pass, forward_pass
from sse_tune.runtime.recording import record_backward, record_forward, saved_blocks
from sse_tune.runtime.settings import write_problem
from sse_tune.space import Config
from sse_tune.templates.registry import Call, default_plan
from tests.templates.test_triton_interpreted import make_inputs, problem_of

CASES = {
    "gdn": dict(rule="gdn", norm="before", batch=2),
    "gdn in groups": dict(rule="gdn", seq_len=40, outer=dict(chunk_size=16, split=2)),
    "gla": dict(rule="gla", norm="after"),
    "gla recomputed": dict(rule="gla", outer=dict(states="recompute")),
    "plain": dict(rule="gdn", num_partitions=0, top_k=0),
    "alone": dict(rule="gdn", shared=False),
    "forward alone": dict(rule="gdn", direction="fwd"),
}
SCALE = 0.3


def case_of(name, **changes):
    """Problem, plan and inputs."""
    case = {**CASES[name], **changes}
    outer = case.pop("outer", {})
    problem = problem_of(case.pop("rule"), **case)
    plan = default_plan(problem, ARCHS["sm_90"], "triton", _outer(problem, outer))
    return problem, plan, make_inputs(problem, initial=True)


def _outer(problem, changes):
    from sse_tune.templates.stages import GRAPHS

    return GRAPHS["staged"].default(problem, ARCHS["sm_90"]).replace(**changes)


def specs_of(tensors):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def tensor_at(address, dtype):
    """A tensor of one element there; the interpreter reads on from its address."""
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


def bind_interpreter(launch, index):
    names = tuple(launch.args)

    def run(values, stream):
        arguments = {
            name: tensor_at(value, launch.args[name].dtype) if isinstance(launch.args[name], Pointer) else value
            for name, value in zip(names, values)
        }
        launch.kernel[launch.grid](**arguments, num_warps=launch.num_warps, num_stages=launch.num_stages)

    return names, run


@pytest.fixture
def poisoned_blocks(monkeypatch):
    """Memory of bytes is full of NaN (-1 in integers) until it is written."""
    empty = torch.empty

    def allocate(*shape, dtype=None, **more):
        made = empty(*shape, dtype=dtype, **more)
        return made.fill_(255) if dtype == torch.uint8 and made.device.type == "cpu" else made

    monkeypatch.setattr(torch, "empty", allocate)


@pytest.mark.interpret
@pytest.mark.parametrize("name", CASES)
def test_a_pass_gives_what_its_stages_give(name, poisoned_blocks):
    problem, plan, inputs = case_of(name)
    given = inputs.present()
    execution = Execution(plan, problem, inputs, scale=SCALE, output_final_state=True)
    expected = list(execution.forward())
    forward = Pass(record_forward(plan, problem, specs_of(given), SCALE, True), [t.shape for t in expected], bind_interpreter)
    actual = forward.run(list(given.values()))
    assert all(torch.equal(a, e) for a, e in zip(actual.tensors, expected, strict=True))
    if not problem.trains:
        assert actual.saved == []
        return
    more = {"do": torch.randn_like(expected[0]), "d_final_state": torch.randn_like(expected[1])}
    gradients = execution.backward(*more.values())
    shapes = [given[key].shape for key in gradient_names(given)]
    backward = Pass(record_backward(plan, problem, specs_of(given | more), SCALE), shapes, bind_interpreter)
    found = backward.run([*given.values(), *more.values()], actual.saved)
    for key, tensor in zip(gradient_names(given), found.tensors, strict=True):
        assert torch.equal(tensor, gradients[key]), key
