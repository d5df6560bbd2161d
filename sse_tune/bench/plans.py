"""This project on one problem: the default plan and the best one known, timed in turn, beside the floor."""

from __future__ import annotations

import dataclasses
import pathlib

from sse_tune.bench.roofline import Floor, floor_of, measure_ceilings
from sse_tune.database.store import TuningDatabase
from sse_tune.device import Device
from sse_tune.problem import Problem
from sse_tune.runtime.dispatch import Decision, decide
from sse_tune.templates.registry import default_plan
from sse_tune.tuning.jobs import plan_call, torch_device
from sse_tune.tuning.measure import Timing, compare


@dataclasses.dataclass(frozen=True)
class Bench:
    """What one problem takes.

    Args:
        problem, decision: what was measured, and where its best plan comes from.
        timings: "default", and "best" where it is another plan.
        floor: of the machine.
    """

    problem: Problem
    decision: Decision
    timings: dict[str, Timing]
    floor: Floor

    def to_dict(self) -> dict[str, object]:
        """Plain data, times in microseconds."""
        return {
            "problem": self.problem.to_dict(),
            "bucket": self.problem.bucket.name,
            "source": self.decision.source,
            "timings": {
                name: {"median_us": timing.median_us, "noise_us": timing.noise_us, "repeats": len(timing.times_us)}
                for name, timing in self.timings.items()
            },
            "floor_us": self.floor.time_us,
            "fused_floor_us": self.floor.fused_us,
            "copy_bytes_per_s": self.floor.ceilings.copy_bytes_per_s,
            "matmul_flops_per_s": self.floor.ceilings.matmul_flops_per_s,
            "stages": [{**dataclasses.asdict(stage), "time_us": stage.time_us} for stage in self.floor.stages],
        }


def bench(
    problem: Problem,
    device: Device,
    database: TuningDatabase | str | pathlib.Path | None = None,
    time_limit_s: float = 5.0,
) -> Bench:
    """Times the default plan and the best known one on random inputs of the problem's size.

    Args:
        problem: what to run.
        device: the one of this process.
        database: where answers are; None: the user's default.
        time_limit_s: of the comparison; the ceilings take two seconds more.

    Raises:
        DatabaseError: the database cannot be read.
        ConstraintError: no plan can run the problem here.
    """
    decision = decide(problem, device, database)
    plans = {"default": default_plan(problem, device)}
    if decision.plan != plans["default"]:
        plans["best"] = decision.plan
    calls = {name: plan_call(plan, problem, device) for name, plan in plans.items()}
    timings = compare(calls, torch_device(device), time_limit_s=time_limit_s)
    outer = decision.plan.outer if decision.plan.graph == "staged" else None
    return Bench(problem, decision, timings, floor_of(problem, device, measure_ceilings(device, problem.dtype), outer))
