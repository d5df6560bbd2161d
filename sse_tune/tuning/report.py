"""What a search found, and how to say so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from sse_tune.device import Device
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.tuning.busy import Busy
from sse_tune.tuning.measure import Timing


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C during a search. All trials that ended are kept; `search(..., resume=True)` goes on from them.

    Args:
        study: the id of the study in the database.
        trials: how many trials were made.
    """

    def __init__(self, study: str, trials: int) -> None:
        self.study, self.trials = study, trials
        super().__init__(f"stopped; {trials} trials are kept in study {study}; go on with resume=True (`--resume`)")


@dataclasses.dataclass(frozen=True)
class FrontierPlan:
    """A plan's median time end to end, and what a call of it needs above its inputs."""

    plan: str
    time_us: float
    peak_bytes: int


def frontier(timed: Iterable[FrontierPlan]) -> tuple[FrontierPlan, ...]:
    """Those that no other beats in both time and memory, fastest first."""
    kept: list[FrontierPlan] = []
    for one in sorted(timed, key=lambda one: (one.time_us, one.peak_bytes)):
        if not kept or one.peak_bytes < kept[-1].peak_bytes:
            kept.append(one)
    return tuple(kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntryResult:
    """What a search found for one entry of its workload.

    Args:
        title: the entry in words.
        share: of all calls.
        bucket: the name under which the answer is stored for it.
        default, best: as of `SearchReport`, on this entry.
        stored: whether the database took the answer for its bucket.
    """

    title: str
    share: float
    bucket: str
    default: Timing | None
    best: Timing
    stored: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchReport:
    """The result of a search.

    Args:
        problem, device: what was tuned, and for which processor; of a workload, its heaviest entry's problem, and
            `default` and `best` are expected times over all entries.
        bucket: the name under which the answer is stored.
        study: the study's id in the database.
        default: timing of the default plan, measured in turn with the best; None: the default was not admitted.
        best: timing of the plan that is the answer.
        plan: the answer.
        is_default: whether the answer is the default plan, since none beat it by more than the noise.
        errors: the answer's largest relative error against the reference, by tensor.
        outcomes: trials by outcome.
        trials: all trials of the study, rejected ones included.
        wall_s: how long the search took.
        stored: whether the database took the answer; it keeps one that is faster as recorded and was not outdone.
        ties: how many other plans the noise cannot tell from the answer.
        frontier: plans that none beats in both time and memory, fastest first; empty where memory is not known.
        over_memory: how many plans were left out for needing more memory than allowed.
        default_failure: why the default was not admitted.
        busy: which share of the time the device was measuring.
        entries: the entries of the workload, the heaviest first; one where a problem was searched alone.
    """

    problem: Problem
    device: Device
    bucket: str
    study: str
    default: Timing | None
    best: Timing
    plan: Plan
    is_default: bool
    errors: dict[str, float]
    outcomes: dict[str, int]
    trials: int
    wall_s: float
    stored: bool
    default_failure: str | None = None
    ties: int = 0
    frontier: tuple[FrontierPlan, ...] = ()
    over_memory: int = 0
    busy: Busy | None = None
    entries: tuple[EntryResult, ...] = ()

    @property
    def default_time_us(self) -> float | None:
        return None if self.default is None else self.default.median_us

    @property
    def best_time_us(self) -> float:
        return self.best.median_us

    @property
    def speedup(self) -> float | None:
        """Of the answer over the default; None: there is no timing of the default."""
        return None if self.default is None else self.default.median_us / self.best.median_us

    @property
    def error(self) -> float:
        """The largest relative error of all tensors."""
        return max(self.errors.values(), default=0.0)

    def lines(self) -> list[str]:
        """The report in words, a line each."""
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        lines = [
            f"{self.bucket} on {self.device.name}",
            f"best     {_shown(self.best)}",
            f"error    {self.error:.1e} at most, against the reference in float64",
            f"trials   {self.trials} in {self.wall_s:.0f} s: {counts}",
            f"study    {self.study}",
        ]
        if self.default is not None:
            lines.insert(1, f"default  {_shown(self.default)}")
            remark = "; the default is the answer" if self.is_default else ""
            lines.insert(3, f"speed-up {self.speedup:.2f}x{remark}")
        else:
            lines.insert(1, f"default  not admitted: {self.default_failure}")
        if self.busy is not None:
            lines.append(f"busy     {self.busy.line()}")
        if len(self.entries) > 1:
            lines[0] = f"{lines[0]}, and {len(self.entries) - 1} other entries; times are expected ones"
            for one in self.entries:
                before = "not admitted" if one.default is None else f"{one.default.median_us:.0f} us"
                lines.append(f"{100 * one.share:5.1f} %  {one.title}: {before} -> {one.best.median_us:.0f} us")
        if self.ties:
            lines.append(f"ties     {self.ties} plans that the noise cannot tell from the best")
        lines += [
            f"time and memory  {one.time_us:.0f} us, {one.peak_bytes / 2**20:.0f} MiB: plan {one.plan}"
            for one in self.frontier
        ]
        if self.over_memory:
            lines.append(f"memory   {self.over_memory} plans needed more than allowed and were left out")
        return lines

    def to_dict(self) -> dict[str, object]:
        """For a script to read."""
        return {
            "problem": self.problem.to_dict(),
            "device": self.device.slug,
            "bucket": self.bucket,
            "study": self.study,
            "default_time_us": self.default_time_us,
            "best_time_us": self.best_time_us,
            "speedup": self.speedup,
            "is_default": self.is_default,
            "plan": self.plan.to_dict(),
            "errors": self.errors,
            "outcomes": self.outcomes,
            "trials": self.trials,
            "wall_s": self.wall_s,
            "stored": self.stored,
            "ties": self.ties,
            "frontier": [dataclasses.asdict(one) for one in self.frontier],
            "over_memory": self.over_memory,
            "busy": None if self.busy is None else self.busy.to_dict(),
            "entries": [
                {
                    "title": one.title, "share": one.share, "bucket": one.bucket, "stored": one.stored,
                    "default_time_us": None if one.default is None else one.default.median_us,
                    "best_time_us": one.best.median_us,
                }
                for one in self.entries
            ],
        }


def _shown(timing: Timing) -> str:
    low, high = timing.quartiles_us
    return f"{timing.median_us:.0f} us (quartiles {low:.0f}..{high:.0f}, {len(timing.times_us)} runs)"
