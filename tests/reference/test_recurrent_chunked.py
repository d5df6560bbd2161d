"""The token recurrence and the chunk form are one operation: outputs, final states and gradients, in float64."""

import pytest
import torch

from sse_tune.errors import ProblemError
from sse_tune.reference import chunked, recurrent, route

NORMS = {
    "none": {},
    "after": dict(qk_l2norm=True),
    "before": dict(qk_l2norm=True, gate_before_norm=True),
}


def make_case(
    rule, lengths=(37,), batch=1, partitions=3, top_k=2, read_k=None, shared=True, packed=False, gates=None, seed=0,
    heads=2, key_dim=4, value_dim=3,
):  # fmt: skip
    """Arguments of the reference in float64, all leaves requiring gradients."""
    torch.manual_seed(seed)
    seq_len = sum(lengths)
    sequences = len(lengths) if packed else batch

    def randn(*shape):
        return torch.randn(batch, seq_len, *shape, dtype=torch.float64)

    def stream():
        g = -2 * torch.rand(batch, seq_len, heads, *([key_dim] if rule == "gla" else []), dtype=torch.float64)
        if gates is not None:
            g = torch.tensor(gates, dtype=torch.float64)[torch.randint(len(gates), g.shape)]
        beta = 2 * torch.rand(batch, seq_len, heads, dtype=torch.float64) if rule == "gdn" else None
        return dict(q=randn(heads, key_dim), k=randn(heads, key_dim), g=g, beta=beta)

    case = stream()
    case["v"] = randn(heads, value_dim)
    case["router_logits"] = randn(partitions) if partitions else None
    if shared and partitions:
        case |= {f"shared_{name}": x for name, x in stream().items()}
    states = (sequences, partitions + shared, heads, key_dim, value_dim)
    case["initial_state"] = torch.randn(states, dtype=torch.float64)
    case = {name: x.requires_grad_() if x is not None else None for name, x in case.items()}
    case |= dict(top_k=top_k, read_k=read_k, output_final_state=True)
    if packed:
        case["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return case


def with_gradients(run, case, **more):
    """Output, final state and the gradient of every leaf, for fixed random output gradients."""
    o, state = run(**case, **more)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in (o, state))
    leaves = {name: x for name, x in case.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"o": o.detach(), "final_state": state.detach()} | dict(zip(leaves, grads))


def assert_same(actual, expected, tolerance=1e-11):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.isfinite(actual[name]).all(), name
        error = (actual[name] - x).norm() / (x.norm() + 1e-6)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "alone"])
@pytest.mark.parametrize("rule", ["gdn", "gla"])
def test_chunked_is_recurrent(rule, shared, norm):
    case = make_case(rule, shared=shared) | NORMS[norm]
    assert_same(with_gradients(chunked, case, chunk_size=8), with_gradients(recurrent, case))


@pytest.mark.parametrize(("top_k", "read_k"), [(1, 3), (3, 1), (1, 2), (3, 3)])
@pytest.mark.parametrize("rule", ["gdn", "gla"])
def test_readers_unlike_writers(rule, top_k, read_k):
    case = make_case(rule, top_k=top_k, read_k=read_k) | NORMS["after"]
    assert_same(with_gradients(chunked, case, chunk_size=8), with_gradients(recurrent, case))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rule", ["gdn", "gla"])
def test_plain_stream(rule, norm):
    case = make_case(rule, batch=2, partitions=0) | NORMS[norm]
    assert_same(with_gradients(chunked, case, chunk_size=16), with_gradients(recurrent, case))


@pytest.mark.parametrize("lengths", [(0, 9, 0, 17, 0), (1,), (7, 8, 9), (0, 0), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("rule", ["gdn", "gla"])
def test_packed_sequences(rule, lengths):
    case = make_case(rule, lengths, packed=True)
    assert_same(with_gradients(chunked, case, chunk_size=8), with_gradients(recurrent, case))


@pytest.mark.parametrize("rule", ["gdn", "gla"])
def test_packed_is_each_sequence_alone(rule):
    case = make_case(rule, (5, 0, 11), packed=True) | NORMS["before"]
    o, state = recurrent(**case)
    streams = ("q", "k", "v", "g", "beta", "router_logits", "shared_q", "shared_k", "shared_g", "shared_beta")
    for s, (start, end) in enumerate([(0, 5), (5, 5), (5, 16)]):
        alone = {n: x[:, start:end] if n in streams and x is not None else x for n, x in case.items()}
        alone |= dict(cu_seqlens=None, initial_state=case["initial_state"][s : s + 1])
        o_alone, state_alone = recurrent(**alone)
        assert torch.equal(o_alone, o[:, start:end])
        assert torch.equal(state_alone[0], state[s])


def test_empty_sequence_keeps_its_state():
    case = make_case("gdn", (0, 6, 0), packed=True)
    for run in (recurrent, chunked):
        state = run(**case)[1]
        assert torch.equal(state[0], case["initial_state"][0])
        assert torch.equal(state[2], case["initial_state"][2])


@pytest.mark.parametrize("gates", [(0.0,), (-1e3,), (0.0, -1e-4, -5.0, -50.0, -1e3)], ids=str)
@pytest.mark.parametrize("rule", ["gdn", "gla"])
def test_gates_from_none_to_total(rule, gates):
    case = make_case(rule, (70,), gates=gates) | NORMS["after"]
    assert_same(with_gradients(chunked, case, chunk_size=64), with_gradients(recurrent, case), 1e-9)


@pytest.mark.parametrize("rule", ["gdn", "gla"])
def test_state_hands_over(rule):
    case = make_case(rule, (20,)) | NORMS["after"]
    whole, last = recurrent(**case)
    streams = {n: x for n, x in case.items() if isinstance(x, torch.Tensor) and n != "initial_state"}
    first, middle = recurrent(**case | {n: x[:, :9] for n, x in streams.items()})
    second, end = recurrent(**case | {n: x[:, 9:] for n, x in streams.items()} | dict(initial_state=middle))
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("run", [recurrent, chunked])
@pytest.mark.parametrize("rule", ["gdn", "gla"])
def test_gradcheck(rule, run, norm):
    case = make_case(rule, (2, 0, 3), packed=True, heads=1, key_dim=2, value_dim=2) | NORMS[norm]
    case["partitions"] = route(case["router_logits"][0], 2).partitions
    names = [name for name, x in case.items() if isinstance(x, torch.Tensor) and x.requires_grad]

    def op(*leaves):
        return run(**case | dict(zip(names, leaves)))

    assert torch.autograd.gradcheck(op, [case[name] for name in names])


def test_one_token_by_hand():
    q, k, v = torch.tensor([[2.0, 3.0]]), torch.tensor([[5.0, 7.0]]), torch.tensor([[11.0]])
    state = torch.tensor([[13.0], [17.0]])
    kept = 0.5 * state + k.T @ (0.25 * (v - k @ (0.5 * state)))
    o, final = recurrent(
        q[:, None, None], k[:, None, None], v[:, None, None], torch.full((1, 1, 1), 0.5).log(), None,
        beta=torch.full((1, 1, 1), 0.25), initial_state=state[None, None, None], output_final_state=True, scale=1.0,
    )  # fmt: skip
    torch.testing.assert_close(final[0, 0, 0], kept)
    torch.testing.assert_close(o.reshape(1), (q @ kept).reshape(1))


def test_an_unchosen_partition_is_not_touched():
    case = make_case("gla", (6,), top_k=1, batch=1)
    with torch.no_grad():
        case["router_logits"][..., 2] = -100.0
    state = recurrent(**case)[1]
    assert torch.equal(state[:, 3], case["initial_state"][:, 3])
    assert not torch.equal(state[:, 1:3], case["initial_state"][:, 1:3])


def test_bad_arguments():
    case = make_case("gdn", (6,))
    with pytest.raises(ProblemError, match="cu_seqlens"):
        recurrent(**case | dict(cu_seqlens=torch.tensor([0, 4, 7])))
    with pytest.raises(ProblemError, match="initial_state"):
        recurrent(**case | dict(initial_state=case["initial_state"][:, :1]))
    with pytest.raises(ProblemError, match="top_k"):
        recurrent(**case | dict(top_k=4))
    with pytest.raises(ProblemError, match="shared"):
        recurrent(**case | dict(router_logits=None))
    with pytest.raises(ProblemError, match="chunk_size"):
        chunked(**case, chunk_size=0)
