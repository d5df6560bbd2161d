"""GDN with segments split into groups, in Triton's interpreter, against the reference.

Groups of two chunks of 16 rows: smaller than a search tries, and the same kernels, so that a hundred rows have first,
inner and last groups.
"""

import dataclasses

import pytest

from sse_tune.templates import registry
from sse_tune.templates.registry import templates_for
from tests.templates.against_reference import compare, make_inputs, outer_of, problem_of

pytestmark = pytest.mark.interpret


def split_problem(**changes):
    return problem_of("gdn", "after", **{**dict(seq_len=104, num_heads=1, num_partitions=2, top_k=1), **changes})


def split_outer(problem, split=2):
    return outer_of(problem, chunk_size=16, split=split)


def test_four_groups_of_the_shared_segment(poisoned_empty):
    """The sparse segments have two, one longer than the other."""
    problem = split_problem(head_dim_v=32)
    inputs = make_inputs(problem, initial=True, gate=0.05)
    compare(problem, inputs, poisoned_empty, outer=split_outer(problem))


@pytest.mark.parametrize("lengths", [(0, 64, 65, 1, 0), (1,) * 9], ids=str)
def test_groups_of_packed_sequences(lengths, poisoned_empty):
    problem = split_problem(seq_len=sum(lengths), num_sequences=len(lengths), num_partitions=0, top_k=0)
    inputs = make_inputs(problem, list(lengths), initial=True, gate=0.05)
    compare(problem, inputs, poisoned_empty, outer=split_outer(problem))


def test_states_that_are_absent(poisoned_empty):
    problem = split_problem(num_partitions=0, top_k=0)
    inputs = make_inputs(problem, gate=0.05)
    compare(problem, inputs, poisoned_empty, outer=split_outer(problem), final=False, d_final=False)


@pytest.mark.parametrize("gate", [0.0, 5.0, 1e3])
def test_gates(gate, poisoned_empty):
    problem = split_problem(num_partitions=0, top_k=0, head_dim=24, head_dim_v=40)
    compare(problem, make_inputs(problem, gate=gate), poisoned_empty, outer=split_outer(problem))


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_repeated_keys(beta, poisoned_empty):
    """Nothing fades between groups: what a transition loses is lost for good."""
    problem = split_problem(num_partitions=0, top_k=0)
    inputs = make_inputs(problem)
    k = inputs.k[:2].repeat(52, 1, 1)
    inputs = dataclasses.replace(inputs, k=k, beta=inputs.beta * 0 + beta, g=inputs.g * 1e-3)
    compare(problem, inputs, poisoned_empty, outer=split_outer(problem))


SPOILED = {"group_h": "group_states", "transitions": "group_states", "group_dh": "group_gradients"}


@pytest.mark.parametrize(("buffer", "stage"), SPOILED.items())
def test_a_broken_group_turns_the_check_red(buffer, stage, poisoned_empty, monkeypatch):
    problem = split_problem(num_partitions=0, top_k=0)
    (good,) = templates_for(stage, problem, ("triton",))

    def broken(call, tensors):
        good.run(call, tensors)
        tensors[buffer].mul_(1.01)  # transitions have done their work forwards: then a gradient shows it

    find, spoiled = registry.find_template, dataclasses.replace(good, run=broken)
    monkeypatch.setattr(
        "sse_tune.runtime.pipeline.find_template",
        lambda backend, name: spoiled if name == good.name else find(backend, name),
    )
    inputs = make_inputs(problem, initial=True, gate=0.05)
    with pytest.raises(AssertionError, match="worst row"):
        compare(problem, inputs, poisoned_empty, outer=split_outer(problem))
