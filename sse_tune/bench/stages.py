"""The stages of plans, each timed alone on the buffers that a run of the whole left: where the time of a plan goes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from sse_tune.device import Device
from sse_tune.plan import Plan
from sse_tune.runtime.pipeline import Execution
from sse_tune.tuning.inputs import Case
from sse_tune.tuning.jobs import in_graph, torch_device
from sse_tune.tuning.measure import Timing, compare


@dataclasses.dataclass(frozen=True)
class StageTime:
    """What one stage of a plan takes.

    Args:
        template: "backend.template".
        timing: warm, the L2 cache flushed; on a GPU as the replay of a CUDA graph.
    """

    template: str
    timing: Timing

    def to_dict(self) -> dict[str, object]:
        """Plain data, times in microseconds."""
        return {"template": self.template, "median_us": self.timing.median_us, "noise_us": self.timing.noise_us}


def time_stages(
    plans: Mapping[str, Plan], case: Case, device: Device, time_limit_s: float
) -> dict[str, dict[str, StageTime]]:
    """Plan's name to stage to its time; a plan of the one-stage graph has none.

    Args:
        plans: name to plan, each able to run the case's problem.
        case: the inputs.
        device: where.
        time_limit_s: of each plan.
    """
    found: dict[str, dict[str, StageTime]] = {}
    for name, plan in plans.items():
        if plan.graph == "whole":
            continue
        execution = Execution(plan, case.problem, case.inputs, scale=case.scale, keep=True)
        execution.forward()
        if case.problem.trains:
            execution.backward(case.do)
        calls = {stage: functools.partial(execution.run_stage, stage) for stage in plan.stages}
        timings = compare(calls, torch_device(device), time_limit_s=time_limit_s, graph=in_graph(plan, device))
        found[name] = {
            stage: StageTime(f"{choice.backend}.{choice.template}", timings[stage])
            for stage, choice in plan.stages.items()
        }
    return found
