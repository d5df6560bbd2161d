"""The choice of partitions at its edges: ties, infinities, underflow, N = top_k; the balance loss; the key map."""

import pytest
import torch

from sse_tune.errors import ProblemError
from sse_tune.reference import load_balance_loss, recurrent, route, topk_key_map

INF = float("inf")


def chosen(*logits, top_k=2, **more):
    return route(torch.tensor([logits]), top_k, **more).partitions[0].tolist()


def test_ties_go_to_the_lowest_partition():
    assert chosen(1.0, 1.0, 1.0, 1.0) == [0, 1]
    assert chosen(0.0, 2.0, 1.0, 2.0, top_k=3) == [1, 3, 2]
    assert chosen(-INF, -INF, -INF) == [0, 1]
    assert chosen(*[0.5] * 100, top_k=99) == list(range(99))


def test_infinite_logits():
    choice = route(torch.tensor([[0.0, INF, -INF], [INF, 1.0, INF], [-INF] * 3, [INF] * 3]), 2)
    assert choice.partitions.tolist() == [[1, 0], [0, 2], [0, 1], [0, 1]]
    third = 1 / 3
    expected = torch.tensor([[1.0, 0.0], [0.5, 0.5], [third, third], [third, third]])
    torch.testing.assert_close(choice.weights, expected)


def test_infinite_logits_have_the_gradient_of_the_softmax():
    logits = torch.tensor([[INF, 1.0, INF], [-INF] * 3], dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([[1.0, 3.0], [1.0, 3.0]], dtype=torch.float64)
    e = torch.tensor([[0.5, 0.0, 0.5], [1 / 3] * 3], dtype=torch.float64)
    de = torch.tensor([[1.0, 0.0, 3.0], [1.0, 3.0, 0.0]], dtype=torch.float64)
    route(logits, 2).weights.backward(upstream)
    torch.testing.assert_close(logits.grad, e * (de - (e * de).sum(-1, keepdim=True)))


def test_nan_ranks_last_and_spreads():
    choice = route(torch.tensor([[float("nan"), 0.0, 1.0]]), 2)
    assert choice.partitions.tolist() == [[2, 1]]
    assert choice.weights.isnan().all()


def test_choice_is_by_logit_when_weights_underflow():
    choice = route(torch.tensor([[-300.0, 0.0, -200.0, -250.0]]), 3)
    assert choice.partitions.tolist() == [[1, 2, 3]]
    assert choice.weights.tolist() == [[1.0, 0.0, 0.0]]


def test_underflown_weight_writes_nothing_and_has_no_nan():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, 1, 4, requires_grad=True) for _ in range(3))
    logits = torch.tensor([0.0, -300.0]).expand(1, 5, 2).clone().requires_grad_()
    for norm in (dict(), dict(qk_l2norm=True), dict(qk_l2norm=True, gate_before_norm=True)):
        o, state = recurrent(q, k, v, torch.zeros(1, 5, 1, 4), logits, 2, output_final_state=True, **norm)
        assert state[0, 1].abs().max() == 0
        for grad in torch.autograd.grad(o.sum(), [q, k, v, logits]):
            assert torch.isfinite(grad).all()


def test_all_partitions_chosen():
    logits = torch.randn(7, 3)
    choice = route(logits, 3)
    torch.testing.assert_close(choice.weights.sum(-1), torch.ones(7))
    assert choice.partitions.sort(-1).values.tolist() == [[0, 1, 2]] * 7


@pytest.mark.parametrize(("top_k", "read_k", "slots"), [(1, 3, 3), (3, 1, 3), (2, None, 2)])
def test_slots_hold_writers_and_readers(top_k, read_k, slots):
    choice = route(torch.randn(4, 5), top_k, read_k)
    assert choice.partitions.shape == choice.weights.shape == (4, slots)


def test_a_given_choice_is_used():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    choice = route(logits, 2, partitions=torch.tensor([[0, 1]], dtype=torch.int32))
    torch.testing.assert_close(choice.weights, logits.softmax(-1)[:, :2])
    with pytest.raises(ProblemError, match="different partitions"):
        route(logits, 2, partitions=torch.tensor([[1, 1]]))
    with pytest.raises(ProblemError, match="different partitions"):
        route(logits, 2, partitions=torch.tensor([[1]]))


@pytest.mark.parametrize(("top_k", "read_k"), [(0, None), (4, None), (2, 0), (2, 4)])
def test_counts_out_of_range(top_k, read_k):
    with pytest.raises(ProblemError, match="1 <= top_k, read_k <= N"):
        route(torch.zeros(1, 3), top_k, read_k)


def test_load_balance_loss():
    one_hot = torch.full((1, 8, 4), -INF)
    one_hot[..., 2] = INF
    assert load_balance_loss(one_hot, 1).item() == pytest.approx(4.0)
    balanced = 50 * torch.eye(4).repeat(2, 1)
    assert load_balance_loss(balanced, 1).item() == pytest.approx(1.0)
    assert load_balance_loss(torch.zeros(3, 5, 4), 2).item() == pytest.approx(1.0)
    logits = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: load_balance_loss(x, 2), logits)


def test_topk_key_map():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0]], dtype=torch.float64)
    g = torch.tensor([[-1.0, -2.0, -3.0, -4.0]], dtype=torch.float64)
    k, gate = topk_key_map(logits, g, 2)
    torch.testing.assert_close(k[:, 1:3], logits[:, 1:3].softmax(-1))
    assert k[0, 0] == 0
    assert k[0, 3] == 0
    assert gate.tolist() == [[0.0, -2.0, -3.0, 0.0]]
    leaves = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True), -torch.rand(3, 5, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x, y: topk_key_map(x, y, 3), (leaves[0], leaves[1].requires_grad_()))
    with pytest.raises(ProblemError, match="top_k"):
        topk_key_map(logits, g, 5)


def test_rows_outside_the_key_map_keep_their_state():
    torch.manual_seed(0)
    k, g = topk_key_map(torch.tensor([1.0, 0.0, 2.0, -1.0]).expand(1, 6, 1, 4), -torch.rand(1, 6, 1, 4), 2)
    initial = torch.randn(1, 1, 1, 4, 3)
    v = torch.randn(1, 6, 1, 3)
    state = recurrent(k, k, v, g, None, initial_state=initial, output_final_state=True)[1]
    assert torch.equal(state[..., [1, 3], :], initial[..., [1, 3], :])
    assert not torch.equal(state[..., [0, 2], :], initial[..., [0, 2], :])
