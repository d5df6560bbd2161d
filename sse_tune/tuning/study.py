"""One space searched by Optuna's ask and tell: the default first, what cannot run told as pruned, nothing tried twice.

The database holds the truth. A study lives in memory and is filled again from stored trials when a search resumes.
"""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Callable, Iterator

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import TrialState

from sse_tune.device import Device
from sse_tune.problem import Problem
from sse_tune.space import Config, Space

_PROPOSALS = 40  # asked before a config is drawn at random from those that are left
_STARTUP_TRIALS = 6


class SpaceStudy:
    """Proposes the configs of a space.

    Args:
        space: what to search.
        problem, device, outer: what its constraints are asked with.
        seed: of the sampler: the same seed and answers give the same proposals.
        on_rejected: called once for each proposed config that breaks a constraint, with the reason.
    """

    def __init__(
        self,
        space: Space,
        problem: Problem,
        device: Device,
        outer: Config | None = None,
        *,
        seed: int = 0,
        on_rejected: Callable[[Config, str], None] | None = None,
    ) -> None:
        self.space, self._on_rejected = space, on_rejected
        self._reasons = lambda config: space.violations(problem, config, device, outer)
        self.configs = tuple(space.configs(problem, device, outer))
        self._left = dict.fromkeys(self.configs)  # an ordered set: what was neither asked nor told
        self._first = [space.default(problem, device, outer)] if self.configs else []
        self._pending: dict[Config, optuna.Trial] = {}
        self._values: dict[Config, float | None] = {}
        self._random = random.Random(seed)
        # only values that some config of this problem has: a parameter without a choice is not proposed at all
        self._values_of = {
            param.name: tuple(v for v in param.values if any(config[param.name] == v for config in self.configs))
            for param in space.params
        }
        self._distributions: dict[str, BaseDistribution] = {
            name: IntDistribution(0, len(values) - 1) for name, values in self._values_of.items() if len(values) > 1
        }
        with _quiet():
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP_TRIALS, multivariate=True)
            self._study = optuna.create_study(sampler=sampler, direction="minimize")

    @property
    def best(self) -> tuple[Config, float] | None:
        """The fastest config told so far."""
        timed = [(value, number) for number, value in enumerate(self._values.values()) if value is not None]
        if not timed:
            return None
        value, number = min(timed)
        return list(self._values)[number], value

    def ranking(self) -> list[tuple[Config, float]]:
        """All timed configs, fastest first."""
        timed = [(config, value) for config, value in self._values.items() if value is not None]
        return sorted(timed, key=lambda pair: pair[1])

    def enqueue(self, config: Config) -> None:
        """Proposes a config before all others, if it passes the constraints."""
        if config in self._left and config not in self._first:
            self._first.append(config)

    def ask(self) -> Config | None:
        """A config that was not tried yet; None: all were."""
        while self._first:
            config = self._first.pop(0)
            if config in self._left:
                return self._take(config)
        if not self._left:
            return None
        for _ in range(_PROPOSALS):
            with _quiet():
                trial = self._study.ask(self._distributions)
            config = self._config(trial.params)
            if config in self._left:
                del self._left[config]
                self._pending[config] = trial
                return config
            self._dismiss(trial, config)
        return self._take(self._random.choice(list(self._left)))

    def tell(self, config: Config, time_us: float | None) -> None:
        """The result of a config: its time, or None where it failed."""
        self._left.pop(config, None)
        self._values[config] = time_us
        trial = self._pending.pop(config, None)
        failed = time_us is None or not math.isfinite(time_us)
        if trial is not None:
            if failed:
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                self._study.tell(trial, time_us)
            return
        self._study.add_trial(
            optuna.trial.create_trial(
                params=self._indices(config),
                distributions=self._distributions,
                value=None if failed else time_us,
                state=TrialState.PRUNED if failed else TrialState.COMPLETE,
            )
        )

    def knows(self, config: Config) -> bool:
        """Whether the result of a config is known."""
        return config in self._values

    def _take(self, config: Config) -> Config:
        del self._left[config]
        return config

    def _dismiss(self, trial: optuna.Trial, config: Config) -> None:
        """A proposal that cannot or need not be run: a broken constraint, or one whose answer is known."""
        known = self._values.get(config)
        if known is not None:
            self._study.tell(trial, known)
            return
        self._study.tell(trial, state=TrialState.PRUNED)
        if config in self._values or config in self._pending:
            return
        reasons = self._reasons(config)
        if reasons:
            self._values[config] = None
            if self._on_rejected is not None:
                self._on_rejected(config, reasons[0])

    def _config(self, indices: dict[str, int]) -> Config:
        return Config({name: values[indices.get(name, 0)] for name, values in self._values_of.items()})

    def _indices(self, config: Config) -> dict[str, int]:
        return {name: self._values_of[name].index(config[name]) for name in self._distributions}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna announces each study, and that its multivariate sampler may change; the user is told other things here."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
