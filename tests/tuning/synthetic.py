"""A sweep that nobody measured: times of three stages made of declared factors, for the logic of several stages."""

from sse_tune.device import ARCHS
from sse_tune.problem import Problem
from sse_tune.space import Config, Param
from sse_tune.templates.registry import default_plan
from sse_tune.templates.stages import GRAPHS
from sse_tune.tuning.sweep_file import RecordedSpace, Row, Sweep

PROBLEM = Problem.preset("spikingbrain2-5b")
DEVICE = ARCHS["sm_90"]
PARAMS = (
    Param("block", (32, 64, 128, 256), 64, "rows"),
    Param("warps", (1, 2, 4, 8), 4, "warps"),
    Param("stages", (1, 2, 3), 1, "in flight"),
)
BASE_US = {"prepare": 700.0, "scan": 600.0, "gradients": 1600.0}
FACTORS = {
    "prepare": {"block": (1.3, 1.15, 1.0, 1.2), "warps": (1.25, 1.0, 1.1, 1.3), "stages": (1.1, 1.0, 1.02)},
    "scan": {"block": (1.0, 1.2, 1.3, 1.6), "warps": (1.4, 1.2, 1.1, 1.0), "stages": (1.3, 1.1, 1.0)},
    "gradients": {"block": (1.5, 1.2, 1.1, 1.0), "warps": (1.3, 1.1, 1.0, 1.15), "stages": (1.0, 1.05, 1.2)},
}
OUTERS = tuple(
    Config(chunk_size=c, state_dtype=dtype, states="recompute", split=0) for c in (32, 64) for dtype in ("io", "fp32")
)


def time_us(stage, outer, config):
    time = BASE_US[stage] * (1.2 if outer["chunk_size"] == 32 else 1.0)
    time *= 1.3 if stage == "gradients" and outer["state_dtype"] == "fp32" else 1.0
    for param in PARAMS:
        time *= FACTORS[stage][param.name][param.values.index(config[param.name])]
    return time


def compiles(config):
    return config["block"] * config["warps"] < 2048


def space_of(stage, outer):
    rows = {}
    for block in PARAMS[0].values:
        for warps in PARAMS[1].values:
            for stages in PARAMS[2].values:
                config = Config(block=block, warps=warps, stages=stages)
                ok = compiles(config)
                times = (round(time_us(stage, outer, config), 2),) * 3 if ok else ()
                rows[config] = Row("ok" if ok else "compile_error", None if ok else "too large", times)
    return RecordedSpace(stage, "triton", f"gdn_{stage}", outer, PARAMS, rows)


def sweep():
    """Each stage at each contract once, as `sse-tune sweep` records them."""
    spaces = [space_of(stage, outer) for stage in BASE_US for outer in OUTERS
              if stage == "gradients" or outer["state_dtype"] == "io"]  # fmt: skip
    return Sweep(
        problem=PROBLEM, device="synthetic", arch="sm_90", toolchain={"triton": "0"}, sources={"triton:gdn_scan": "0"},
        created="2026-01-01T00:00:00+00:00", how={"synthetic": True}, spaces=tuple(spaces),
    )  # fmt: skip


assert set(OUTERS) <= set(GRAPHS["staged"].configs(PROBLEM, DEVICE))
assert default_plan(PROBLEM, DEVICE, "triton").outer == OUTERS[2]
