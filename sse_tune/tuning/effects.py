"""The logarithm of a time as a sum of one effect for each parameter's value, fitted by least squares.

What parameters do to a kernel's time is multiplicative more often than not, so this little model points at good configs
after few trials. Where it does not fit its error is large, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sse_tune.space import Config

_RIDGE = 3e-2  # keeps values that were never tried near the average


class Effects:
    """The fit.

    Args:
        timed: configs and their times.
        configs: all that may be asked about: they say which values there are.
    """

    def __init__(self, timed: Sequence[tuple[Config, float]], configs: Sequence[Config]) -> None:
        values: dict[str, dict[object, None]] = {}
        for config in configs:
            for name, value in config.items():
                values.setdefault(name, {})[value] = None
        self._columns = [(name, value) for name, seen in values.items() for value in seen]
        x = self._design([config for config, _ in timed])
        y = np.log([time_us for _, time_us in timed])
        self._mean = float(y.mean())
        self._effects = np.linalg.solve(x.T @ x + _RIDGE * np.eye(x.shape[1]), x.T @ (y - self._mean))
        rest = y - self._mean - x @ self._effects
        # the effects of one parameter share their sum with the mean: one less to fit
        self.spare = len(timed) - 1 - len(self._columns) + len(values)
        self._error = math.sqrt(float(rest @ rest) / max(1, self.spare))

    @property
    def error(self) -> float:
        """Standard error of a logarithm."""
        return self._error

    def predicted_us(self, configs: Sequence[Config]) -> np.ndarray:
        """The times of some configs."""
        return np.exp(self._mean + self._design(configs) @ self._effects)

    def _design(self, configs: Sequence[Config]) -> np.ndarray:
        return np.array(
            [[float(config[name] == value) for name, value in self._columns] for config in configs]
        )
