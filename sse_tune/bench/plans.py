"""One problem measured: this project's default plan, its best one and its peers in one comparison, beside the floor."""

from __future__ import annotations

import dataclasses
import pathlib

import torch

from sse_tune.bench.memory import LeftOut, free, leaving_out
from sse_tune.bench.peers import PeerReport, peer_sides
from sse_tune.bench.roofline import measure_ceilings
from sse_tune.bench.sides import Side, SideResult, directions_of, graph_pool, grouped_side, own_sides, time_what_fits
from sse_tune.bench.stages import StageTime, time_stages
from sse_tune.database.store import TuningDatabase
from sse_tune.device import Device
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.runtime.dispatch import Decision, decide
from sse_tune.templates.registry import default_plan
from sse_tune.templates.roofline import Ceilings, Floor, floor_of
from sse_tune.tuning.inputs import Case, skewed_logits
from sse_tune.tuning.jobs import torch_device, workload

SKEWED = ", skewed"  # ends the name of a side that has a router with preferences


@dataclasses.dataclass(frozen=True)
class Bench:
    """What one problem takes.

    Args:
        problem: what was measured; a training problem also forward alone.
        decisions: direction -> where its best plan comes from.
        floors: direction -> the floor of the machine.
        results: each side in each direction, those of one direction together; empty where the inputs do not fit.
        peers: what was found of each peer; empty where none were asked for.
        stages: own plan -> stage -> its time alone; empty where not asked for.
        left_out: what did not fit in memory.
        occupancy: the share of tokens that choose each partition first, in the sides whose name ends in `SKEWED`; None:
            there are none.
        grouped: number of head groups -> direction -> where the plan of one group comes from.
    """

    problem: Problem
    decisions: dict[str, Decision]
    floors: dict[str, Floor]
    results: tuple[SideResult, ...]
    peers: tuple[PeerReport, ...]
    stages: dict[str, dict[str, StageTime]] = dataclasses.field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    occupancy: tuple[float, ...] | None = None
    grouped: dict[int, dict[str, Decision]] = dataclasses.field(default_factory=dict)

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
        """Plain data, times in microseconds: `timings`, the floors and the best plan with its source are the problem's;
        `forward`: of the forward pass alone."""
        forward = None
        if self.problem.trains:
            forward = {
                "timings": {name: result.to_dict() for name, result in self.of("fwd").items()},
                **_plan(self.decisions["fwd"]),
                "floor_us": self.floors["fwd"].time_us,
                "fused_floor_us": self.floors["fwd"].fused_us,
            }
        return {
            "problem": self.problem.to_dict(),
            "bucket": self.problem.bucket.name,
            "occupancy": self.occupancy,
            **_plan(self.decision),
            "timings": {name: result.to_dict() for name, result in self.of(self.problem.direction).items()},
            "forward": forward,
            "head_groups": {
                groups: {way: _plan(decision) for way, decision in found.items()}
                for groups, found in self.grouped.items()
            },
            "peers": [peer.to_dict() for peer in self.peers],
            "left_out": [dataclasses.asdict(part) for part in self.left_out],
            "floor_us": self.floor.time_us,
            "fused_floor_us": self.floor.fused_us,
            "copy_bytes_per_s": self.floor.ceilings.copy_bytes_per_s,
            "matmul_flops_per_s": self.floor.ceilings.matmul_flops_per_s,
            "stages": [{**dataclasses.asdict(stage), "time_us": stage.time_us} for stage in self.floor.stages],
            "stage_timings": {
                name: {stage: time.to_dict() for stage, time in times.items()} for name, times in self.stages.items()
            },
        }


def grouped_name(groups: int) -> str:
    """The side of the best plan with its heads in so many groups."""
    return f"best, {groups} head groups"


def _plan(decision: Decision) -> dict[str, object]:
    """The best plan, by its key too, which is the same wherever the plan is; and where it comes from."""
    plan = decision.plan
    return {"source": decision.source, "reason": decision.reason, "plan_key": plan.key, "plan": plan.to_dict()}


def bench(
    problem: Problem,
    device: Device,
    database: TuningDatabase | str | pathlib.Path | None = None,
    time_limit_s: float = 5.0,
    *,
    peers: bool = False,
    ceilings: Ceilings | None = None,
    stages: bool = False,
    occupancy: tuple[float, ...] | None = None,
    head_groups: tuple[int, ...] = (),
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
        occupancy: shares of first choices by partition: every side a second time, with a router that has them.
        head_groups: the best plan also with its heads in so many groups, each a divisor of H.

    Returns:
        Bench: what does not fit in the device's memory is in its `left_out`.

    Raises:
        DatabaseError: the database cannot be read.
        ConstraintError: no plan can run the problem here.
    """
    where = torch_device(device)
    workload.cache_clear()  # the inputs of the problem before would lie beside these
    free()
    ceilings = ceilings or measure_ceilings(device, problem.dtype)
    decisions = {way: decide(problem.replace(direction=way), device, database) for way in directions_of(problem)}
    plans = {way: _plans(problem.replace(direction=way), device, decisions[way]) for way in decisions}
    floors = {way: _floor(problem.replace(direction=way), device, ceilings, decisions[way]) for way in decisions}
    left_out: list[LeftOut] = []
    cases: dict[str, Case] = {}
    with leaving_out("inputs", problem.direction, left_out):
        cases = _cases(problem, where, occupancy)
    sides: list[Side] = []
    pool = graph_pool(device)
    for direction, own in plans.items():
        posed = problem.replace(direction=direction)
        for name, plan in own.items():
            for suffix, case in cases.items():
                sides.extend(own_sides(name + suffix, plan, posed, device, case, pool, left_out))
    grouped: dict[int, dict[str, Decision]] = {}
    for groups in head_groups:
        part = problem.replace(num_heads=problem.num_heads // groups)
        grouped[groups] = {way: decide(part.replace(direction=way), device, database) for way in decisions}
        for way, decision in grouped[groups].items():
            posed = part.replace(direction=way)
            for suffix, case in cases.items():
                name = grouped_name(groups) + suffix
                sides.extend(grouped_side(name, groups, decision.plan, posed, device, case, left_out))
    others, reports = peer_sides(problem, device, cases) if peers and cases else ([], [])
    sides.extend(others)
    results = time_what_fits(sides, where, time_limit_s, left_out) if sides else []
    alone: dict[str, dict[str, StageTime]] = {}
    if stages:
        for suffix, case in cases.items():
            with leaving_out("stages" + suffix, problem.direction, left_out):
                named = {name + suffix: plan for name, plan in plans[problem.direction].items()}
                alone |= time_stages(named, case, device, time_limit_s)
    return Bench(problem, decisions, floors, tuple(results), tuple(reports), alone, tuple(left_out), occupancy, grouped)


def plans_of(
    problem: Problem,
    device: Device,
    database: TuningDatabase | str | pathlib.Path | None = None,
    head_groups: tuple[int, ...] = (),
) -> list[tuple[Problem, Plan]]:
    """What `bench` runs of this project: each plan, and what it is run for."""
    found = []
    for way in directions_of(problem):
        posed = problem.replace(direction=way)
        found += [(posed, plan) for plan in _plans(posed, device, decide(posed, device, database)).values()]
        for groups in head_groups:
            part = posed.replace(num_heads=problem.num_heads // groups)
            found.append((part, decide(part, device, database).plan))
    return found


def _plans(problem: Problem, device: Device, decision: Decision) -> dict[str, Plan]:
    """The plans to time, by the name of their side."""
    plans = {"default": default_plan(problem, device)}
    return plans if decision.plan == plans["default"] else {**plans, "best": decision.plan}


def _cases(problem: Problem, where: str, occupancy: tuple[float, ...] | None) -> dict[str, Case]:
    """What follows the name of a side -> its inputs, which differ in the router's logits only and share all else."""
    case = workload(problem, where)
    if occupancy is None:
        return {"": case}
    logits = skewed_logits(len(case.do), occupancy, torch.Generator(where).manual_seed(1))
    return {"": case, SKEWED: dataclasses.replace(case, inputs=dataclasses.replace(case.inputs, router_logits=logits))}


def _floor(problem: Problem, device: Device, ceilings: Ceilings, decision: Decision) -> Floor:
    outer = decision.plan.outer if decision.plan.graph == "staged" else None
    return floor_of(problem, device, ceilings, outer)
