"""Heads in groups: the results are those of all heads at once, and no group's memory outlives it."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sse_tune as st
from sse_tune.errors import ProblemError
from sse_tune.problem import Problem
from sse_tune.runtime import head_groups, pipeline
from sse_tune.runtime.arguments import check, pose
from sse_tune.runtime.kernel import load_best
from tests.runtime.cases import assert_close, exact, make_case, with_gradients
from tests.runtime.fake_stages import Fakes
from tests.runtime.test_pipeline import arguments_of, staged

CASES = {
    "gdn": dict(rule="gdn", state=True),
    "gla": dict(rule="gla"),
    "packed": dict(rule="gla", lengths=(5, 0, 7), state=True),
    "alone": dict(rule="gdn", shared=False),
    "plain": dict(rule="gdn", partitions=0, state=True),
}


@pytest.fixture
def fakes(monkeypatch):
    found = Fakes()
    monkeypatch.setattr(pipeline, "find_template", found.find)
    return found


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_whole_graph_in_groups(name, groups):
    case = make_case(**CASES[name], heads=4)
    assert_close(with_gradients(st.sse_attention, case, head_groups=groups), exact(case))


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_stages_in_groups(name, groups, fakes, monkeypatch):
    """Each group's stages see its heads alone."""
    case = make_case(**CASES[name], heads=4)
    seen, find = [], fakes.run

    def run(stage, call, tensors):
        seen.append(tensors["q"].shape[1])
        find(stage, call, tensors)

    monkeypatch.setattr(fakes, "run", run)
    assert_close(with_gradients(staged, case, head_groups=groups), exact(case))
    assert set(seen) == {4 // groups}


def test_the_operators_in_groups(fakes):
    """Where something looks on, groups are calls of the operators."""
    case = make_case("gdn", heads=4, state=True)

    names = []

    class Looker(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Looker():
        o, _ = staged(**case, head_groups=2)
    assert names.count("sse_tune.forward.default") == 2
    torch.testing.assert_close(o, staged(**case)[0])


def test_without_gradients_nothing_is_kept(fakes):
    case = make_case("gdn", heads=4, state=True)
    o, state = staged(**case, head_groups=2)
    assert not o.requires_grad
    wanted = exact(case)
    torch.testing.assert_close(o, wanted["o"].float())
    torch.testing.assert_close(state, wanted["final_state"].float())


def test_gradients_of_16_bit_logits_are_summed_in_fp32(fakes):
    """A sum of 16-bit numbers, a small one after large ones that cancel: bf16 would lose it."""
    pieces = [torch.tensor([x], dtype=torch.bfloat16) for x in (256.0, 1.0, -256.0)]
    assert head_groups._joined("router_logits", pieces).item() == 1.0


def test_inputs_need_not_be_contiguous(fakes):
    case = make_case("gdn", heads=4)
    turned = {
        name: x.transpose(0, 1).contiguous().transpose(0, 1) if torch.is_tensor(x) else x for name, x in case.items()
    }
    assert_close(with_gradients(staged, turned, head_groups=2), exact(case))


def test_a_second_backward_pass_gives_the_same(fakes):
    case = make_case("gdn", heads=4)
    case["v"].requires_grad_()
    o, _ = staged(**case, head_groups=2)
    first = torch.autograd.grad(o.square().sum(), case["v"], retain_graph=True)
    second = torch.autograd.grad(o.square().sum(), case["v"])
    assert torch.equal(first[0], second[0])


def test_second_derivatives_are_refused(fakes):
    case = make_case("gdn", heads=4)
    case["v"].requires_grad_()
    o, _ = staged(**case, head_groups=2)
    (d_v,) = torch.autograd.grad(o.square().sum(), case["v"], create_graph=True)
    with pytest.raises(RuntimeError):
        d_v.sum().backward()


@pytest.mark.parametrize("groups", [0, -2, 3, True, 2.0, "2"])
def test_groups_that_do_not_divide_the_heads_are_refused(groups):
    case = make_case("gla", heads=4)
    with pytest.raises(ProblemError, match="head_groups"):
        st.sse_attention(**case, head_groups=groups)


def test_a_kernel_of_one_group_runs_all():
    case = make_case("gla", heads=4, key=8, value=12)
    problem = Problem(
        rule="gla", seq_len=11, batch=2, num_heads=2, head_dim=8, head_dim_v=12, num_partitions=3, top_k=2,
        dtype="fp32", direction="fwd",
    )  # fmt: skip
    kernel = load_best(problem, "cpu")
    o, _ = kernel(**case, head_groups=2)
    torch.testing.assert_close(o, exact(case)["o"].float())
    with pytest.raises(ProblemError, match="num_heads=4 instead of 2"):
        kernel(**case)


def test_a_group_is_a_problem_of_fewer_heads():
    arguments = arguments_of(make_case("gdn", heads=4))
    whole, part = (pose(check(dataclasses.replace(arguments, head_groups=groups))) for groups in (1, 4))
    assert part == whole.replace(num_heads=1)


@pytest.mark.parametrize("groups", [2, 4])
def test_one_group_is_kept_for_the_backward_pass(groups, fakes, monkeypatch):
    """The last one, with which the backward pass begins; the others' forward pass is run again, once each."""
    case = make_case("gdn", heads=4)
    kept, order, find = [], [], fakes.run
    for name in ("q", "shared_q"):
        case[name].requires_grad_()

    def run(stage, call, tensors):
        if stage in ("scan", "gradients"):
            order.append((stage, float(tensors["q"].flatten()[0])))
        find(stage, call, tensors)

    monkeypatch.setattr(fakes, "run", run)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        staged(**case)
        of_one = len(kept)
        order.clear()
        o, _ = staged(**case, head_groups=groups)
    assert len(kept) == 2 * of_one
    o.sum().backward()
    firsts = [float(case["q"].detach()[0, 0, group * 4 // groups, 0]) for group in range(groups)]
    again = [item for first in reversed(firsts[:-1]) for item in (("scan", first), ("gradients", first))]
    assert order == [*(("scan", first) for first in firsts), ("gradients", firsts[-1]), *again]
