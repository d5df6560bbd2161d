"""The public operation on the CPU: right, differentiable, compilable, and one clear line for every bad input."""

import pytest
import torch

import sse_tune as st
from sse_tune.errors import ProblemError
from sse_tune.reference import routing
from tests.runtime.cases import assert_close, exact, make_case, with_gradients

CASES = {
    "gdn": dict(rule="gdn"),
    "gla": dict(rule="gla", state=True),
    "packed": dict(rule="gdn", lengths=(0, 5, 0, 7, 1), state=True),
    "alone": dict(rule="gla", shared=False),
    "plain": dict(rule="gdn", partitions=0, state=True),
    "one token": dict(rule="gdn", seq_len=1, batch=1),
}


@pytest.mark.parametrize("name", CASES)
def test_op_is_the_reference(name):
    case = make_case(**CASES[name])
    assert_close(with_gradients(st.sse_attention, case), exact(case))


def test_options_reach_the_kernels():
    case = make_case("gdn") | {"gate_before_norm": True, "scale": 0.7, "read_k": 1}
    actual, expected = with_gradients(st.sse_attention, case), exact(case)
    # the norm cancels the router's weight: what gradient is left is far below fp32's rounding of the rest
    assert (actual.pop("d_router_logits") - expected.pop("d_router_logits")).abs().max() < 1e-5
    assert_close(actual, expected)


def test_streams_need_not_be_contiguous():
    case = make_case("gla")
    strided = {
        name: item.transpose(1, 2).contiguous().transpose(1, 2) if torch.is_tensor(item) and item.dim() == 4 else item
        for name, item in case.items()
    }
    assert not strided["q"].is_contiguous()
    assert torch.equal(st.sse_attention(**strided)[0], st.sse_attention(**case)[0])


def test_dtypes_of_gates_may_differ():
    case = make_case("gdn")
    low = {n: case[n].bfloat16().requires_grad_() for n in ("q", "k", "v", "shared_q", "shared_k")}
    gates = {n: case[n].requires_grad_() for n in ("g", "beta", "router_logits", "shared_g", "shared_beta")}
    o, state = st.sse_attention(**{**case, **low, **gates}, output_final_state=True)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    o.float().sum().backward()
    assert {t.grad.dtype for t in low.values()} == {torch.bfloat16}
    assert {t.grad.dtype for t in gates.values()} == {torch.float32}


def test_state_carries_a_sequence_over_two_calls():
    case = make_case("gdn", seq_len=10)
    whole, last = st.sse_attention(**case, output_final_state=True)

    def part(span):
        return {n: t[:, span] if torch.is_tensor(t) and n != "initial_state" else t for n, t in case.items()}

    first, state = st.sse_attention(**part(slice(0, 4)), output_final_state=True)
    second, end = st.sse_attention(**part(slice(4, 10)), initial_state=state, output_final_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gdn", "gla", "packed"])
def test_compiles_without_a_graph_break(name):
    case = make_case(**CASES[name])
    compiled = torch.compile(lambda **given: st.sse_attention(**given), backend="aot_eager", fullgraph=True)
    assert_close(with_gradients(compiled, case), exact(case))


def test_compiled_code_takes_another_length():
    compiled = torch.compile(st.sse_attention, backend="aot_eager", fullgraph=True)
    for seq_len in (6, 9, 11):
        case = make_case("gdn", seq_len=seq_len)
        torch.testing.assert_close(compiled(**case)[0], st.sse_attention(**case)[0])


def _without(name):
    return lambda c: c.pop(name)


def _set(**changes):
    return lambda c: c.update(changes)


def _map(name, function):
    return lambda c: c.update({name: function(c[name])})


BAD = {
    "rank": (_map("q", lambda t: t[0]), "`q` must be [B, T, H, K]"),
    "heads": (_map("v", lambda t: t.repeat(1, 1, 2, 1)), "repeat the fewer ones"),
    "length": (_map("k", lambda t: t[:, 1:]), "`k` must be [B, T, H, K] = [2, 11, 2, 8]"),
    "gate of the other rule": (_map("g", lambda t: t[..., None].expand(-1, -1, -1, 8)), "must be [B, T, H] for GDN"),
    "logits": (_map("router_logits", lambda t: t[:1]), "`router_logits` must be [B, T, N]"),
    "dtype": (_map("k", torch.Tensor.bfloat16), "must have one dtype"),
    "float64": (_map("q", torch.Tensor.double), "float64 is what sse_tune.reference is for"),
    "integer gate": (_map("g", torch.Tensor.int), "`g` must be bfloat16, float16 or float32"),
    "device": (_map("k", lambda t: t.to("meta")), "all tensors must be on one device"),
    "no device": (_map("q", lambda t: t.to("meta")), "must be on a CPU or a CUDA GPU"),
    "not a tensor": (_set(k=[1.0]), "`k` must be a tensor"),
    "top_k > N": (_set(top_k=9), "1 <= top_k <= N must hold, but got top_k=9, N=3"),
    "top_k = 0": (_set(top_k=0), "1 <= top_k <= N must hold"),
    "top_k missing": (_without("top_k"), "`top_k` says how many partitions"),
    "top_k of another type": (_set(top_k=2.0), "1 <= top_k <= N must hold for an integer, but got top_k=2.0"),
    "read_k of another type": (_set(read_k=True), "1 <= read_k <= N must hold for an integer"),
    "read_k > N": (_set(read_k=4), "1 <= read_k <= N must hold"),
    "positive gate": (_map("g", torch.neg), "`g` is a log-gate in natural log: at most 0"),
    "positive shared gate": (_map("shared_g", torch.neg), "`shared_g` is a log-gate"),
    "norm": (_set(qk_l2norm=False, gate_before_norm=True), "`gate_before_norm` says where"),
    "scale": (_set(scale=float("nan")), "`scale` must be a finite number"),
    "shared in part": (_without("shared_k"), "needs all of its streams"),
    "shared beta missing": (_without("shared_beta"), "needs all of its streams"),
    "beta for one": (_without("beta"), "`beta` is given for both streams"),
    "shared without router": (_set(router_logits=None), "without `router_logits` the one stream"),
    "state shape": (_set(initial_state=torch.zeros(2, 3, 2, 8, 12)), "[S, P, H, K, V] = [2, 4, 2, 8, 12]"),
    "state dtype": (_set(initial_state=torch.zeros(2, 4, 2, 8, 12).half()), "float32, but got"),
    "packed rows": (_set(cu_seqlens=torch.tensor([0, 11])), "packed sequences need B = 1"),
    "lengths dtype": (_set(cu_seqlens=torch.tensor([0.0, 11.0])), "`cu_seqlens` must be [S + 1] int32 or int64"),
    "lengths shape": (_set(cu_seqlens=torch.tensor([0])), "`cu_seqlens` must be [S + 1]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name):
    change, expected = BAD[name]
    st.sse_attention(**make_case("gdn"))  # what passed once is remembered
    case = make_case("gdn")
    change(case)
    with pytest.raises(ProblemError) as error:
        st.sse_attention(**case)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert error.value.remedy


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ([1, 11], "start at 0 and end at T, but got 1..11, T=11"),
        ([0, 10], "end at T"),
        ([0, 7, 5, 11], "never decrease"),
    ],
)
def test_offsets_must_add_up(offsets, expected):
    with pytest.raises(ProblemError) as error:
        st.sse_attention(**make_case("gdn", batch=1) | {"cu_seqlens": torch.tensor(offsets)})
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "sizes", [dict(seq_len=0), dict(batch=0), dict(key=257, heads=1), dict(value=513, heads=1)], ids=str
)
def test_sizes_have_bounds(sizes):
    with pytest.raises(ProblemError):
        st.sse_attention(**make_case("gdn", **sizes))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_loss_is_the_reference(top_k):
    logits = torch.randn(2, 50, 4, dtype=torch.float32).requires_grad_()
    loss = st.load_balance_loss(logits, top_k)
    wide = logits.detach().double().requires_grad_()
    expected = routing.load_balance_loss(wide, top_k)
    torch.testing.assert_close(loss.double(), expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits)[0].double(), torch.autograd.grad(expected, wide)[0], rtol=1e-4, atol=1e-7
    )


def test_balance_loss_counts_in_fp32_for_half_logits():
    logits = torch.full((3, 4), float("inf"), dtype=torch.float16)
    assert st.load_balance_loss(logits, 1) == pytest.approx(1.0)


@pytest.mark.parametrize("top_k", [0, 5, True])
def test_balance_loss_checks_top_k(top_k):
    with pytest.raises(ProblemError, match="1 <= top_k <= N must hold"):
        st.load_balance_loss(torch.zeros(3, 4), top_k)
