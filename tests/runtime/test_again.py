"""Remembered calls: a second one of the same kind checks and looks up nothing, any other does, and both are right.

Triton's interpreter or launches that do nothing stand for the GPU.
"""

import contextlib
import dataclasses

import pytest
import torch

import sse_tune as st
from sse_tune.device import ARCHS
from sse_tune.errors import ProblemError
from sse_tune.problem import Problem
from sse_tune.runtime import again, autograd, kernel, ops
from sse_tune.runtime.again import Calls, key_of
from sse_tune.runtime.arguments import TENSORS, pose
from sse_tune.runtime.dispatch import Decision
from sse_tune.runtime.kernel import Kernel
from sse_tune.runtime.prepared import Pass, backward_pass, forward_pass
from sse_tune.runtime.settings import write_problem
from sse_tune.templates.registry import default_plan
from tests.runtime.cases import assert_close, exact, make_case, with_gradients
from tests.runtime.test_prepared import bind_interpreter

CASES = {
    "gdn": dict(rule="gdn", seq_len=19, state=True),
    "packed": dict(rule="gla", lengths=(3, 0, 18), partitions=2),
    "plain": dict(rule="gla", partitions=0, seq_len=17, batch=1),
}


def bind_nothing(launch, index):
    return tuple(launch.args), lambda values, stream: None


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The CPU stands for a GPU of sm_90, whose launches do nothing; answers are Triton's default plans."""

    def resolve(fields, device):
        return answers.setdefault((fields, device), answer(fields))

    def answer(fields):
        problem = pose(fields)
        plan = default_plan(problem, ARCHS["sm_90"], "triton")
        return plan.graph, write_problem(problem), plan.to_json()

    answers = {}
    for module in (autograd, again):
        monkeypatch.setattr(module, "is_prepared", lambda tensor: True)
    monkeypatch.setattr(again, "reads_values", lambda device: False)
    monkeypatch.setattr(Pass.__init__, "__defaults__", (bind_nothing,))
    monkeypatch.setattr(ops, "resolve", resolve)
    monkeypatch.setattr(ops, "_resolve", resolve)
    monkeypatch.setattr(ops, "_calls", Calls())
    for cached in (forward_pass, backward_pass):
        cached.cache_clear()
    yield answers
    for cached in (forward_pass, backward_pass):
        cached.cache_clear()


@pytest.fixture
def checked(monkeypatch):
    """Notes each call that is checked."""
    seen = []
    for module in (ops, kernel):
        check = module.check
        monkeypatch.setattr(module, "check", lambda arguments, check=check: seen.append(arguments) or check(arguments))
    return seen


@pytest.mark.interpret
@pytest.mark.parametrize("name", CASES)
def test_the_second_call_gives_what_the_first_does(name, as_on_a_gpu, checked, monkeypatch):
    monkeypatch.setattr(Pass.__init__, "__defaults__", (bind_interpreter,))
    case = make_case(**CASES[name], key=16, value=16)
    case["v"] = case["v"].transpose(1, 2).contiguous().transpose(1, 2)
    first = with_gradients(st.sse_attention, case)
    second = with_gradients(st.sse_attention, case)
    assert len(checked) == 1
    assert_close(second, exact(case), 1e-4)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_call_of_the_same_kind_is_not_checked_again_and_sees_its_own_tensors(as_on_a_gpu, checked, monkeypatch):
    seen = []
    run = Pass.run
    monkeypatch.setattr(Pass, "run", lambda self, tensors, *rest: seen.append(tensors) or run(self, tensors, *rest))
    for seed in (0, 1):
        case = make_case("gdn", seed=seed)
        with torch.no_grad():
            o, state = st.sse_attention(**case)
        assert o.shape == case["v"].shape and state is None
        given = [case.get(name) for name in TENSORS[:-1]]
        assert [t.data_ptr() for t in seen[-1][:-1]] == [t.data_ptr() for t in given if t is not None]
        assert seen[-1][-1].tolist() == [0, 11, 22]
    assert len(checked) == 1 and len(seen) == 2


CHANGES = {
    "another length": dict(case=dict(seq_len=12)),
    "another dtype of the gates": dict(change=lambda case: case | {"g": case["g"].bfloat16()}),
    "another top_k": dict(change=lambda case: case | {"top_k": 1}),
    "another read_k": dict(change=lambda case: case | {"read_k": 3}),
    "a scale": dict(change=lambda case: case | {"scale": 0.5}),
    "no norm": dict(change=lambda case: case | {"qk_l2norm": False}),
    "the gate before it": dict(change=lambda case: case | {"gate_before_norm": True}),
    "the final state": dict(change=lambda case: case | {"output_final_state": True}),
    "an initial state": dict(case=dict(state=True)),
    "no always-on partition": dict(case=dict(shared=False)),
    "packed": dict(change=lambda case: case | {"cu_seqlens": torch.tensor([0, 5, 11])}, case=dict(batch=1)),
    "a gradient": dict(change=lambda case: case | {"v": case["v"].requires_grad_()}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_call_of_another_kind_is_checked(name, as_on_a_gpu, checked):
    st.sse_attention(**make_case("gdn"))
    other = CHANGES[name].get("change", lambda case: case)(make_case("gdn", **CHANGES[name].get("case", {})))
    st.sse_attention(**other)
    assert len(checked) == 2
    o, state = st.sse_attention(**other)
    assert len(checked) == 2
    assert (state is not None) == (name == "the final state")
    assert o.requires_grad == (name == "a gradient")


def test_gradients_are_asked_for_by_mode_too(as_on_a_gpu, checked):
    case = make_case("gdn")
    case["v"].requires_grad_()
    with torch.no_grad():
        assert not st.sse_attention(**case)[0].requires_grad
    assert st.sse_attention(**case)[0].requires_grad
    with torch.no_grad():
        assert not st.sse_attention(**case)[0].requires_grad
    assert len(checked) == 2


def test_what_is_refused_is_refused_again_and_a_bool_is_no_number(as_on_a_gpu):
    case = make_case("gdn")
    st.sse_attention(**case | {"top_k": 1})
    for _ in range(2):
        with pytest.raises(ProblemError):
            st.sse_attention(**case | {"top_k": True})
        with pytest.raises(ProblemError):
            st.sse_attention(**case | {"k": None})
        with pytest.raises(ProblemError):
            st.sse_attention(**case | {"k": [1.0]})


def test_another_answer_is_taken_at_once(as_on_a_gpu, checked):
    case = make_case("gdn")
    for _ in range(2):
        st.sse_attention(**case)
    assert len(checked) == 1
    as_on_a_gpu.clear()  # the databases are looked into anew
    for _ in range(2):
        st.sse_attention(**case)
    assert len(checked) == 2


@pytest.mark.parametrize("reason", ["values are looked at", "heads in groups", "another graph", "no prepared passes"])
def test_what_does_not_run_as_a_prepared_pass_is_not_remembered(reason, as_on_a_gpu, checked, monkeypatch):
    more = {}
    if reason == "values are looked at":
        monkeypatch.setattr(again, "reads_values", lambda device: True)
    elif reason == "heads in groups":
        more = {"head_groups": 2}
    elif reason == "another graph":
        monkeypatch.setattr(ops, "call", lambda *arguments: None)
        resolve = ops.resolve
        for name in ("resolve", "_resolve"):
            monkeypatch.setattr(ops, name, lambda *asked: ("whole", *resolve(*asked)[1:]))
    else:
        monkeypatch.setattr(again, "is_prepared", lambda tensor: False)
    for _ in range(2):
        st.sse_attention(**make_case("gdn"), **more)
    assert len(checked) == 2


def kernel_of_case():
    """One for `make_case("gdn")`."""
    problem = Problem(rule="gdn", seq_len=11, num_heads=2, head_dim=8, head_dim_v=12, num_partitions=3, dtype="fp32",
                      batch=2, norm="after", direction="fwd+bwd")  # fmt: skip
    plan = default_plan(problem, ARCHS["sm_90"], "triton")
    here = dataclasses.replace(ARCHS["sm_90"], kind="cpu")  # a GPU in all but what torch calls it
    return Kernel(problem, here, Decision(plan, "given", "by a test"))


@pytest.mark.parametrize("name", CHANGES)
def test_a_kernel_checks_a_call_of_another_kind(name, as_on_a_gpu, checked):
    own = kernel_of_case()
    own(**make_case("gdn"))
    other = CHANGES[name].get("change", lambda case: case)(make_case("gdn", **CHANGES[name].get("case", {})))
    with contextlib.suppress(ProblemError):  # of another problem than it is for
        own(**other)
    assert len(checked) == 2


def test_a_kernel_remembers_its_own_calls(as_on_a_gpu, checked):
    one, other = kernel_of_case(), kernel_of_case()
    case = make_case("gdn")
    for _ in range(2):
        o, _ = one(**case)
        assert o.shape == case["v"].shape
    assert len(checked) == 1
    other(**case)
    assert len(checked) == 2 and one == other


def test_not_more_is_kept_than_the_limit(as_on_a_gpu, checked, monkeypatch):
    monkeypatch.setattr(again, "_MAX_KNOWN", 2)
    for seq_len in (5, 6, 7, 7, 5):
        st.sse_attention(**make_case("gdn", seq_len=seq_len))
        assert len(ops._calls._known) <= 2
    assert len(checked) == 4


def test_keys_of_calls_that_something_follows_or_with_odd_arguments():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.zeros(2)
    assert key_of((x, None), (1, 0.5, None, True)) is not None
    assert key_of((x,), (1,)) != key_of((x,), (True,)) != key_of((x,), (1.0,))
    assert key_of((x,), (torch.tensor(1),)) is None
    assert key_of(([1.0],), (1,)) is None
    with FakeTensorMode() as mode:
        assert key_of((x,), (1,)) is None
    assert key_of((mode.from_tensor(x),), (1,)) is None
    seen = []
    torch.func.grad(lambda x: seen.append(key_of((x,), (1,))) or x.sum())(x)
    assert seen == [None]
