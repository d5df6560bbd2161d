"""Whole TileLang plans against the reference, gradients too, as generated for sm_80 and sm_90. Needs no GPU.

TileLang's kernels run in the emulator, `emulated_cuda` says what that can show; the others in Triton's interpreter.
"""

import dataclasses

import pytest
import torch

from sse_tune.device import ARCHS
from sse_tune.problem import Problem
from sse_tune.runtime.pipeline import DTYPES, Execution
from sse_tune.templates import registry
from tests.templates import emulated_cuda
from tests.templates.against_reference import compare, make_inputs
from tests.templates.emulated_cuda import Launcher, Mode

lacks = emulated_cuda.missing()
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(lacks is not None, reason=f"nothing to emulate with: {lacks}"),
]
OF_TRITON = {"routing", "combine", "combine_gradients"}


PROBLEM = Problem(
    rule="gdn", seq_len=150, num_heads=1, head_dim=64, head_dim_v=64, num_partitions=3, top_k=2, dtype="fp16",
    num_sequences=3, norm="before",
)  # fmt: skip
LENGTHS = [0, 79, 71]
BY_FP32 = {"prepare": {"products": "fp32", "solve_block": 32}}


def plan_of(problem, arch, changes=None, **outer):
    """The default with other choices: outer ones, and of stages."""
    device = ARCHS[arch]
    outer = registry.default_plan(problem, device, "tilelang").outer.replace(**outer)
    plan = registry.default_plan(problem, device, "tilelang", outer)
    assert all(plan.stages[name].backend == "tilelang" for name in plan.stages if name not in OF_TRITON)
    for name, change in (changes or {}).items():
        choice = plan.stages[name]
        plan = plan.replace_stage(name, dataclasses.replace(choice, config=choice.config.replace(**change)))
    registry.validate_plan(plan, problem, device)
    return plan


@pytest.mark.parametrize(
    ("rule", "states", "arch", "changes", "dtype", "gates"),
    [
        ("gdn", "recompute", "sm_80", BY_FP32, "fp16", "fp32"),
        ("gdn", "store", "sm_90", None, "fp16", "fp32"),
        ("gla", "store", "sm_80", None, "fp16", "fp16"),
        ("gla", "joint", "sm_80", None, "fp16", "fp32"),
        ("gla", "joint", "sm_90", None, "bf16", "bf16"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_it_matches_the_reference(rule, states, arch, changes, dtype, gates, poisoned_empty):
    problem = PROBLEM.replace(rule=rule, dtype=dtype)
    # far gates of GLA are left to a Triton kernel, and its interpreter multiplies bf16 as integers
    inputs = make_inputs(problem, LENGTHS, initial=True, gate=0.25 if dtype == "bf16" else 1.0)
    inputs = dataclasses.replace(inputs, **{n: getattr(inputs, n).to(DTYPES[gates]) for n in ("g", "shared_g")})
    launcher = Launcher(Mode("late", "scattered"), arch=arch)
    compare(problem, inputs, poisoned_empty, plan=plan_of(problem, arch, changes, states=states), launcher=launcher)


@pytest.mark.parametrize("mode", [Mode("late", "forward"), Mode("late", "scattered")], ids=str)
def test_inverses_by_tensor_cores_are_as_exact_as_fp32(mode, poisoned_empty):
    """Of keys that repeat, with beta 2 and hardly a gate: a single tf32 product would not do."""
    inputs = make_inputs(PROBLEM, LENGTHS, gate=1e-3)
    k = inputs.k[:2].repeat(PROBLEM.seq_len // 2, 1, 1)
    twos = torch.full_like(inputs.beta, 2.0)
    inputs = dataclasses.replace(inputs, k=k, shared_k=k, beta=twos, shared_beta=twos)

    def inverse(changes):
        execution = Execution(
            plan_of(PROBLEM, "sm_90", changes), PROBLEM, inputs, scale=1.0, allocate=poisoned_empty,
            launcher=Launcher(mode), keep=True,
        )  # fmt: skip
        execution.forward()
        return execution.tensors["A"].double()

    expected, actual = inverse(BY_FP32), inverse(None)
    assert torch.equal(actual.isnan(), expected.isnan()), "rows that nobody writes"
    assert expected.nan_to_num().abs().max() >= 1
    assert (actual - expected).nan_to_num().norm() <= 1e-4 * expected.nan_to_num().norm()
