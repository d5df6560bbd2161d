"""`bench`: the default plan, the best one known and this machine's floor, side by side; others with --peers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sse_tune.cli_common import (
    DbOption,
    DeviceOption,
    JsonOption,
    ProblemChoice,
    console,
    find_device,
    print_json,
    seconds,
    shown_time,
    takes_problem,
)

if TYPE_CHECKING:
    from sse_tune.bench.peers import PeerResult
    from sse_tune.bench.plans import Bench


@takes_problem
def bench(
    choice: ProblemChoice,
    peers: Annotated[bool, typer.Option("--peers", help="Others too; needs sse-tune[peers] and a GPU.")] = False,
    stages: Annotated[bool, typer.Option("--stages", help="The floor stage by stage.")] = False,
    time_limit: Annotated[str, typer.Option(help="Of each comparison: 5s, 1m.")] = "5s",
    db: DbOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time the default plan, the best one known and the floor, side by side."""
    from sse_tune.bench.peers import bench_peers, require_peers
    from sse_tune.bench.plans import bench as bench_plans

    limit = seconds(time_limit)
    here = find_device(device)
    if peers:
        require_peers(here)
    found = []
    for problem in choice.problems(here.kind):
        own = bench_plans(problem, here, db, limit)
        others = bench_peers(problem, here, limit) if peers else []
        found.append({**own.to_dict(), "peers": [other.to_dict() for other in others]})
        if not as_json:
            _print(own, others, stages)
    if as_json:
        print_json({"device": here.slug, "benches": found})


def _print(own: Bench, others: list[PeerResult], stages: bool) -> None:
    from rich.table import Table

    ceilings = own.floor.ceilings
    table = Table(title=own.problem.bucket.name, title_justify="left")
    for heading in ("", "time", "± noise", "x floor", ""):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    floor = own.floor.time_us

    def row(name: str, time_us: float | None, noise_us: float | None, note: str) -> None:
        ratio = "-" if time_us is None else f"{time_us / floor:.2f}"
        table.add_row(name, shown_time(time_us), "-" if noise_us is None else shown_time(noise_us), ratio, note)

    for name, timing in own.timings.items():
        row(
            name,
            timing.median_us,
            timing.noise_us,
            own.decision.reason if name == "best" or len(own.timings) == 1 else "",
        )
    for other in others:
        noise = other.timing.noise_us if other.timing else None
        row(other.name, other.timing.median_us if other.timing else None, noise, other.reason or "")
    rates = (
        f"{ceilings.copy_bytes_per_s / 1e9:.0f} GB/s copied, {ceilings.matmul_flops_per_s / 1e12:.2f} TFLOP/s, measured"
    )
    row("floor, stage by stage", floor, None, rates)
    row("floor, all in one", own.floor.fused_us, None, "inputs and results once, the same FLOPs")
    console().print(table)
    if stages:
        detail = Table(title="floor by stage", title_justify="left")
        for heading in ("stage", "MB", "GFLOP", "memory", "compute"):
            detail.add_column(heading, justify="left" if heading == "stage" else "right")
        for stage in own.floor.stages:
            detail.add_row(
                stage.name, f"{stage.bytes / 1e6:.1f}", f"{stage.flops / 1e9:.2f}", shown_time(stage.memory_us),
                shown_time(stage.compute_us),
            )  # fmt: skip
        console().print(detail)
