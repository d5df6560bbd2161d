"""A sweep that nobody measured: times of three stages made of declared factors, for the logic of several stages."""

import dataclasses
import itertools
import math
import random

from sse_tune.device import ARCHS
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.space import Config, Param
from sse_tune.templates.registry import default_plan
from sse_tune.templates.stages import GRAPHS
from sse_tune.tuning.sweep_file import Sweep
from sse_tune.tuning.sweep_spaces import RecordedSpace, Row

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


OTHER_PARAMS = (Param("tile", (16, 32, 64), 16, "rows"), Param("warps", (4, 8), 4, "warps"))


def other_space_of(stage, outer):
    """A second template, with parameters of its own and a best config that is 10 % faster than the first one's."""
    best = min(row.time_us for row in space_of(stage, outer).rows.values() if row.time_us)
    rows = {}
    for tile in OTHER_PARAMS[0].values:
        for warps in OTHER_PARAMS[1].values:
            time = 0.9 * best * {16: 1.5, 32: 1.0, 64: 1.2}[tile] * (1.1 if warps == 4 else 1.0)
            rows[Config(tile=tile, warps=warps)] = Row("ok", None, (round(time, 2),) * 3)
    return RecordedSpace(stage, "tilelang", f"gdn_{stage}", outer, OTHER_PARAMS, rows)


MORE_PARAMS = (
    *PARAMS,
    Param("unroll", (1, 2, 4, 8, 16), 1, "rounds"),
    Param("order", ("rows", "columns", "tiles", "snake"), "rows", "of blocks"),
)


def large_space_of(stage, outer):
    """960 configs whose factors do not add up: pairs of parameters have something to do with each other, and every
    config is a little off what its parameters say."""
    draw = random.Random(f"{stage} {outer['chunk_size']} {stage == 'gradients' and outer['state_dtype']}")
    of_stage = random.Random(stage)
    factors = {p.name: [1 + 0.5 * of_stage.random() ** 2 for _ in p.values] for p in MORE_PARAMS}
    pairs = {
        (a.name, b.name): [[1 + 0.15 * of_stage.random() for _ in b.values] for _ in a.values]
        for a, b in itertools.combinations(MORE_PARAMS, 2)
    }
    rows = {}
    for places in itertools.product(*(range(len(p.values)) for p in MORE_PARAMS)):
        at = dict(zip((p.name for p in MORE_PARAMS), places))
        config = Config({p.name: p.values[at[p.name]] for p in MORE_PARAMS})
        time = BASE_US[stage] * (1.2 if outer["chunk_size"] == 32 else 1.0)
        time *= 1.3 if stage == "gradients" and outer["state_dtype"] == "fp32" else 1.0
        time *= math.prod(factors[name][place] for name, place in at.items())
        time *= math.prod(table[at[a]][at[b]] for (a, b), table in pairs.items()) * draw.uniform(0.98, 1.02)
        ok = compiles(config)
        rows[config] = Row("ok", None, (round(time, 2),)) if ok else Row("compile_error", "too large", ())
    return RecordedSpace(stage, "triton", f"gdn_{stage}", outer, MORE_PARAMS, rows)


def sweep(spaces_of=(space_of,)):
    """Each stage at each contract once, as `sse-tune sweep` records them.

    Args:
        spaces_of: (stage, outer) -> space: the templates.
    """
    spaces = [space_of(stage, outer) for stage in BASE_US for outer in OUTERS for space_of in spaces_of
              if stage == "gradients" or outer["state_dtype"] == "io"]  # fmt: skip
    return Sweep(
        problem=PROBLEM, device="synthetic", arch="sm_90", toolchain={"triton": "0"}, sources={"triton:gdn_scan": "0"},
        created="2026-01-01T00:00:00+00:00", how={"synthetic": True}, spaces=tuple(spaces),
    )  # fmt: skip


REST_US = 300.0  # of the stages that are not swept
CLASH_US = 200.0  # what a plan takes more than its stages do alone, where both have the same tile


def whole_us(plan):
    """Of a plan of `sweep_with_plans`: 300 us more than its stages, and 200 us more where both have one tile."""
    spaces = {stage: other_space_of(stage, plan.outer).rows for stage in plan.stages}
    times = [spaces[stage][choice.config].time_us for stage, choice in plan.stages.items()]
    clash = len({choice.config["tile"] for choice in plan.stages.values()}) == 1
    return REST_US + sum(times) + clash * CLASH_US


def sweep_with_plans():
    """Two stages of six configs at two chunk sizes, and every whole plan of them; the last scan never ran."""
    spaces, plans = [], {}
    for outer in (OUTERS[2], OUTERS[0]):
        choices = []
        for stage in ("prepare", "scan"):
            space = other_space_of(stage, outer)
            if stage == "scan":
                space.rows[Config(tile=64, warps=8)] = Row("compile_error", "too large", ())
            spaces.append(space)
            choices.append([space.choice(config) for config, row in space.rows.items() if row.outcome == "ok"])
        for prepare, scan in itertools.product(*choices):
            plan = Plan("staged", outer, {"prepare": prepare, "scan": scan})
            plans[plan] = Row("ok", None, (round(whole_us(plan), 2),) * 5)
    return dataclasses.replace(sweep(), spaces=tuple(spaces), plans=plans)


assert set(OUTERS) <= set(GRAPHS["staged"].configs(PROBLEM, DEVICE))
assert default_plan(PROBLEM, DEVICE, "triton").outer == OUTERS[2]
