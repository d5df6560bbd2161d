"""Every address that a kernel loads from or stores to lies within a tensor it was handed: in Triton's interpreter.

Values read out of bounds show in no result where they are masked afterwards, or where nothing is made of them.
"""

import numpy as np
import pytest
import torch

from tests.templates.against_reference import compare, make_inputs, outer_of, problem_of

pytestmark = pytest.mark.interpret

LENGTHS = (0, 17, 0, 1, 33, 16, 0)  # empty sequences first, in between and last


@pytest.fixture
def guarded(monkeypatch):
    """Refuses addresses outside the tensors of the launch that runs."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    allowed = []

    def launch(self, *args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        spans = {(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in tensors}
        allowed[:] = zip(*sorted(spans))
        return run(self, *args, **kwargs)

    def check(pointers, mask):
        every, used = np.broadcast_arrays(pointers.data, mask.data.astype(bool))
        addresses = np.unique(every[used].astype(np.int64))
        begins, ends = map(np.array, allowed)
        inside = ((addresses[:, None] >= begins) & (addresses[:, None] < ends)).any(1)
        assert inside.all(), f"{(~inside).sum()} of {len(inside)} addresses lie in no tensor of the launch"

    def masked_load(self, pointers, mask, *rest):
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def masked_store(self, pointers, value, mask, *rest):
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    run, builder = GridExecutor.__call__, InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    monkeypatch.setattr(GridExecutor, "__call__", launch)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", masked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", masked_store)


@pytest.mark.parametrize("choices", [
    ("gdn", {"split": 0}), ("gdn", {"split": 2}), ("gdn", {"split": 2, "states": "store"}),
    ("gla", {"states": "store"}), ("gla", {"states": "joint"}), ("gla", {"states": "recompute"}),
], ids=str)  # fmt: skip
def test_no_address_lies_outside_the_tensors(choices, guarded, poisoned_empty):
    rule, outer = choices
    problem = problem_of(rule, "after", seq_len=sum(LENGTHS), num_sequences=len(LENGTHS), num_heads=2,
                         num_partitions=2, top_k=1)  # fmt: skip
    inputs = make_inputs(problem, list(LENGTHS), initial=True)
    compare(problem, inputs, poisoned_empty, outer=outer_of(problem, chunk_size=16, **outer))
