"""Walks along a segment fetch the next chunks while they work at one: read from what Triton makes of them for sm_90.

A wait that leaves no copy in flight waits for what was issued at the end of the step before, at any number of stages.
"""

import re

import pytest

from sse_tune.compile import record_launches
from sse_tune.compilers.triton import specialise
from sse_tune.device import ARCHS
from sse_tune.problem import Problem
from sse_tune.templates.registry import default_plan, find_template

GDN, GLA = "spikingbrain2-5b", "sse-gla-128"


@pytest.mark.parametrize(
    ("name", "preset", "states"),
    [("gdn_scan", GDN, "recompute"), ("gdn_scan", GDN, "store"), ("gdn_recompute", GDN, "recompute"),
     ("gdn_state_gradient", GDN, "recompute"), ("gla_states", GLA, "store"), ("gla_states_backward", GLA, "store"),
     ("gla_states_output", GLA, "joint"), ("gla_states_value_gradients", GLA, "joint")],
)  # fmt: skip
def test_copies_stay_in_flight(name, preset, states):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    problem, device = Problem.preset(preset), ARCHS["sm_90"]
    outer, template = default_plan(problem, device, "triton").outer, find_template("triton", name)
    outer = outer.replace(states=states)
    config = template.space.default(problem, device, outer)
    assert config["num_stages"] == 3, "two overlap nothing"
    (launch,) = record_launches(template, problem, outer, config, with_states=False)
    target = GPUTarget("cuda", device.capability, 32)
    signature, constants, attributes = specialise(launch, target)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options)
    loop = compiled.asm["ttgir"].split("scf.for")[-1]
    waits = [int(number) for number in re.findall(r"async_wait .*num = (\d+)", loop)]
    assert waits[0] > 0, waits
