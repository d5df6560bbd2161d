"""The modules hold the authors' parameters, keep sequences apart, and carry their state from call to call."""

import pytest
import torch
from torch.nn import functional as F

from sse_tune import layers
from sse_tune.errors import ProblemError
from sse_tune.layers import SSEGDN, SSEGLA, ShortConvolution
from sse_tune.problem import Problem
from sse_tune.reference.recurrent import recurrent
from sse_tune.runtime.pipeline import DTYPES

SMALL = dict(hidden_size=24, head_dim=8, num_heads=2)
LAYERS = {
    "gla": lambda **more: SSEGLA(**SMALL, **more),
    "gdn": lambda **more: SSEGDN(**SMALL, **more),
    "gdn, two writers, conv": lambda **more: SSEGDN(**SMALL, num_writer=2, num_reader=2, use_short_conv=True, **more),
    "gla, more value heads": lambda **more: SSEGLA(**SMALL, num_v_heads=4, use_short_conv=True, conv_bias=True, **more),
    "gdn, no gate": lambda **more: SSEGDN(**SMALL, use_output_gate=False, allow_neg_eigval=True, **more),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]()


def shapes(layer):
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("name", ["gla", "gdn"])
def test_gates_are_as_plans_are_tuned_for(name, monkeypatch):
    handed = {}

    def attention(q, k, v, g, *_, **more):
        handed.update(k=k, g=g, shared_g=more["shared_g"])
        return v, None

    monkeypatch.setattr(layers, "sse_attention", attention)
    LAYERS[name]().bfloat16()(torch.randn(1, 5, 24, dtype=torch.bfloat16))
    dtype = DTYPES[Problem(rule=name, seq_len=5, num_heads=2, head_dim=8, dtype="bf16").gate_dtype]
    assert handed["k"].dtype == torch.bfloat16
    assert handed["g"].dtype == handed["shared_g"].dtype == dtype


def test_gla_has_the_authors_parameters():
    found = shapes(SSEGLA(**SMALL, use_short_conv=True))
    assert found == {
        "q_proj.weight": (16, 24), "k_proj.weight": (16, 24), "v_proj.weight": (16, 24), "e_proj.weight": (4, 24),
        "lora_q_proj.0.weight": (8, 24), "lora_q_proj.1.weight": (16, 8),
        "lora_k_proj.0.weight": (8, 24), "lora_k_proj.1.weight": (16, 8),
        "gk_proj.0.0.weight": (16, 24), "gk_proj.0.1.weight": (16, 16), "gk_proj.0.1.bias": (16,),
        "gk_proj.1.0.weight": (16, 24), "gk_proj.1.1.weight": (16, 16), "gk_proj.1.1.bias": (16,),
        "q_conv1d_shared.weight": (16, 1, 4), "k_conv1d_shared.weight": (16, 1, 4),
        "g_proj.0.weight": (8, 24), "g_proj.1.weight": (16, 8), "o_norm.weight": (8,), "o_proj.weight": (24, 16),
    }  # fmt: skip


def test_gdn_has_the_authors_parameters():
    found = shapes(SSEGDN(**SMALL, num_v_heads=4))
    assert found == {
        "q_proj.weight": (16, 24), "k_proj.weight": (16, 24), "v_proj.weight": (64, 24), "e_proj.weight": (4, 24),
        "lora_q_proj.0.weight": (16, 24), "lora_q_proj.1.weight": (16, 16),
        "lora_k_proj.0.weight": (16, 24), "lora_k_proj.1.weight": (16, 16),
        "a_proj.weight": (8, 24), "b_proj.weight": (8, 24), "A_log": (8,), "dt_bias": (8,),
        "g_proj.0.weight": (16, 24), "g_proj.1.weight": (64, 16), "o_norm.weight": (16,), "o_proj.weight": (24, 64),
    }  # fmt: skip


def test_gdn_is_the_written_formula():
    torch.manual_seed(1)
    layer, x = SSEGDN(**SMALL, num_writer=2, num_reader=2), torch.randn(2, 9, 24)
    y, _, router_logits = layer(x)
    w = {name: tensor.double() for name, tensor in layer.state_dict().items()}
    x = x.double()

    def heads(t, size=8):
        return t.unflatten(-1, (-1, size))

    q1, k1 = x @ w["q_proj.weight"].T, x @ w["k_proj.weight"].T
    q2 = q1 + x @ w["lora_q_proj.0.weight"].T @ w["lora_q_proj.1.weight"].T
    k2 = k1 + x @ w["lora_k_proj.0.weight"].T @ w["lora_k_proj.1.weight"].T
    beta = (x @ w["b_proj.weight"].T).sigmoid()
    g = -w["A_log"].exp() * F.softplus(x @ w["a_proj.weight"].T + w["dt_bias"])
    o, _ = recurrent(
        *(F.silu(heads(t)) for t in (q2, k2)), F.silu(heads(x @ w["v_proj.weight"].T, 16)), g[..., 2:],
        x @ w["e_proj.weight"].T, 2, beta=beta[..., 2:], shared_q=F.silu(heads(q1)), shared_k=F.silu(heads(k1)),
        shared_g=g[..., :2], shared_beta=beta[..., :2], qk_l2norm=True, gate_before_norm=True,
    )  # fmt: skip
    gate = F.silu(heads(x @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T, 16))
    o = F.rms_norm(o, (16,), w["o_norm.weight"], 1e-5) * gate
    torch.testing.assert_close(y.double(), o.flatten(2) @ w["o_proj.weight"].T, rtol=1e-4, atol=1e-5)
    assert router_logits.shape == (2, 9, 4)


def test_every_parameter_learns(layer):
    y, _, router_logits = layer(torch.randn(1, 12, 24))
    (y.square().sum() + layer.balance_loss(router_logits)).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_heads_in_groups_change_nothing(layer):
    x = torch.randn(2, 9, 24)
    (one, state, _), (other, state_of_groups, _) = (
        layer(x, output_state=True, head_groups=groups) for groups in (1, 2)
    )
    torch.testing.assert_close(other, one)
    torch.testing.assert_close(state_of_groups.recurrent, state.recurrent)


def test_packed_sequences_do_not_meet(layer):
    x = torch.randn(1, 10, 24)
    packed, state, _ = layer(x, cu_seqlens=torch.tensor([0, 3, 3, 10]), output_state=True)
    apart = [layer(x[:, span], output_state=True) for span in (slice(0, 3), slice(3, 10))]
    torch.testing.assert_close(packed, torch.cat([y for y, _, _ in apart], 1), rtol=1e-4, atol=1e-5)
    states = torch.cat([state.recurrent for _, state, _ in apart])
    torch.testing.assert_close(state.recurrent[[0, 2]], states, rtol=1e-4, atol=1e-5)
    assert state.recurrent[1].abs().max() == 0


def test_state_goes_on_token_by_token(layer):
    x = torch.randn(2, 7, 24)
    whole, last, _ = layer(x, output_state=True)
    state, steps = None, []
    for span in (slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 7)):
        y, state, _ = layer(x[:, span], state=state, output_state=True)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.recurrent, last.recurrent, rtol=1e-4, atol=1e-5)
    assert layer(x)[1] is None


def test_convolution_is_causal_and_knows_its_past():
    torch.manual_seed(2)
    conv, x = ShortConvolution(5, 4, True), torch.randn(11, 5)
    y, cache = conv.run(x, torch.tensor([0, 11]), None)
    expected = F.conv1d(F.pad(x.T[None], (3, 0)), conv.weight, conv.bias, groups=5)[0].T
    torch.testing.assert_close(y, expected)
    assert torch.equal(cache[0], x[-3:])
    first, past = conv.run(x[:2], torch.tensor([0, 2]), None)  # fewer tokens than the filter sees
    second, _ = conv.run(x[2:], torch.tensor([0, 9]), past)
    torch.testing.assert_close(torch.cat([first, second]), expected)


@pytest.mark.parametrize(
    "change", [dict(num_writer=5), dict(num_reader=0), dict(num_v_heads=3), dict(expand_v=0.3)], ids=str
)
def test_options_that_contradict_each_other_are_refused(change):
    with pytest.raises(ProblemError):
        SSEGLA(**{**SMALL, **change})
