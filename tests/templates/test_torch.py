"""The torch backend against the token recurrence in float64: outputs, final states, every gradient, every config."""

import pytest
import torch

from sse_tune.device import Device
from sse_tune.problem import Problem
from sse_tune.reference import recurrent
from sse_tune.space import Config
from sse_tune.templates.buffers import Sizes
from sse_tune.templates.registry import Call, default_plan, templates_of
from sse_tune.templates.torch.whole import SPACE, TEMPLATE, compute

CPU = Device("cpu", "test", "x86_64", 2)
STREAMS = ("q", "k", "v", "g", "beta", "shared_q", "shared_k", "shared_g", "shared_beta", "router_logits")
BASE = {"seq_len": 75, "num_heads": 2, "head_dim": 6, "head_dim_v": 5, "num_partitions": 3, "dtype": "fp32"}
LAYOUTS = {
    "shared": {},
    "alone": {"shared": False},
    "one writer, three readers": {"top_k": 1, "read_k": 3},
    "three writers, one reader": {"top_k": 3, "read_k": 1, "shared": False},
    "plain": {"num_partitions": 0, "top_k": 0, "batch": 2},
    "batch": {"batch": 3, "seq_len": 33},
    "one token": {"seq_len": 1},
    "packed": {"lengths": (0, 9, 0, 17, 0, 70, 0)},
    "only empty but one": {"lengths": (0, 16, 0)},
    "single tokens": {"lengths": (1,) * 9},
}
MIXED = (0.0, -1e-4, -5.0, -50.0, -1e3)


def make_case(rule, *, norm="after", lengths=None, gates=None, initial=True, logits=None, seed=0, **changes):
    """A problem and its float32 inputs, flattened to tokens."""
    torch.manual_seed(seed)
    fields = BASE | {"rule": rule, "norm": norm} | changes
    if lengths is not None:
        fields |= {"seq_len": sum(lengths), "num_sequences": len(lengths)}
    problem = Problem(**fields)
    tokens, heads, key_dim = problem.batch * problem.seq_len, problem.num_heads, problem.head_dim
    gate_shape = (tokens, heads, key_dim) if rule == "gla" else (tokens, heads)
    inputs = dict.fromkeys(STREAMS)
    sparse = problem.num_partitions > 0
    for prefix in ("", "shared_") if sparse and problem.shared else ("",):
        inputs[f"{prefix}q"] = torch.randn(tokens, heads, key_dim)
        inputs[f"{prefix}k"] = torch.randn(tokens, heads, key_dim)
        if gates is None:
            inputs[f"{prefix}g"] = -2 * torch.rand(gate_shape)
        else:
            inputs[f"{prefix}g"] = torch.tensor(gates)[torch.randint(len(gates), gate_shape)]
        if rule == "gdn":
            inputs[f"{prefix}beta"] = torch.rand(tokens, heads)
    inputs["v"] = torch.randn(tokens, heads, problem.value_dim)
    if sparse:
        inputs["router_logits"] = torch.randn(tokens, problem.num_partitions)
        if logits is not None:
            inputs["router_logits"][:] = torch.tensor(logits)
    states = (problem.sequences, problem.partitions, heads, key_dim, problem.value_dim)
    inputs["initial_state"] = torch.randn(states) if initial else None
    lengths = lengths if lengths is not None else (problem.seq_len,) * problem.batch
    inputs["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return problem, inputs


def leaves_of(inputs, dtype=None):
    floats = {name: x for name, x in inputs.items() if x is not None and x.is_floating_point()}
    return {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in floats.items()}


def with_gradients(o, state, leaves):
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (o, state)]
    grads = torch.autograd.grad((o, state), list(leaves.values()), upstream, allow_unused=True, materialize_grads=True)
    return {"o": o.detach(), "final_state": state.detach()} | dict(zip(leaves, grads))


def actual(problem, inputs, config, dtype=None):
    leaves = leaves_of(inputs, dtype)
    o, state = compute(problem, config, problem.head_dim**-0.5, **inputs | leaves)
    return with_gradients(o, state, leaves)


def expected(problem, inputs):
    leaves = leaves_of(inputs, torch.float64)
    rows = (problem.batch, problem.seq_len)
    batched = {name: leaves[name].unflatten(0, rows) for name in STREAMS if name in leaves}
    o, state = recurrent(
        **{"router_logits": None} | batched,
        top_k=problem.top_k,
        read_k=problem.readers or None,
        qk_l2norm=problem.norm != "none",
        gate_before_norm=problem.norm == "before",
        initial_state=leaves.get("initial_state"),
        output_final_state=True,
        cu_seqlens=inputs["cu_seqlens"] if problem.num_sequences else None,
    )
    return with_gradients(o.flatten(0, 1), state, leaves)


def assert_close(result, exact, tolerance, norm):
    assert result.keys() == exact.keys()
    for name, x in exact.items():
        assert torch.isfinite(result[name]).all(), name
        # the norm taken after the gate cancels the router's weight: what is left of its gradient counts absolutely
        floor = 1.0 if norm == "before" and name == "router_logits" else 1e-3
        error = (result[name].double() - x).norm() / (x.norm() + floor)
        assert error <= tolerance, f"{name}: {error:.1e}"


def config_of(problem, **changes):
    return SPACE.default(problem, CPU).replace(**changes)


@pytest.mark.parametrize("rule", ["gdn", "gla"])
def test_every_config(rule):
    problem, inputs = make_case(rule)
    exact = expected(problem, inputs)
    configs = list(SPACE.configs(problem, CPU))
    assert len(configs) >= 16
    for config in configs:
        assert_close(actual(problem, inputs, config), exact, 1e-5, problem.norm)


@pytest.mark.parametrize("partitions", ["gathered", "masked"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", ["gdn", "gla"])
def test_every_layout(rule, layout, partitions):
    problem, inputs = make_case(rule, **LAYOUTS[layout])
    config = config_of(problem, chunk_size=16, partitions=partitions)
    assert_close(actual(problem, inputs, config), expected(problem, inputs), 1e-5, problem.norm)


@pytest.mark.parametrize("norm", ["none", "after", "before"])
@pytest.mark.parametrize("rule", ["gdn", "gla"])
def test_every_norm(rule, norm):
    problem, inputs = make_case(rule, norm=norm)
    if norm == "none":
        inputs = {name: x * 0.3 if x is not None and name.endswith("k") else x for name, x in inputs.items()}
    exact = expected(problem, inputs)
    assert_close(actual(problem, inputs, config_of(problem, chunk_size=32)), exact, 1e-5, norm)
    assert_close(actual(problem, inputs, config_of(problem, chunk_size=32), torch.float64), exact, 1e-11, norm)


@pytest.mark.parametrize("gates", [(0.0,), (-1e3,), MIXED], ids=str)
@pytest.mark.parametrize("rule", ["gdn", "gla"])
def test_gates_from_none_to_total(rule, gates):
    problem, inputs = make_case(rule, gates=gates, seq_len=140)
    exact = expected(problem, inputs)
    for config in (config_of(problem, chunk_size=128), config_of(problem, chunk_size=16)):
        assert_close(actual(problem, inputs, config), exact, 1e-5, problem.norm)


@pytest.mark.parametrize("solve", ["rows", "blocks"])
@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_duplicate_keys_do_not_grow(solve, strength):
    problem, inputs = make_case("gdn", gates=(0.0, -1e-4), seq_len=130, num_heads=1)
    for prefix in ("", "shared_"):
        inputs[f"{prefix}k"] = inputs[f"{prefix}k"][:1].expand_as(inputs[f"{prefix}k"]).contiguous()
        inputs[f"{prefix}beta"] = torch.full_like(inputs[f"{prefix}beta"], strength)
    config = config_of(problem, solve=solve)
    assert_close(actual(problem, inputs, config), expected(problem, inputs), 3e-5 * strength, problem.norm)


@pytest.mark.parametrize("partitions", ["gathered", "masked"])
@pytest.mark.parametrize(
    "logits",
    [(0.0, 0.0, 0.0), (float("-inf"), 0.0, float("inf")), (float("-inf"),) * 3, (-300.0, 0.0, -200.0), (0.0, 9.0, 0.0)],
    ids=str,
)
def test_router_at_its_edges(logits, partitions):
    problem, inputs = make_case("gdn", logits=logits)
    config = config_of(problem, partitions=partitions)
    assert_close(actual(problem, inputs, config), expected(problem, inputs), 1e-5, problem.norm)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("rule", ["gdn", "gla"])
def test_sixteen_bit_inputs(rule, dtype, tolerance):
    problem, inputs = make_case(rule, dtype="bf16" if dtype == torch.bfloat16 else "fp16")
    rounded = {n: x.to(dtype) if n in STREAMS and x is not None else x for n, x in inputs.items()}
    result = actual(problem, rounded, config_of(problem))
    assert result["o"].dtype == result["q"].dtype == dtype
    assert result["final_state"].dtype == torch.float32
    assert_close(result, expected(problem, rounded), tolerance, problem.norm)


def test_same_bits_again():
    problem, inputs = make_case("gdn", top_k=1, read_k=3)
    config = config_of(problem)
    first = actual(problem, inputs, config)
    for _ in range(3):
        assert all(torch.equal(x, first[name]) for name, x in actual(problem, inputs, config).items())


@pytest.mark.parametrize("layout", ["shared", "alone", "plain", "packed"])
@pytest.mark.parametrize("rule", ["gdn", "gla"])
def test_run_writes_poisoned_outputs(rule, layout):
    problem, inputs = make_case(rule, **LAYOUTS[layout], initial=layout != "packed")
    config = config_of(problem)
    tensors = {name: x for name, x in inputs.items() if x is not None}
    for name in ("q", "k", "g", "beta"):  # the pipeline lets one stream stand in for the absent one
        if name in tensors:
            tensors.setdefault(f"shared_{name}", tensors[name])
    tensors["o"] = torch.full_like(inputs["v"], float("nan"))
    states = (problem.sequences, problem.partitions, problem.num_heads, problem.head_dim, problem.value_dim)
    tensors["final_state"] = torch.full(states, float("nan"))
    TEMPLATE.run(Call(Sizes(problem, 64), config, None, problem.head_dim**-0.5), tensors)
    exact = expected(problem, inputs)
    for name in ("o", "final_state"):
        torch.testing.assert_close(tensors[name].double(), exact[name], rtol=1e-4, atol=1e-4)


def test_registered_with_a_default_plan():
    problem = Problem.preset("demo")
    plan = default_plan(problem, CPU)
    assert plan.stages["whole"].config == Config({p.name: p.default for p in SPACE.params})
    assert templates_of("torch") == (TEMPLATE,)
    assert len(TEMPLATE.source_hash) == 16


def test_parameters_without_effect_are_refused():
    gla = Problem(rule="gla", **BASE)
    default = SPACE.default(gla, CPU)
    assert "GDN only" in SPACE.violations(gla, default.replace(solve="blocks"), CPU)[0]
    assert "sub_block <= chunk_size" in SPACE.violations(gla, default.replace(chunk_size=16, sub_block=32), CPU)[0]
    assert "GLA only" in SPACE.violations(gla.replace(rule="gdn"), default.replace(sub_block=4), CPU)[0]
    plain = gla.replace(num_partitions=0, top_k=0, read_k=0)
    assert "need partitions" in SPACE.violations(plain, default.replace(partitions="masked"), CPU)[0]
