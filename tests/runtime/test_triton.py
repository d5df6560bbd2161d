"""The operation on Triton kernels: in the interpreter on the CPU, and on a GPU captured in a CUDA graph."""

import pytest
import torch

import sse_tune as st
from sse_tune.device import Device
from sse_tune.runtime.arguments import check, pose
from sse_tune.runtime.call import call
from sse_tune.runtime.settings import write_problem
from sse_tune.templates.registry import default_plan
from sse_tune.tuning import measure
from tests.runtime.cases import assert_close, exact, make_case, with_gradients
from tests.runtime.test_pipeline import arguments_of

CASES = {
    "gdn": dict(rule="gdn", seq_len=19, state=True),
    "gla": dict(rule="gla", seq_len=19, state=True),
    "packed": dict(rule="gdn", lengths=(3, 0, 18), partitions=2),
    "plain": dict(rule="gla", partitions=0, seq_len=17, batch=1),
    "alone": dict(rule="gdn", shared=False, batch=1),
}


def by_triton(**given):
    """`sse_attention` by the default Triton plan, which a CPU would not choose."""
    arguments = arguments_of(given)
    problem = pose(check(arguments))
    plan = default_plan(problem, Device.from_arch("sm_90"), "triton")
    return call(arguments, plan.graph, write_problem(problem), plan.to_json())


@pytest.mark.interpret
@pytest.mark.parametrize("name", CASES)
def test_staged_op_in_the_interpreter(name):
    case = make_case(**CASES[name], key=16, value=16)
    # the interpreter multiplies tiles in tf32's place with fp32: only rounding is left
    assert_close(with_gradients(by_triton, case), exact(case), 1e-4)


def on_gpu(case):
    return {name: item.cuda() if torch.is_tensor(item) else item for name, item in case.items()}


def cpu(results):
    return {name: tensor.cpu() for name, tensor in results.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_op_on_the_gpu(name):
    case = make_case(**CASES[name], key=64, value=32)
    assert_close(cpu(_with_gradients_on_gpu(st.sse_attention, case)), exact(case), 3e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gdn", "packed", "gla"])
def test_op_compiles_on_the_gpu(name):
    case = make_case(**CASES[name], key=64, value=32)
    compiled = torch.compile(st.sse_attention, fullgraph=True)
    assert_close(cpu(_with_gradients_on_gpu(compiled, case)), exact(case), 3e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gdn", "gla", "packed"])
def test_forward_and_backward_are_captured_in_a_cuda_graph(name):
    """Capture fails on any synchronisation; the replay must follow new data, router and all."""
    torch.manual_seed(0)
    first, second = (on_gpu(make_case(**CASES[name], key=64, value=64, seed=seed)) for seed in (0, 1))
    leaves = [n for n, t in first.items() if torch.is_tensor(t) and t.is_floating_point()]
    for case in (first, second):
        for leaf in leaves:
            case[leaf].requires_grad_()

    def step(case):
        o, final_state = st.sse_attention(**case, output_final_state=True)
        loss = o.square().sum() + final_state.square().sum()
        return [o, final_state, *torch.autograd.grad(loss, [case[leaf] for leaf in leaves])]

    expected = [tensor.clone() for tensor in step(second)]
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        step(first)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(first)
    with torch.no_grad():
        for leaf in leaves:
            first[leaf].copy_(second[leaf])
    graph.replay()
    torch.cuda.synchronize()
    for actual, wanted in zip(captured, expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gdn", "packed", "gla"])
def test_head_groups_on_the_gpu(name):
    case = make_case(**CASES[name], heads=4, key=64, value=64)

    def in_groups(**given):
        return st.sse_attention(**given, head_groups=2)

    assert_close(cpu(_with_gradients_on_gpu(in_groups, case)), exact(case), 3e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [2, 4])
def test_head_groups_take_less_memory_on_the_gpu(groups):
    case = on_gpu(make_case("gdn", heads=8, seq_len=2048, key=64, value=64))
    leaves = [tensor.requires_grad_() for tensor in case.values() if torch.is_tensor(tensor)]

    def step(**more):
        return torch.autograd.grad(st.sse_attention(**case, **more)[0].sum(), leaves)

    at_once, in_groups = (measure.peak_bytes(lambda n=n: step(head_groups=n), "cuda") for n in (1, groups))
    assert in_groups < at_once * {2: 0.85, 4: 0.7}[groups]


@pytest.mark.gpu
def test_nothing_synchronises():
    case = on_gpu(make_case(**CASES["gdn"], key=64, value=64))
    case["v"].requires_grad_()
    for groups in (1, 2):
        st.sse_attention(**case, head_groups=groups)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        o = sum(st.sse_attention(**case, head_groups=groups)[0] for groups in (1, 2))
        (o.sum() + st.load_balance_loss(case["router_logits"], 2)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _with_gradients_on_gpu(function, case):
    def moved(**given):
        o, final_state = function(**{n: t.cuda() if torch.is_tensor(t) else t for n, t in given.items()})
        return o.cpu(), final_state.cpu()

    return with_gradients(moved, case)
