"""How fast the best config of a space may be, judged by those that were tried: what `--target` is measured against.

The logarithm of the time is taken as a sum of one effect for each parameter's value, fitted by least squares. The best
prediction among the configs that were not tried, less the fit's standard error, is the estimate. A space whose
effects do not add up has a large error, so its estimate is low and its search goes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sse_tune.space import Config
from sse_tune.tuning.study import SpaceStudy

_RIDGE = 1e-3  # keeps values that were never tried near the average
_SPARE = 2  # results beyond the number of effects, without which there is no estimate


def estimated_best_us(study: SpaceStudy) -> float | None:
    """The time that the best config of a space may have, at most that of the best one told; None: too few results."""
    timed = study.ranking()
    if not timed:
        return None
    best = timed[0][1]
    told = study.told
    untried = [config for config in study.configs if config not in told]
    if not untried:
        return best
    columns = _columns(study.configs)
    if len(timed) < 1 + len(columns) + _SPARE:
        return None
    x = _design([config for config, _ in timed], columns)
    y = np.log([time_us for _, time_us in timed])
    mean = y.mean()
    effects = np.linalg.solve(x.T @ x + _RIDGE * np.eye(x.shape[1]), x.T @ (y - mean))
    rest = y - mean - x @ effects
    error = math.sqrt(float(rest @ rest) / max(1, len(timed) - len(columns) - 1))
    predicted = mean + float((_design(untried, columns) @ effects).min())
    return min(best, math.exp(predicted - error))


def _columns(configs: Sequence[Config]) -> list[tuple[str, object]]:
    """One column for each value of each parameter but its first."""
    values: dict[str, dict[object, None]] = {}
    for config in configs:
        for name, value in config.items():
            values.setdefault(name, {})[value] = None
    return [(name, value) for name, seen in values.items() for value in list(seen)[1:]]


def _design(configs: Sequence[Config], columns: list[tuple[str, object]]) -> np.ndarray:
    rows = [[1.0, *(float(config[name] == value) for name, value in columns)] for config in configs]
    return np.array(rows)
