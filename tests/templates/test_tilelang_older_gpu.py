"""TileLang's code for sm_80 (mma, no wgmma), assembled for the GPU that is here, against the reference.

What an A100's own assembler makes of it, and its limits, are not seen here.
"""

import functools

import pytest
import torch

from sse_tune.compilers import cubin, tilelang
from sse_tune.device import ARCHS
from sse_tune.problem import Problem
from sse_tune.templates.registry import default_plan
from sse_tune.tuning.cases import FINAL
from sse_tune.tuning.check import check_plan

OLDER = "sm_80"


@pytest.fixture
def built_for(monkeypatch):
    """The architectures that TileLang's programs are built for while this GPU runs them: OLDER alone."""
    asked = []

    def gencode(arch):
        asked.append(arch)
        major, minor = torch.cuda.get_device_capability()
        return f"-gencode=arch={arch.replace('sm', 'compute')},code=sm_{major}{minor}"

    tilelang.build.cache_clear()
    monkeypatch.setattr(tilelang, "_gencode", gencode)
    monkeypatch.setattr(cubin, "loaded", functools.lru_cache(lambda program, device: cubin.Loaded(program, OLDER)))
    yield asked
    tilelang.build.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("rule", "states"), [("gdn", "recompute"), ("gdn", "store"), ("gla", "store"), ("gla", "joint")]
)
def test_it_is_admitted(rule, states, dtype, built_for):
    problem = Problem(
        rule=rule, seq_len=700, num_heads=4, head_dim=128, head_dim_v=128, num_partitions=4, top_k=2, dtype=dtype,
        num_sequences=3, norm="before",
    )  # fmt: skip
    outer = default_plan(problem, ARCHS[OLDER], "tilelang").outer.replace(states=states)
    plan = default_plan(problem, ARCHS[OLDER], "tilelang", outer)
    report = check_plan(plan, problem, ARCHS[OLDER], names=FINAL, scale="full")
    assert report.passed, report.reason
    assert set(built_for) == {OLDER}
