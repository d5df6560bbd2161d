"""How long a call takes: warm, L2 flushed, medians with their spread; rivals are measured in turn.

On a GPU by CUDA events, in a CUDA graph where asked for, alone or in rows (`compare_calls`); on a CPU by the clock,
the same way. Repeats end when the median is known well enough; samples that stick out are measured again, and what is
hopeless is left after two.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

MAX_REPEATS = 400
IN_A_ROW = 4  # calls of one side before the host waits for them: one on an idle GPU, the others behind it
PRECISION = 0.005  # of the median: half its 95 % interval
_OUTLIER_IQRS = 3.0  # beyond the upper quartile: something else ran
_MIN_FOR_QUARTILES = 5
_FLUSH_BYTES = 256 * 2**20  # more than the L2 of any GPU
_CPU_FLUSH_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Timing:
    """Repeated timings of one call, in microseconds."""

    times_us: tuple[float, ...]

    @property
    def median_us(self) -> float:
        return statistics.median(self.times_us)

    @property
    def quartiles_us(self) -> tuple[float, float]:
        if len(self.times_us) < 2:
            return self.times_us[0], self.times_us[0]
        low, _, high = statistics.quantiles(self.times_us, n=4, method="inclusive")
        return low, high

    @property
    def noise_us(self) -> float:
        """Half the width of a median's 95% interval (the notch of a box plot): 1.57 · IQR / sqrt(n)."""
        low, high = self.quartiles_us
        return 1.57 * (high - low) / len(self.times_us) ** 0.5

    @property
    def is_precise(self) -> bool:
        """Whether enough samples agree that more would hardly move the median."""
        return len(self.times_us) >= _MIN_FOR_QUARTILES and self.noise_us <= PRECISION * self.median_us

    @property
    def outliers(self) -> tuple[int, ...]:
        """The samples that lie far above the rest. None lies far below: nothing makes a call faster than it is."""
        if len(self.times_us) < _MIN_FOR_QUARTILES:
            return ()
        low, high = self.quartiles_us
        limit = high + _OUTLIER_IQRS * max(high - low, PRECISION * self.median_us)
        return tuple(i for i, time_us in enumerate(self.times_us) if time_us > limit)

    def beats(self, other: Timing, margin: float = 0.01) -> bool:
        """Whether this call is faster than another measured in turn with it, by more than the noise and `margin`.

        Judged by the ratio of each pair of neighbouring runs: what disturbed one disturbed the other.
        """
        ratios = Timing(tuple(mine / theirs for mine, theirs in zip(self.times_us, other.times_us)))
        return ratios.median_us + max(ratios.noise_us, margin) < 1.0


def weighted(timings: Sequence[Timing], shares: Sequence[float]) -> Timing:
    """The expected time of a call: in every repeat the sum of several timings by their shares of all calls.

    Where one was repeated less than the others, only as many repeats count: nothing is made up.
    """
    repeats = zip(*(timing.times_us for timing in timings))
    return Timing(tuple(math.fsum(share * time_us for share, time_us in zip(shares, times)) for times in repeats))


@dataclasses.dataclass(frozen=True)
class Measured:
    """A plan's timings on every entry of a workload, each measured in turn with those of other plans.

    Args:
        entries: a timing of each.
        shares: of all calls.
    """

    entries: tuple[Timing, ...]
    shares: tuple[float, ...] = (1.0,)

    @functools.cached_property
    def total(self) -> Timing:
        return weighted(self.entries, self.shares)

    @property
    def median_us(self) -> float:
        return self.total.median_us

    def beats(self, other: Measured) -> bool:
        """Whether the expected time is shorter, beyond the noise and 1 %."""
        return self.total.beats(other.total)

    def slower_on(self, other: Measured) -> tuple[int, ...]:
        """The entries on which it is slower than another, beyond the noise and 1 %."""
        pairs = enumerate(zip(self.entries, other.entries))
        return tuple(number for number, (mine, theirs) in pairs if theirs.beats(mine))


@dataclasses.dataclass(frozen=True)
class Calls:
    """What a call takes behind others, and alone.

    Args:
        timing: of calls launched behind another without waiting for it, as in a step of many layers; where rows are of
            one call, of each.
        idle: of the first ones of rows, on a GPU that waits; None where rows are of one call.
    """

    timing: Timing
    idle: Timing | None = None

    @classmethod
    def of(cls, rows: Sequence[tuple[float, ...]]) -> Calls:
        """By rows of one length."""
        if len(rows[0]) == 1:
            return cls(Timing(tuple(time_us for (time_us,) in rows)))
        behind, idle = tuple(time_us for row in rows for time_us in row[1:]), tuple(row[0] for row in rows)
        return cls(Timing(behind), Timing(idle))

    @property
    def outlying_rows(self) -> set[int]:
        """The rows of which a sample sticks out."""
        idle = self.idle or self.timing
        behind = len(self.timing.times_us) // len(idle.times_us)  # in a row
        return {i // behind for i in self.timing.outliers} | set(idle.outliers)


def compare(
    sides: Mapping[str, Callable[[], object]],
    device: torch.device | str,
    *,
    time_limit_s: float = 2.0,
    min_repeats: int = 5,
    graph: bool = False,
    give_up_us: float | None = None,
    until_precise: bool = False,
    shares: Sequence[float] | None = None,
) -> dict[str, Timing]:
    """Times several calls in turn, so that what drifts (clocks, temperature, other load) meets them all.

    Args:
        sides: name -> call.
        device: where they run.
        time_limit_s: of the whole comparison, warm-up not counted; `min_repeats` are made in any case.
        min_repeats: of each side.
        graph: replay each call as a CUDA graph; fails for a call that synchronises.
        give_up_us: stop after two repeats when none was faster than this.
        until_precise: stop before the limit once the median of every side is known to within `PRECISION`.
        shares: of the sides in the one time that the two rules above are about, their `weighted` sum; None: each side
            has its own.

    Returns:
        A `Timing` of each side; all have as many samples, and the i-th ones were taken in turn. A repeat in which a
        side stuck out is taken again, of all sides, once.
    """
    calls = dict(sides)
    where = torch.device(device)
    if where.type == "cuda" and graph:
        pool = torch.cuda.graph_pool_handle()  # one graph runs at a time: together they take what the largest does
        calls = {name: captured(call, pool) for name, call in calls.items()}
    found = _rows_in_turn(calls, where, 1, time_limit_s, min_repeats, give_up_us, until_precise, shares)
    return {name: Calls.of(rows).timing for name, rows in found.items()}


def compare_calls(
    sides: Mapping[str, Callable[[], object]],
    device: torch.device | str,
    *,
    time_limit_s: float = 2.0,
    min_repeats: int = 5,
) -> dict[str, Calls]:
    """Times several calls in turn, as `compare` does, but in rows: the host waits only at the end of each, and of its
    work only what it cannot do ahead counts for a call behind another.

    Args:
        sides, device, time_limit_s: see `compare`.
        min_repeats: of each side, all calls of its rows counted.

    Returns:
        The `Calls` of each side; the i-th samples of all were taken in turn, and outliers are taken again by rows.
    """
    where = torch.device(device)
    in_a_row = IN_A_ROW if where.type == "cuda" else 1  # a CPU runs nothing ahead
    found = _rows_in_turn(sides, where, in_a_row, time_limit_s, min_repeats)
    return {name: Calls.of(rows) for name, rows in found.items()}


def _rows_in_turn(
    calls: Mapping[str, Callable[[], object]], where: torch.device, in_a_row: int, time_limit_s: float,
    min_repeats: int, give_up_us: float | None = None, until_precise: bool = False,
    shares: Sequence[float] | None = None,
) -> dict[str, list[tuple[float, ...]]]:  # fmt: skip
    """The rows of each side, which take turns; see `compare`."""
    sample = _sampler(where, in_a_row)
    for call in calls.values():
        sample(call)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}

    def judged() -> list[Timing]:
        timings = [Calls.of(rows).timing for rows in found.values()]
        return timings if shares is None else [weighted(timings, shares)]

    begin = time.perf_counter()
    for number in range(MAX_REPEATS // in_a_row):
        enough = number * in_a_row >= min_repeats
        if enough and time.perf_counter() - begin >= time_limit_s:
            break
        if number == 2 and give_up_us is not None and all(min(t.times_us) > give_up_us for t in judged()):
            break
        if until_precise and enough and all(t.is_precise for t in judged()):
            break
        for name, call in calls.items():
            found[name].append(sample(call))
    for number in sorted(set().union(*(Calls.of(rows).outlying_rows for rows in found.values()))):
        for name, call in calls.items():
            found[name][number] = sample(call)
    return found


def measure(
    call: Callable[[], object],
    device: torch.device | str,
    *,
    time_limit_s: float = 0.25,
    min_repeats: int = 5,
    graph: bool = False,
    give_up_us: float | None = None,
    until_precise: bool = False,
) -> Timing:
    """Times one call until the limit is reached; see `compare`."""
    return compare(
        {"": call}, device, time_limit_s=time_limit_s, min_repeats=min_repeats, graph=graph, give_up_us=give_up_us,
        until_precise=until_precise,
    )[""]  # fmt: skip


def peak_bytes(call: Callable[[], object], device: torch.device | str) -> int | None:
    """What a warm call allocates at most beside what is there before it, results included; None on a CPU: not known."""
    where = torch.device(device)
    if where.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(where)
    torch.cuda.reset_peak_memory_stats(where)
    before = torch.cuda.memory_allocated(where)
    call()
    torch.cuda.synchronize(where)
    return torch.cuda.max_memory_allocated(where) - before


def captured(call: Callable[[], object], pool: Any = None) -> Callable[[], object]:
    """A call as a replay of a CUDA graph, in a pool that other graphs may share; the call must not synchronise."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles and warms up outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph.replay


def _sampler(device: torch.device, in_a_row: int) -> Callable[[Callable[[], object]], tuple[float, ...]]:
    """What times one row of a call."""
    if device.type == "cuda":
        return _GpuSampler(device, in_a_row)
    one = _CpuSampler()
    return lambda call: (one(call),)


class _GpuSampler:
    def __init__(self, device: torch.device, in_a_row: int) -> None:
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
        self.device = device
        self.in_a_row = in_a_row

    def __call__(self, call: Callable[[], object]) -> tuple[float, ...]:
        with torch.cuda.device(self.device):
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.in_a_row)]
            for start, stop in events:
                # the flush also keeps the GPU busy while the host launches, so that launches of a short call overlap it
                self.flush.zero_()
                start.record()
                call()
                stop.record()
            events[-1][1].synchronize()
        return tuple(start.elapsed_time(stop) * 1e3 for start, stop in events)


class _CpuSampler:
    def __init__(self) -> None:
        self.flush = torch.empty(_CPU_FLUSH_BYTES, dtype=torch.int8)

    def __call__(self, call: Callable[[], object]) -> float:
        self.flush.zero_()
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6
