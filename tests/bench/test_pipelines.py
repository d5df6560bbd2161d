"""The pipelines over an exact chunk op are the operation itself, gradients too: peers compute what we compute."""

import dataclasses

import pytest
import torch

from sse_tune.bench import pipelines
from sse_tune.bench.sides import forward_call, training_call
from sse_tune.problem import Problem
from sse_tune.reference import recurrent
from sse_tune.tuning.compare import exact
from sse_tune.tuning.jobs import workload


def exact_op(q, k, v, g, beta, scale, normalise, offsets):
    """A chunk op that is the definition."""
    return recurrent(q, k, v, g, None, beta=beta, qk_l2norm=normalise, scale=scale, cu_seqlens=offsets)[0]


def posed(rule="gdn", norm="before", **more):
    sizes = {"seq_len": 14, "num_heads": 2, "head_dim": 8, "head_dim_v": 4, "dtype": "fp32"}
    return Problem(**{"rule": rule, "norm": norm, **sizes, **more})


def fine(case):
    """The inputs of a case in float64."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in case.inputs.present().items()}
    return dataclasses.replace(case.inputs, **wide)


@pytest.mark.parametrize("pipeline", pipelines.LAYOUTS)
@pytest.mark.parametrize("norm", ["none", "after", "before"])
@pytest.mark.parametrize("rule", ["gla", "gdn"])
@pytest.mark.parametrize(
    "more",
    [
        {"batch": 2}, {"num_sequences": 3}, {"shared": False, "num_sequences": 2}, {"num_partitions": 3, "top_k": 3},
        {"seq_len": 3, "num_sequences": 5}, {"num_partitions": 16, "top_k": 1},
        {"num_partitions": 0, "top_k": 0, "read_k": 0, "batch": 2},
    ],
    ids=str,
)  # fmt: skip
def test_pipelines_over_the_reference_are_our_operation(pipeline, rule, norm, more):
    problem = posed(rule, norm, **more)
    case = workload(problem, "cpu")
    expected = exact(case).results

    def run(inputs):
        return pipelines.run_pipeline(pipeline, problem, inputs, exact_op, case.scale)

    found = training_call(run, fine(case), case.do.double())()
    assert set(found) == set(expected)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(forward_call(run, fine(case))(), expected["o"], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("pipeline", pipelines.LAYOUTS)
@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_pipelines_keep_the_dtype_they_are_given(pipeline, dtype, bound):
    problem = posed(dtype=dtype)
    case = workload(problem, "cpu")
    seen = []

    def op(*arguments):
        seen.extend(x.dtype for x in arguments[:3])
        return exact_op(*(x.double() if isinstance(x, torch.Tensor) else x for x in arguments[:5]), *arguments[5:]).to(
            arguments[0].dtype
        )

    found = training_call(
        lambda inputs: pipelines.run_pipeline(pipeline, problem, inputs, op, case.scale), case.inputs, case.do
    )()
    assert set(seen) == {case.inputs.q.dtype}
    for name, x in exact(case).results.items():
        assert found[name].dtype == (case.do if name == "o" else getattr(case.inputs, name[2:])).dtype
        if name != "d_router_logits":  # of a norm taken of gated keys it is next to nothing
            assert (found[name].double() - x).norm() < bound * x.norm(), name


def test_varlen_sorts_by_sequence_partition_and_time():
    problem = posed(seq_len=6, num_sequences=2, num_partitions=3, top_k=1)
    case = workload(problem, "cpu")
    choice = torch.tensor([2, 0, 2, 1, 1, 0])
    inputs = dataclasses.replace(
        case.inputs,
        router_logits=torch.nn.functional.one_hot(choice, 3).float(),
        cu_seqlens=torch.tensor([0, 3, 6]).int(),
    )
    layout = pipelines.varlen_layout(problem, inputs)
    assert layout.source.tolist() == [1, 0, 2, 5, 3, 4]
    assert layout.rows.flatten().tolist() == [1, 0, 2, 4, 5, 3]
    assert layout.segments.tolist() == [0, 1, 1, 3, 4, 6, 6]


def test_mask_makes_a_row_of_each_token_and_partition():
    problem = posed(seq_len=2, num_partitions=3, top_k=1)
    inputs = dataclasses.replace(
        workload(problem, "cpu").inputs, router_logits=torch.tensor([[0.0, 9, 0], [9.0, 0, 0]])
    )
    layout = pipelines.mask_layout(problem, inputs)
    assert layout.mask.tolist() == [0, 1, 1, 0, 0, 0]
    assert layout.source.tolist() == [0, 1] * 3
    assert layout.rows.tolist() == [[0, 2, 4], [1, 3, 5]]
    assert layout.segments is None
    assert layout.weight.count_nonzero() == 2


def test_batch_rows_need_no_offsets_in_the_mask_form():
    problem = posed(batch=2)
    case = workload(problem, "cpu")
    shapes = []

    def op(q, k, v, g, beta, scale, normalise, offsets):
        shapes.append((tuple(q.shape), offsets))
        return v

    pipelines.run_pipeline("mask", problem, case.inputs, op, case.scale)
    assert shapes == [(((1 + 4) * 2, 14, 2, 8), None)]
