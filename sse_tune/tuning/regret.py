"""How near strategies are to the best after so many evaluations, the median over seeds, as a picture."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import pathlib
import statistics
from collections.abc import Mapping, Sequence

from sse_tune.errors import DeviceError

Curves = Sequence[Sequence[float]]  # of each seed the ratio to the best after every evaluation


def require_matplotlib() -> None:
    """Raises DeviceError where matplotlib, which every `--plot` draws with, is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise DeviceError("--plot needs matplotlib", "not installed", "pip install 'sse-tune[plot]'")


def medians(curves: Curves) -> list[tuple[int, float]]:
    """(evaluation, ratio), from where half of the seeds have a plan; a run that ended stays where it was."""
    longest = max((len(curve) for curve in curves), default=0)
    points = []
    for i in range(longest):
        # not the mean of the two in the middle, which may be finite and infinite
        ratio = statistics.median_high([curve[min(i, len(curve) - 1)] for curve in curves])
        if ratio != float("inf"):
            points.append((i + 1, ratio))
    return points


def draw(strategies: Mapping[str, Curves], within: float, path: pathlib.Path, title: str) -> None:
    """Writes the picture; the format is that of the suffix. A strategy without curves is left out."""
    figures = importlib.import_module("matplotlib.figure")
    figure = figures.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    found = {name: points for name, curves in strategies.items() if (points := medians(curves))}
    last = max((points[-1][0] for points in found.values()), default=1)
    for name, points in found.items():
        # a strategy that is finished keeps its answer
        x, y = zip(*itertools.chain(points, [(last, points[-1][1])]))
        axes.plot(x, [100 * (ratio - 1) for ratio in y], label=name, drawstyle="steps-post")
    axes.axhline(100 * (within - 1), color="black", linestyle=":", label=f"{within - 1:.0%} above the best")
    axes.set_title(title, fontsize="small", wrap=True)
    axes.set(xlabel="evaluations", ylabel="above the best, %, median over seeds", xscale="log")
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set_ylim(bottom=0.0)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
