"""GDN with states kept, in Triton's interpreter: what the scan keeps has the bits that a walk of its own would make."""

import pytest
import torch

from sse_tune.compile import GpuLauncher
from sse_tune.runtime.pipeline import Execution, saved_names, sizes_of
from sse_tune.space import Config
from sse_tune.templates.registry import Call, default_plan, find_template
from tests.templates.against_reference import DEVICE, compare, make_inputs, outer_of, problem_of

pytestmark = pytest.mark.interpret

SPLITS = pytest.mark.parametrize("split", [0, 2])
LENGTHS = (0, 33, 1, 49, 0)  # with a split: two groups, the last one of a row; no boundary; two groups


def packed(norm="after", **changes):
    sizes = dict(seq_len=sum(LENGTHS), num_sequences=len(LENGTHS), num_heads=1, num_partitions=2, top_k=1)
    return problem_of("gdn", norm, **{**sizes, **changes})


def outer_with(problem, states, split=0, **changes):
    return outer_of(problem, chunk_size=16, states=states, split=split, **changes)


def forward_of(problem, inputs, outer, allocate):
    plan = default_plan(problem, DEVICE, "triton", outer)
    execution = Execution(plan, problem, inputs, scale=0.25, output_final_state=True, allocate=allocate, keep=True)
    execution.forward()
    return execution


@SPLITS
@pytest.mark.parametrize(
    ("changes", "stored"),
    [({}, "io"), ({"dtype": "fp16"}, "io"), ({"dtype": "fp16"}, "fp32"), ({"head_dim": 24, "head_dim_v": 72}, "io")],
    ids=str,
)
def test_what_the_scan_keeps_is_what_recompute_makes(changes, stored, split, poisoned_empty):
    problem = packed(**changes)
    inputs = make_inputs(problem, list(LENGTHS), initial=True, gate=0.05)
    outer = outer_with(problem, "store", split, state_dtype=stored)
    kept = forward_of(problem, inputs, outer, poisoned_empty)
    again = {name: poisoned_empty(kept.tensors[name].shape, kept.tensors[name].dtype, "cpu") for name in ("h", "w")}
    recompute = find_template("triton", "gdn_recompute")
    config = Config({**outer, **recompute.space.default(problem, DEVICE, outer)})
    recompute.run(Call(sizes_of(kept.plan, problem), config, GpuLauncher(), 0.25), {**kept.tensors, **again})
    assert again["h"].dtype == (torch.float16 if stored == "io" and problem.dtype == "fp16" else torch.float32)
    written = ~again["h"].isnan().flatten(1).any(1)
    assert 0 < written.sum() < len(written), "there may be fewer boundaries than their bound"
    assert not again["w"].isnan().any()
    for name, tensor in again.items():
        torch.testing.assert_close(kept.tensors[name], tensor, rtol=0, atol=0, equal_nan=True)
    plain = forward_of(problem, inputs, outer.replace(states="recompute"), poisoned_empty)
    assert not {"h", "w"} & set(plain.tensors)
    for name in ("o", "final_state"):
        assert torch.equal(kept.tensors[name], plain.tensors[name]), name


@SPLITS
@pytest.mark.parametrize("norm", ["none", "after", "before"])
def test_both_passes(norm, split, poisoned_empty):
    problem = packed(norm)
    inputs = make_inputs(problem, list(LENGTHS), initial=True)
    compare(problem, inputs, poisoned_empty, outer=outer_with(problem, "store", split))


@pytest.mark.parametrize("changes", [
    dict(num_partitions=0, top_k=0, num_heads=2), dict(head_dim=24, head_dim_v=72), dict(shared=False, read_k=2),
], ids=str)  # fmt: skip
def test_other_problems(changes, poisoned_empty):
    problem = packed(**changes)
    compare(problem, make_inputs(problem, list(LENGTHS)), poisoned_empty, outer=outer_with(problem, "store"))


@pytest.mark.parametrize("gate", [0.0, 5.0, 1e3])
def test_gates(gate, poisoned_empty):
    problem = problem_of("gdn", seq_len=50, num_heads=1, num_partitions=0, top_k=0)
    inputs = make_inputs(problem, gate=gate, initial=True)
    compare(problem, inputs, poisoned_empty, outer=outer_with(problem, "store"), final=False, d_final=False)


@SPLITS
def test_the_backward_pass_has_what_the_forward_pass_leaves(split, poisoned_empty):
    """By way of `saved` and `restore`, as autograd does it: h and w live in between, and nothing is walked again."""
    problem = packed()
    inputs, outer = make_inputs(problem, list(LENGTHS), initial=True), outer_with(problem, "store", split)
    plan, do = default_plan(problem, DEVICE, "triton", outer), torch.ones_like(inputs.v)
    assert "recompute" not in plan.stages
    assert {"h", "w"} <= set(saved_names(plan, problem))
    forward = Execution(plan, problem, inputs, scale=0.25, allocate=poisoned_empty)
    forward.forward()
    restored = Execution.restore(plan, problem, inputs, forward.saved(), scale=0.25, allocate=poisoned_empty)
    direct, again = forward.backward(do), restored.backward(do)
    assert not {"h", "w"} & set(forward.tensors), "dropped by their last reader"
    for name, tensor in direct.items():
        assert not tensor.isnan().any(), name
        assert torch.equal(again[name], tensor), name
