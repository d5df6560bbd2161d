"""Time against length or against the number of partitions, one line a side, as a picture."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sse_tune.bench.plans import Bench
    from sse_tune.problem import Problem

# what a picture can have along its horizontal axis: the problem's field and its label
AXES = {"seq_len": "T, tokens in a batch row", "num_partitions": "N, sparse partitions"}
Lines = dict[str, list[tuple[int, float]]]  # side -> (x, milliseconds), by x


def axis_of(problems: Sequence[Problem]) -> str | None:
    """The one field of `AXES` in which the problems differ; None: neither, or both."""
    varied = [name for name in AXES if len({getattr(problem, name) for problem in problems}) > 1]
    return varied[0] if len(varied) == 1 else None


def lines_of(benches: Sequence[Bench], axis: str) -> dict[str, Lines]:
    """Direction -> side -> points, the floor as one more side; a side has no point where it was not timed."""
    found: dict[str, Lines] = {}
    for bench in sorted(benches, key=lambda bench: getattr(bench.problem, axis)):
        x = int(getattr(bench.problem, axis))
        for direction, floor in bench.floors.items():
            lines = found.setdefault(direction, {})
            for name, result in bench.of(direction).items():
                lines.setdefault(name, []).append((x, result.timing.median_us / 1e3))
            lines.setdefault("floor", []).append((x, floor.time_us / 1e3))
    return found


def draw(benches: Sequence[Bench], axis: str, path: pathlib.Path, device_name: str) -> None:
    """Writes the picture, one panel for each direction, both axes logarithmic; the format is that of the suffix."""
    figures = importlib.import_module("matplotlib.figure")
    panels = lines_of(benches, axis)
    figure = figures.Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    problem = benches[0].problem
    name = f"{problem.rule} {problem.dtype} H={problem.num_heads} K={problem.key_dim} V={problem.value_dim}"
    fixed = f"N={problem.num_partitions}" if axis == "seq_len" else f"T={problem.seq_len}"
    figure.suptitle(f"{name} {fixed} top_k={problem.top_k}, {device_name}")
    for axes, (direction, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for side, points in lines.items():
            style = {"color": "black", "linestyle": ":"} if side == "floor" else {"marker": "o"}
            axes.plot([x for x, _ in points], [ms for _, ms in points], label=side, **style)
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axes.set(title=direction, xlabel=AXES[axis], ylabel="median time, ms", xscale="log", yscale="log")
        axes.set_xticks(ticks, [str(x) for x in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(True, which="both", alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
