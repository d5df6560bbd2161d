"""Stages get what they read, buffers live no longer than they must, and operators hand gradients to their inputs."""

import pytest
import torch
import torch.utils.checkpoint

from sse_tune.problem import Problem
from sse_tune.runtime import pipeline
from sse_tune.runtime.arguments import Arguments, check, flatten, pose
from sse_tune.runtime.call import call
from sse_tune.runtime.pipeline import Execution, saved_names
from sse_tune.runtime.settings import write_problem
from sse_tune.templates.buffers import BUFFERS
from tests.runtime.cases import assert_close, exact, make_case, with_gradients
from tests.runtime.fake_stages import Fakes, plan_of

CASES = {
    "gdn": dict(rule="gdn"),
    "gla": dict(rule="gla"),
    "states": dict(rule="gdn", state=True),
    "packed": dict(rule="gla", lengths=(5, 0, 7), state=True),
    "alone": dict(rule="gdn", shared=False),
    "plain": dict(rule="gdn", partitions=0, state=True),
    "plain gla": dict(rule="gla", partitions=0),
}
NONE = dict.fromkeys(
    (
        "top_k", "beta", "shared_q", "shared_k", "shared_g", "shared_beta", "scale", "read_k", "initial_state",
        "cu_seqlens",
    )
)


@pytest.fixture
def fakes(monkeypatch):
    found = Fakes()
    monkeypatch.setattr(pipeline, "find_template", found.find)
    return found


def arguments_of(case):
    return Arguments(**{**NONE, "qk_l2norm": False, "gate_before_norm": False, "output_final_state": True, **case})


def staged(**given):
    """`sse_attention` by the fake stages."""
    arguments = arguments_of(given)
    problem = pose(check(arguments))
    return call(arguments, "staged", write_problem(problem), plan_of(problem).to_json())


@pytest.mark.parametrize("name", CASES)
def test_operators_give_the_reference_and_its_gradients(name, fakes):
    case = make_case(**CASES[name])
    assert_close(with_gradients(staged, case), exact(case))


def test_gradients_come_in_the_dtype_of_each_input(fakes):
    case = make_case("gdn", state=True)
    given = {
        name: item.to(torch.bfloat16) if name in ("q", "k", "v", "shared_q", "shared_k", "router_logits") else item
        for name, item in case.items()
        if torch.is_tensor(item)
    }
    leaves = {name: tensor.requires_grad_() for name, tensor in given.items()}
    o, final_state = staged(**{**case, **leaves})
    (o.float().sum() + final_state.sum()).backward()
    assert o.dtype == torch.bfloat16 and final_state.dtype == torch.float32
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape, name


def test_a_loss_of_the_state_alone_has_gradients(fakes):
    case = make_case("gdn")
    case["v"].requires_grad_()
    _, final_state = staged(**case)
    final_state.sum().backward()
    assert case["v"].grad.abs().sum() > 0


@pytest.mark.parametrize("name", CASES)
def test_buffers_live_until_their_last_reader(name, fakes, poisoned_empty):
    arguments = arguments_of(make_case(**CASES[name]))
    problem = pose(check(arguments)).replace(direction="fwd+bwd")
    inputs = flatten(arguments)
    execution = Execution(
        plan_of(problem), problem, inputs, scale=0.3, output_final_state=True, allocate=poisoned_empty
    )
    o, _ = execution.forward()
    assert not o.isnan().any()
    assert {n for n in execution.tensors if n in BUFFERS} == set(saved_names(plan_of(problem), problem))
    assert "o_rows" not in saved_names(plan_of(problem), problem) and "P" in saved_names(plan_of(problem), problem)
    gradients = execution.backward(torch.ones_like(o))
    assert not any(name in BUFFERS for name in execution.tensors)
    present = inputs.present()
    assert list(gradients) == [name for name in present if name != "cu_seqlens"]
    for name, gradient in gradients.items():
        assert gradient.shape == present[name].shape and gradient.dtype == present[name].dtype
        assert not gradient.isnan().any(), name


def test_inference_keeps_nothing(fakes):
    arguments = arguments_of(make_case("gla"))
    problem = pose(check(arguments))
    assert problem.direction == "fwd" and saved_names(plan_of(problem), problem) == ()
    execution = Execution(plan_of(problem), problem, flatten(arguments), scale=1.0)
    _, final_state = execution.forward()
    assert final_state is None
    assert not any(name in BUFFERS for name in execution.tensors)
    assert "A" not in fakes.alive["combine"]


def test_a_kept_stage_runs_again(fakes):
    arguments = arguments_of(make_case("gdn"))
    problem = pose(check(arguments)).replace(direction="fwd+bwd")
    execution = Execution(plan_of(problem), problem, flatten(arguments), scale=0.3, keep=True)
    o, _ = execution.forward()
    before = o.clone()
    o.zero_()
    execution.run_stage("combine")
    assert torch.equal(o, before)


def test_a_plain_stream_stands_in_for_the_shared_one(fakes):
    inputs = flatten(arguments_of(make_case("gdn", partitions=0)))
    problem = Problem(rule="gdn", seq_len=11, batch=2, num_heads=2, head_dim=8, head_dim_v=12, num_partitions=0,
                      top_k=0, dtype="fp32", norm="after")  # fmt: skip
    execution = Execution(plan_of(problem), problem, inputs, scale=0.3)
    assert all(execution.tensors[f"shared_{n}"] is execution.tensors[n] for n in ("q", "k", "g", "beta"))


def test_whole_graph_is_an_execution_too(poisoned_empty):
    from sse_tune.device import Device
    from sse_tune.templates.registry import default_plan

    case = make_case("gdn", state=True)
    arguments = arguments_of(case)
    problem = pose(check(arguments)).replace(direction="fwd+bwd")
    plan = default_plan(problem, Device.detect("cpu"))
    execution = Execution(plan, problem, flatten(arguments), scale=8**-0.5, output_final_state=True)
    o, final_state = execution.forward()
    generator = torch.Generator().manual_seed(1)
    do = torch.randn(case["v"].shape, generator=generator).flatten(0, 1)
    gradients = execution.backward(do, torch.randn(final_state.shape, generator=generator))
    expected = exact(case)
    assert_close({"d_" + n: g.reshape(expected["d_" + n].shape) for n, g in gradients.items()},
                 {n: g for n, g in expected.items() if n.startswith("d_")})  # fmt: skip


def test_checkpointing_computes_the_forward_pass_again(fakes):
    case = make_case("gdn", state=True)

    def checkpointed(**given):
        return torch.utils.checkpoint.checkpoint(lambda: staged(**given), use_reentrant=False)

    assert_close(with_gradients(checkpointed, case), exact(case))


def test_a_second_derivative_is_refused(fakes):
    case = make_case("gdn")
    case["v"].requires_grad_()
    (gradient,) = torch.autograd.grad(staged(**case)[0].sum(), case["v"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()
