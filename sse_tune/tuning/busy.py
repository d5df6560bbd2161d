"""How busy a search keeps its devices: which share of the wall clock their workers ran jobs, and what it waited for.

A job is the admission and measurement of a candidate, or a comparison of finalists. The start of a worker process is
not part of it. The first minute is told apart: it is the compilers'.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable

FIRST_S = 60.0


@dataclasses.dataclass(frozen=True)
class Busy:
    """Shares are of the time of all devices, 0..1.

    Args:
        share: of the whole search in which jobs ran.
        share_after_first_minute: of what came after the first minute; None: nothing did.
        compile_wait_s: how long nothing ran since what was to run next was still being compiled.
        wall_s: of the search, from when its workers were named.
        devices: how many workers there were.
    """

    share: float
    share_after_first_minute: float | None
    compile_wait_s: float
    wall_s: float
    devices: int

    def line(self) -> str:
        later = self.share_after_first_minute
        shown = "" if later is None else f"{later:.0%} of the time after the first minute, "
        return f"measuring {shown}{self.share:.0%} of all; {self.compile_wait_s:.1f} s spent waiting for compilers"

    def to_dict(self) -> dict[str, float | int | None]:
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in dataclasses.asdict(self).items()
        }


class Stopwatch:
    """Told when jobs ran, by any thread.

    Args:
        devices: how many jobs can run at once.
        clock: seconds, never going back.
    """

    def __init__(self, devices: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.devices, self.clock = devices, clock
        self._begin = clock()
        self._jobs: list[tuple[float, float]] = []
        self._lock = threading.Lock()

    def ran(self, wall_s: float) -> None:
        """A job ended now that took so long."""
        end = self.clock()
        with self._lock:
            self._jobs.append((end - wall_s, end))

    def busy(self, compile_wait_s: float = 0.0) -> Busy:
        """Until now; jobs that still run are not counted."""
        end = self.clock()
        with self._lock:
            jobs = list(self._jobs)

        def share(since: float) -> float | None:
            if end <= since:
                return None
            ran_s = sum(max(0.0, stop - max(start, since)) for start, stop in jobs)
            return min(1.0, ran_s / (self.devices * (end - since)))

        return Busy(
            share=share(self._begin) or 0.0,
            share_after_first_minute=share(self._begin + FIRST_S),
            compile_wait_s=compile_wait_s,
            wall_s=end - self._begin,
            devices=self.devices,
        )
