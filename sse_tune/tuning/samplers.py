"""How a parameter is put to Optuna, and the samplers that a search can be told to use.

Powers of two are proposed by their exponents and other evenly spaced numbers as they are, so that a sampler's
neighbourhood is the one that matters for a kernel: 64 is as far from 32 as from 128. Words are categories.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import warnings
from collections.abc import Iterator

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from sse_tune.errors import SearchError
from sse_tune.space import Value

SAMPLERS = ("auto", "tpe", "gp", "random", "exhaustive")
STARTUP_TRIALS = 4  # drawn at random before a model is made of them
_GP_NEEDS = ("torch", "scipy")


@dataclasses.dataclass(frozen=True)
class Axis:
    """A parameter with more than one value: `codes[i]` is what Optuna sees of `values[i]`."""

    name: str
    values: tuple[Value, ...]
    codes: tuple[int | str, ...]
    distribution: BaseDistribution

    @classmethod
    def of(cls, name: str, values: tuple[Value, ...]) -> Axis:
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            words = tuple(str(value) for value in values)
            return cls(name, values, words, CategoricalDistribution(words))
        numbers = [int(value) for value in values]
        if all(number > 0 and number & (number - 1) == 0 for number in numbers):
            numbers = [number.bit_length() - 1 for number in numbers]
        steps = {b - a for a, b in itertools.pairwise(numbers)}
        if len(steps) > 1 or min(steps) < 1:
            numbers, steps = list(range(len(values))), {1}  # no even spacing: by their places in the list
        return cls(name, values, tuple(numbers), IntDistribution(numbers[0], numbers[-1], step=steps.pop()))

    def code(self, value: Value) -> int | str:
        return self.codes[self.values.index(value)]

    def value(self, code: int | str) -> Value:
        return self.values[self.codes.index(code)]


def check_sampler(name: str) -> None:
    """Raises SearchError for a sampler that is not known or whose packages are missing."""
    if name not in SAMPLERS:
        raise SearchError("the sampler must be known", repr(name), f"choose of {', '.join(SAMPLERS)}")
    missing = [package for package in _GP_NEEDS if name == "gp" and importlib.util.find_spec(package) is None]
    if missing:
        raise SearchError(
            "the sampler gp needs the packages torch and scipy", f"no {', '.join(missing)} here",
            "pip install 'sse-tune[gp]', or use --sampler tpe",
        )


def make_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler for "tpe", "gp" or "random"; the same seed and answers give the same proposals."""
    check_sampler(name)
    with quiet():
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
        if name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        # several proposals are out at once: each counts as a bad one until its result is there, so that they differ
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Optuna announces each study, and that a part of it may change; the user is told other things here."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
