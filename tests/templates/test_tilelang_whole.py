"""Whole TileLang plans against the reference, gradients too, as generated for sm_80 and sm_90. Needs no GPU.

TileLang's kernels run in the emulator, `emulated_cuda` says what that can show; the others in Triton's interpreter.
"""

import dataclasses

import pytest

from sse_tune.device import ARCHS
from sse_tune.problem import Problem
from sse_tune.templates import registry
from tests.templates import emulated_cuda
from tests.templates.against_reference import compare, make_inputs
from tests.templates.emulated_cuda import Launcher, Mode

lacks = emulated_cuda.missing()
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(lacks is not None, reason=f"nothing to emulate with: {lacks}"),
]
FULL_NAMES = {"sm_80": "sm_80", "sm_90": "sm_90a"}
OF_TRITON = {"routing", "combine", "combine_gradients"}


@pytest.mark.parametrize(
    ("rule", "states", "arch", "changes"),
    [
        ("gdn", "recompute", "sm_80", {}),
        ("gdn", "store", "sm_90", {"prepare": {"products": "tf32x3", "solve_block": 16}}),
        ("gla", "store", "sm_80", {}),
        ("gla", "joint", "sm_80", {}),
    ],
    ids=str,
)
def test_it_matches_the_reference(rule, states, arch, changes, poisoned_empty):
    problem = Problem(
        rule=rule, seq_len=150, num_heads=1, head_dim=64, head_dim_v=64, num_partitions=3, top_k=2, dtype="fp16",
        num_sequences=3, norm="before",
    )  # fmt: skip
    outer = registry.default_plan(problem, ARCHS[arch], "tilelang").outer.replace(states=states)
    plan = registry.default_plan(problem, ARCHS[arch], "tilelang", outer)
    for stage, values in changes.items():
        choice = plan.stages[stage]
        plan = plan.replace_stage(stage, dataclasses.replace(choice, config=choice.config.replace(**values)))
    assert all(plan.stages[name].backend == "tilelang" for name in plan.stages if name not in OF_TRITON)
    launcher = Launcher(Mode("late", "scattered"), arch=FULL_NAMES[arch])
    compare(problem, make_inputs(problem, [0, 79, 71], initial=True), poisoned_empty, plan=plan, launcher=launcher)
