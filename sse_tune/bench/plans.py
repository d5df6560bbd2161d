"""One problem measured: this project's default plan, its best one and its peers in one comparison, beside the floor."""

from __future__ import annotations

import dataclasses
import pathlib

from sse_tune.bench.peers import PeerReport, peer_sides
from sse_tune.bench.roofline import measure_ceilings
from sse_tune.bench.sides import Side, SideResult, directions_of, graph_pool, own_sides, time_sides
from sse_tune.bench.stages import StageTime, time_stages
from sse_tune.database.store import TuningDatabase
from sse_tune.device import Device
from sse_tune.problem import Problem
from sse_tune.runtime.dispatch import Decision, decide
from sse_tune.templates.registry import default_plan
from sse_tune.templates.roofline import Ceilings, Floor, floor_of
from sse_tune.tuning.jobs import torch_device, workload


@dataclasses.dataclass(frozen=True)
class Bench:
    """What one problem takes.

    Args:
        problem: what was measured; a training problem also forward alone.
        decisions: direction -> where its best plan comes from.
        floors: direction -> the floor of the machine.
        results: each side in each direction, those of one direction together.
        peers: what was found of each peer; empty where none were asked for.
        stages: own plan -> stage -> its time alone; empty where not asked for.
    """

    problem: Problem
    decisions: dict[str, Decision]
    floors: dict[str, Floor]
    results: tuple[SideResult, ...]
    peers: tuple[PeerReport, ...]
    stages: dict[str, dict[str, StageTime]] = dataclasses.field(default_factory=dict)

    @property
    def decision(self) -> Decision:
        return self.decisions[self.problem.direction]

    @property
    def floor(self) -> Floor:
        return self.floors[self.problem.direction]

    def of(self, direction: str) -> dict[str, SideResult]:
        """Side to result, in one direction."""
        return {result.name: result for result in self.results if result.direction == direction}

    def to_dict(self) -> dict[str, object]:
        """Plain data, times in microseconds: `timings` and the floors are the problem's; `forward`: forward alone."""
        forward = None
        if self.problem.trains:
            forward = {
                "timings": {name: result.to_dict() for name, result in self.of("fwd").items()},
                "source": self.decisions["fwd"].source,
                "floor_us": self.floors["fwd"].time_us,
                "fused_floor_us": self.floors["fwd"].fused_us,
            }
        return {
            "problem": self.problem.to_dict(),
            "bucket": self.problem.bucket.name,
            "source": self.decision.source,
            "timings": {name: result.to_dict() for name, result in self.of(self.problem.direction).items()},
            "forward": forward,
            "peers": [peer.to_dict() for peer in self.peers],
            "floor_us": self.floor.time_us,
            "fused_floor_us": self.floor.fused_us,
            "copy_bytes_per_s": self.floor.ceilings.copy_bytes_per_s,
            "matmul_flops_per_s": self.floor.ceilings.matmul_flops_per_s,
            "stages": [{**dataclasses.asdict(stage), "time_us": stage.time_us} for stage in self.floor.stages],
            "stage_timings": {
                name: {stage: time.to_dict() for stage, time in times.items()} for name, times in self.stages.items()
            },
        }


def bench(
    problem: Problem,
    device: Device,
    database: TuningDatabase | str | pathlib.Path | None = None,
    time_limit_s: float = 5.0,
    *,
    peers: bool = False,
    ceilings: Ceilings | None = None,
    stages: bool = False,
) -> Bench:
    """Times everything that can run a problem, in turn, on random inputs of its size.

    Args:
        problem: what to run.
        device: the one of this process.
        database: where answers are; None: the user's default.
        time_limit_s: of the comparison.
        peers: other implementations too.
        ceilings: of the device, measured before in this process; None: they are measured now, two seconds more.
        stages: each stage of this project's plans alone, too.

    Raises:
        DatabaseError: the database cannot be read.
        ConstraintError: no plan can run the problem here.
    """
    where = torch_device(device)
    case = workload(problem, where)
    pool = graph_pool(device)
    decisions: dict[str, Decision] = {}
    sides: list[Side] = []
    for direction in directions_of(problem):
        posed = problem.replace(direction=direction)
        decisions[direction] = decide(posed, device, database)
        plans = {"default": default_plan(posed, device)}
        if decisions[direction].plan != plans["default"]:
            plans["best"] = decisions[direction].plan
        for name, plan in plans.items():
            sides.extend(own_sides(name, plan, posed, device, case, pool))
    others, reports = peer_sides(problem, device, case) if peers else ([], [])
    results = time_sides([*sides, *others], where, time_limit_s)
    found = ceilings or measure_ceilings(device, problem.dtype)
    floors = {way: _floor(problem.replace(direction=way), device, found, decisions[way]) for way in decisions}
    alone = time_stages(plans, case, device, time_limit_s) if stages else {}  # of the last direction: the problem's
    return Bench(problem, decisions, floors, tuple(results), tuple(reports), alone)


def _floor(problem: Problem, device: Device, ceilings: Ceilings, decision: Decision) -> Floor:
    outer = decision.plan.outer if decision.plan.graph == "staged" else None
    return floor_of(problem, device, ceilings, outer)
