"""Small inputs of the public operation, and its results with all gradients."""

import torch

from sse_tune.reference.recurrent import recurrent


def make_case(rule, *, batch=2, seq_len=11, heads=2, key=8, value=12, partitions=3, shared=True, state=False,
              lengths=None, seed=0):  # fmt: skip
    """Arguments of `sse_attention`, tensors fp32; `lengths` packs sequences."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    if lengths is not None:
        batch, seq_len = 1, sum(lengths)
    tokens = (batch, seq_len, heads)

    def stream(prefix):
        own = {"q": normal(*tokens, key), "k": normal(*tokens, key)}
        if rule == "gdn":
            own |= {"g": -normal(*tokens).abs(), "beta": normal(*tokens).sigmoid()}
        else:
            own["g"] = -normal(*tokens, key).abs()
        return {prefix + name: tensor for name, tensor in own.items()}

    case = {**stream(""), "v": normal(*tokens, value), "router_logits": None}
    if rule == "gdn":
        case["qk_l2norm"] = True
    if partitions:
        case |= {"router_logits": normal(batch, seq_len, partitions), "top_k": min(2, partitions)}
        case |= stream("shared_") if shared else {}
    sequences = batch
    if lengths is not None:
        case["cu_seqlens"] = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        sequences = len(lengths)
    if state:
        states = partitions + int(shared or not partitions)
        case["initial_state"] = normal(sequences, states, heads, key, value)
    return case


def with_gradients(function, case, dtype=torch.float32, **more):
    """o, final state and the gradient of every float input, by name, from fixed gradients of the results."""
    given = {
        name: item.detach().to(dtype).requires_grad_() if torch.is_tensor(item) and item.is_floating_point() else item
        for name, item in case.items()
    }
    o, final_state = function(**given, output_final_state=True, **more)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in (o, final_state))
    loss.backward()
    results = {"o": o.detach(), "final_state": final_state.detach()}
    return results | {f"d_{n}": t.grad for n, t in given.items() if torch.is_tensor(t) and t.requires_grad}


def exact(case):
    return with_gradients(recurrent, {"top_k": 1, **case}, torch.float64)


def assert_close(actual, expected, tolerance=1e-5):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].double() - value).norm() / value.norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: {error:.2e} > {tolerance}"
