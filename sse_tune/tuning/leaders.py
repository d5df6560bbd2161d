"""The fastest configs of a stage, measured again in turn while a device would only wait for the compilers.

Two configs are timed minutes apart, and clocks drift by more than lies between the best of a stage. Run one after the
other, repeat by repeat, they are told apart.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Hashable

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
    """The configs of each stage that were timed, by what they are rivals in."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, dict[Candidate, _Timed]] = {}

    def note(self, rivals: Hashable, candidate: Candidate, times_us: tuple[float, ...]) -> None:
        """All samples of a stage's config, those of before included."""
        self._groups.setdefault(rivals, {})[candidate] = _Timed(candidate, times_us)

    def drop(self, rivals: Hashable, candidate: Candidate) -> None:
        """A config that is not to be measured again."""
        del self._groups[rivals][candidate]

    def next(self, base: Plan) -> list[Candidate]:
        """Configs of one stage to be run in turn on the buffers of `base`: of those that no other is clearly ahead of,
        the stage with the fewest samples. Empty: all are known well, or have no rival."""
        chosen: list[_Timed] = []
        for group in self._groups.values():
            here = sorted((t for t in group.values() if t.candidate.base == base), key=lambda timed: timed.median_us)
            close = [timed for timed in here[:_AT_ONCE] if timed.median_us <= CLOSE * here[0].median_us]
            if len(close) < 2 or _fewest(close) >= _ENOUGH:
                continue
            if not chosen or _fewest(close) < _fewest(chosen):
                chosen = close
        return [timed.candidate for timed in chosen]


def _fewest(timed: list[_Timed]) -> int:
    return min(len(one.times_us) for one in timed)
