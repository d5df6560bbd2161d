"""How fast the best config of a space may be, judged by those that were tried: what `--target` is measured against.

The best prediction of `Effects` among the configs that were not tried, less the fit's standard error, is the estimate.
A space whose effects do not add up has a large error, so its estimate is low and its search goes on.
"""

from __future__ import annotations

import math

from sse_tune.tuning.effects import Effects
from sse_tune.tuning.study import SpaceStudy

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
    effects = Effects(timed, study.configs)
    if effects.spare < _SPARE:
        return None
    return min(best, float(effects.predicted_us(untried).min()) * math.exp(-effects.error))
