"""`bench`: the default plan, the best one known and this machine's floor, side by side; others with --peers."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from sse_tune.cli_common import (
    DbOption,
    DeviceOption,
    JsonOption,
    ProblemChoice,
    UsageError,
    console,
    find_device,
    print_json,
    seconds,
    shown_time,
    takes_problem,
)

if TYPE_CHECKING:
    from sse_tune.bench.memory import LeftOut
    from sse_tune.bench.peers import PeerReport
    from sse_tune.bench.plans import Bench
    from sse_tune.bench.sides import SideResult
    from sse_tune.device import Device
    from sse_tune.problem import Problem

_CLOCK = {
    "cuda": "Medians by CUDA events over calls as a user makes them, each behind another: of the host's work what it "
    "cannot do ahead counts. idle: a single call on a GPU that waits, the host's work before the first long kernel "
    "included. graph: the same kernels replayed from a CUDA graph, as only a call can be that never waits for the "
    "host; the peers' pipelines do.",
    "cpu": "Medians by the clock over the call as a user makes it.",
}


@takes_problem
def bench(
    choice: ProblemChoice,
    peers: Annotated[bool, typer.Option("--peers", help="Others too; needs sse-tune[peers] and a GPU.")] = False,
    partition_counts: Annotated[
        str | None, typer.Option(help="Several N, separated by commas, in place of --partitions.")
    ] = None,
    occupancy: Annotated[
        str | None, typer.Option(help="Each side with a skewed router too: shares of first choices, as 90,4,3,3.")
    ] = None,
    head_groups: Annotated[
        str | None, typer.Option(help="The best plan also with its heads in groups, for less memory, as 2,4.")
    ] = None,
    plot: Annotated[
        pathlib.Path | None, typer.Option(help="A picture of time against T or N; needs sse-tune[plot].")
    ] = None,
    stages: Annotated[bool, typer.Option("--stages", help="Time and floor of each stage.")] = False,
    time_limit: Annotated[str, typer.Option(help="Of each comparison: 5s, 1m.")] = "5s",
    db: DbOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time the default plan, the best one known and the floor, side by side; the last line is JSON."""
    from sse_tune.bench.ahead import compile_plans
    from sse_tune.bench.peers import require_peers
    from sse_tune.bench.plans import bench as bench_plans
    from sse_tune.bench.plans import plans_of
    from sse_tune.bench.plot import draw
    from sse_tune.bench.roofline import measure_ceilings
    from sse_tune.runtime.checks import check_head_groups

    limit = seconds(time_limit)
    here = find_device(device)
    problems = _problems(choice, here.kind, partition_counts)
    groups = () if head_groups is None else _numbers("--head-groups", head_groups, "2,4")
    for problem in problems:
        for count in groups:
            check_head_groups(count, problem.num_heads)
    axis = None if plot is None else _plot_axis(plot, problems)
    shares = [_shares(problem, occupancy) for problem in problems]
    if peers:
        require_peers(here)
    if here.kind == "cuda":
        _tell("compiling this project's plans")
        compile_plans((one for problem in problems for one in plans_of(problem, here, db, groups)), here)
        if peers:
            _compile_peers(problems, here)
    ceilings = measure_ceilings(here, problems[0].dtype)  # the problems differ in T and N only
    found = []
    for problem, skewed in zip(problems, shares):
        _tell(f"measuring {_title(problem)}")
        found.append(
            bench_plans(
                problem, here, db, limit, peers=peers, ceilings=ceilings, stages=stages, occupancy=skewed,
                head_groups=groups,
            )
        )
        if not as_json:
            _print(found[-1], here.kind, stages)
    if plot is not None and axis is not None:
        draw(found, axis, plot, here.name)
    print_json({"device": here.slug, "benches": [one.to_dict() for one in found]})


def _compile_peers(problems: list[Problem], device: Device) -> None:
    from sse_tune.bench.ahead import compile_peers
    from sse_tune.bench.peers import checked_problem

    alike: dict[Problem, list[Problem]] = {}
    for problem in problems:
        alike.setdefault(checked_problem(problem), []).append(problem)
    for of_one_kind in alike.values():
        _tell("compiling what the peers run and their tuning tries: minutes, the first time")
        failed = sum(code != 0 for code in compile_peers(of_one_kind, device))
        if failed:
            _tell(f"{failed} processes that compile for peers failed: the peers' tuning takes longer")


def _tell(what: str) -> None:
    """To people who wait; stdout is for what was measured."""
    typer.echo(what, err=True)


def _title(problem: Problem) -> str:
    title = f"{problem.bucket.name}, {problem.batch} x {problem.seq_len} tokens"
    return title if problem.num_sequences is None else f"{title} in {problem.num_sequences} sequences"


def _problems(choice: ProblemChoice, kind: str, counts: str | None) -> list[Problem]:
    """One problem for each length, and of these one for each number of partitions."""
    problems = choice.problems(kind)
    if counts is None:
        return problems
    numbers = _numbers("--partition-counts", counts, "4,8,32")
    if choice.partitions is not None:
        raise UsageError(
            "--partitions and --partition-counts exclude each other", f"{choice.partitions} and {counts}", "give one"
        )
    return [problem.replace(num_partitions=number) for problem in problems for number in numbers]


def _numbers(option: str, text: str, example: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise UsageError(f"{option} must be numbers above 0", repr(text), f"write {example}")
    return tuple(map(int, words))


def _shares(problem: Problem, text: str | None) -> tuple[float, ...] | None:
    """--occupancy as shares of 1, held against the problem by the rules of a workload's entry."""
    from sse_tune.tuning.workload import Entry

    if text is None:
        return None
    try:
        counts = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise UsageError("--occupancy must be numbers", repr(text), "write 90,4,3,3") from None
    return Entry(problem=problem, occupancy=counts).occupancy


def _plot_axis(path: pathlib.Path, problems: Sequence[Problem]) -> str:
    """What --plot can draw, known before anything is measured."""
    from sse_tune.bench.plot import axis_of
    from sse_tune.tuning.regret import require_matplotlib

    require_matplotlib()
    axis = axis_of(problems)
    if axis is None:
        raise UsageError(
            "--plot draws time against T or against N",
            f"{len(problems)} problems that do not differ in just one of them",
            "give several --seq-len, or --partition-counts 4,8,32",
        )
    if path.suffix != ".png" or not path.absolute().parent.is_dir():
        raise UsageError("--plot takes a .png file in a folder that exists", str(path), "name another one")
    return axis


def _print(own: Bench, kind: str, stages: bool) -> None:
    from rich.table import Table

    problem, ceilings = own.problem, own.floor.ceilings
    title = _title(problem)
    if own.occupancy is not None:
        title += f"; skewed: first choices at {'/'.join(f'{100 * share:.3g}' for share in own.occupancy)} %"
    table = Table(title=title, title_justify="left", caption=_CLOCK[kind])
    table.caption_justify = "left"
    table.add_column("")
    for direction in own.floors:
        for heading in (f"{direction} ± noise", "x floor", "idle", "extra MiB"):
            table.add_column(heading, justify="right")
    table.add_column("", overflow="fold")
    parts: tuple[SideResult | LeftOut | PeerReport, ...] = (*own.results, *own.left_out, *own.peers)
    for name in dict.fromkeys(part.name for part in parts):
        cells = [cell for way in own.floors for cell in _cells(own.of(way).get(name), own.floors[way].time_us)]
        table.add_row(name, *cells, _note(own, name))
    rates = (
        f"{ceilings.copy_bytes_per_s / 1e9:.0f} GB/s copied, {ceilings.matmul_flops_per_s / 1e12:.2f} TFLOP/s, measured"
    )
    for label, attribute, note in (
        ("floor, stage by stage", "time_us", rates),
        ("floor, all in one", "fused_us", "inputs and results once, the same FLOPs"),
    ):
        floors = [(getattr(floor, attribute), floor.time_us) for floor in own.floors.values()]
        cells = [cell for least, whole in floors for cell in (shown_time(least), f"{least / whole:.2f}", "-", "-")]
        table.add_row(label, *cells, note)
    console().print(table)
    if stages:
        _print_stages(own)


def _cells(result: SideResult | None, floor_us: float) -> tuple[str, str, str, str]:
    """Time, ratio to the floor, time on an idle GPU, and memory of a side in one direction."""
    if result is None:
        return "-", "-", "-", "-"
    timing = result.timing
    idle = "-" if result.idle is None else shown_time(result.idle.median_us)
    extra = "-" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.0f}"
    time = f"{shown_time(timing.median_us)} ± {shown_time(timing.noise_us)}"
    return time, f"{timing.median_us / floor_us:.2f}", idle, extra


def _note(own: Bench, name: str) -> str:
    """Where a plan comes from, how far a peer is from the reference, why something was not timed."""
    from sse_tune.bench.plans import grouped_name

    notes = [f"{part.direction}: {part.reason}" for part in own.left_out if part.name == name]
    report = next((peer for peer in own.peers if peer.name == name), None)
    if report is not None and report.reason is not None:
        notes.append(report.reason)
    elif report is not None and report.error is not None:
        notes.append(f"error {report.error:.1e}")
    has_best = any(result.name == "best" for result in own.results)
    if name == ("best" if has_best else "default"):
        notes.append(f"plan {own.decision.plan.key}: {own.decision.reason}")
    for groups, decisions in own.grouped.items():
        if name == grouped_name(groups):
            decision = decisions[own.problem.direction]
            notes.append(f"plan {decision.plan.key}: {decision.reason}")
    return "; ".join(notes)


def _print_stages(own: Bench) -> None:
    from rich.table import Table

    detail = Table(title="stage by stage: the floor, and each alone", title_justify="left")
    for heading in ("stage", "MB", "GFLOP", "memory", "compute"):
        detail.add_column(heading, justify="left" if heading == "stage" else "right")
    for name in own.stages:
        detail.add_column(name, justify="right")
        detail.add_column("x floor", justify="right")
        detail.add_column("", overflow="fold")
    floors = {stage.name: stage for stage in own.floor.stages}
    for name in dict.fromkeys((*floors, *(stage for times in own.stages.values() for stage in times))):
        floor, cells = floors.get(name), ["-"] * 4
        if floor is not None:
            cells = [f"{floor.bytes / 1e6:.1f}", f"{floor.flops / 1e9:.2f}", shown_time(floor.memory_us),
                     shown_time(floor.compute_us)]  # fmt: skip
        for times in own.stages.values():
            found = times.get(name)
            if found is None:
                cells += ["-", "-", ""]
                continue
            ratio = "-" if floor is None or not floor.time_us else f"{found.timing.median_us / floor.time_us:.2f}"
            cells += [shown_time(found.timing.median_us), ratio, found.template]
        detail.add_row(name, *cells)
    console().print(detail)
