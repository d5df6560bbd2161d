"""The fastest configs of a stage, or whole plans, run again in turn while a device would only wait for the compilers.

Two of them are timed minutes apart, and clocks drift by more than lies between the best. Run one after the other,
repeat by repeat, they are told apart.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Hashable, Sequence

from sse_tune.plan import Plan
from sse_tune.tuning.candidates import Candidate

CLOSE = 1.03  # times the fastest: a drift of the clocks may hide behind as much
_AT_ONCE = 3
_ENOUGH = 200  # samples of a config: the noise of their median is far below what counts as faster


@dataclasses.dataclass
class _Timed:
    candidate: Candidate
    times_us: tuple[float, ...]

    @property
    def median_us(self) -> float:
        return statistics.median(self.times_us)


class Leaders:
    """The configs of each stage, and the plans, that were timed, by what they are rivals in."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, dict[Candidate, _Timed]] = {}
        self._running: set[Hashable] = set()

    def note(self, rivals: Hashable, candidate: Candidate, times_us: tuple[float, ...]) -> None:
        """All samples of a stage's config, those of before included."""
        self._groups.setdefault(rivals, {})[candidate] = _Timed(candidate, times_us)

    def next(self, base: Plan | None) -> tuple[Hashable, list[Candidate]] | None:
        """Configs of one stage to be run in turn on the buffers of `base`, or whole plans, which have none, after what
        they are rivals in: those that no other is clearly ahead of, of the stage with the fewest samples. None: all are
        known well, have no rival, or are being run."""
        chosen: tuple[Hashable, list[_Timed]] | None = None
        for rivals, group in self._groups.items():
            here = sorted((t for t in group.values() if t.candidate.base == base), key=lambda timed: timed.median_us)
            close = [timed for timed in here[:_AT_ONCE] if timed.median_us <= CLOSE * here[0].median_us]
            if rivals in self._running or len(close) < 2 or _fewest(close) >= _ENOUGH:
                continue
            if chosen is None or _fewest(close) < _fewest(chosen[1]):
                chosen = rivals, close
        if chosen is None:
            return None
        self._running.add(chosen[0])
        return chosen[0], [timed.candidate for timed in chosen[1]]

    def ran(self, rivals: Hashable, failed: Sequence[Candidate] = ()) -> None:
        """What `next` gave has been run; those that failed are not to be measured again."""
        self._running.discard(rivals)
        for candidate in failed:
            del self._groups[rivals][candidate]


def _fewest(timed: list[_Timed]) -> int:
    return min(len(one.times_us) for one in timed)
