"""One space searched by Optuna's ask and tell: known good configs first, nothing twice, broken rules told as such.

The tuning database holds the truth. A study lives in memory and is filled again from stored trials when a search
resumes; where several hosts share a PostgreSQL server, it lives there, beside the trials.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterable

import optuna
from optuna.trial import TrialState

from sse_tune.device import Device
from sse_tune.problem import Problem
from sse_tune.space import Config, Space
from sse_tune.tuning.effects import Effects
from sse_tune.tuning.samplers import STARTUP_TRIALS, Axis, make_sampler, quiet

# asked before a config is drawn at random from those that are left; a GP takes long to propose what it did before
_PROPOSALS = {"tpe": 40, "random": 40, "gp": 3}
_RULE = "constraints"  # Optuna's name for what a config breaks: above 0 it is not feasible


class SpaceStudy:
    """Proposes the configs of a space.

    Args:
        space: what to search.
        problem, device, outer: what its constraints are asked with.
        sampler: "gp", "random", "exhaustive": every config, the nearest to the default first; or "tpe": TPE, and every
            other time what a sum of effects (`effects.py`) predicts to be the fastest.
        seed: of the sampler: the same seed and answers give the same proposals.
        first: configs to propose before all others but the default, as far as they pass the constraints.
        on_rejected: called once for each proposed config that breaks a constraint, with the reason.
        storage: where Optuna keeps the study, shared under `name`; None: in memory.
    """

    def __init__(
        self,
        space: Space,
        problem: Problem,
        device: Device,
        outer: Config | None = None,
        *,
        sampler: str = "tpe",
        seed: int = 0,
        first: Iterable[Config] = (),
        on_rejected: Callable[[Config, str], None] | None = None,
        storage: optuna.storages.BaseStorage | None = None,
        name: str | None = None,
    ) -> None:
        self.space, self.sampler, self._on_rejected = space, sampler, on_rejected
        self._reasons = lambda config: space.violations(problem, config, device, outer)
        self.configs = tuple(space.configs(problem, device, outer))
        self._left = dict.fromkeys(self.configs)  # an ordered set: what was neither asked nor told
        self._first = [space.default(problem, device, outer)] if self.configs else []
        self._first += [config for config in first if config in self._left and config not in self._first]
        self._pending: dict[Config, optuna.Trial | None] = {}
        self._values: dict[Config, float | None] = {}
        self._random = random.Random(seed)
        # only values that some config of this problem has: a parameter without a choice is not proposed at all
        values_of = {
            param.name: tuple(v for v in param.values if any(config[param.name] == v for config in self.configs))
            for param in space.params
        }
        self._fixed = {name: values[0] for name, values in values_of.items() if len(values) == 1}
        self._axes = [Axis.of(name, values) for name, values in values_of.items() if len(values) > 1]
        self._distributions = {axis.name: axis.distribution for axis in self._axes}
        self._shared, self._guess = storage is not None, False
        if sampler == "exhaustive":
            self._first += [c for c in space.by_nearness(problem, device, outer) if c not in self._first]
            return
        with quiet():
            self._study = optuna.create_study(
                sampler=make_sampler(sampler, seed), storage=storage, study_name=name, load_if_exists=self._shared
            )

    @property
    def best(self) -> tuple[Config, float] | None:
        """The fastest config told so far."""
        return next(iter(self.ranking()), None)

    @property
    def told(self) -> dict[Config, float | None]:
        """Every result so far; None: it failed."""
        return dict(self._values)

    @property
    def exhausted(self) -> bool:
        """Whether every config was asked or told."""
        return not self._left

    def ranking(self) -> list[tuple[Config, float]]:
        """All timed configs, fastest first."""
        timed = [(config, value) for config, value in self._values.items() if value is not None]
        return sorted(timed, key=lambda pair: pair[1])

    def enqueue(self, config: Config) -> None:
        """Proposes a config before all others, if it passes the constraints."""
        if config in self._left:
            self._first = [config, *(other for other in self._first if other != config)]

    def ask(self) -> Config | None:
        """A config that was not tried yet; None: all were."""
        while self._first:
            config = self._first.pop(0)
            if config in self._left:
                return self._take(config, None)
        if not self._left:
            return None
        predicted = self._predicted() if self.sampler == "tpe" else None
        if predicted is not None:
            return self._take(predicted, None)
        for _ in range(_PROPOSALS[self.sampler]):
            with quiet():
                trial = self._study.ask(self._distributions)
            config = self._config(trial.params)
            if config in self._left:
                return self._take(config, trial)
            self._dismiss(trial, config)
        return self._take(self._random.choice(list(self._left)), None)

    def tell(self, config: Config, time_us: float | None) -> None:
        """The result of a config: its time, or None where it failed."""
        self._left.pop(config, None)
        failed = time_us is None or not math.isfinite(time_us)
        self._values[config] = None if failed else time_us
        trial = self._pending.pop(config, None)
        if self.sampler == "exhaustive":
            return
        value = self._objective(None if failed else time_us)
        if trial is not None:
            # another process may have read the result in the database and told it
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                trial.set_constraint(_RULE, float(failed))
            self._study.tell(trial, value, skip_if_finished=True)
            return
        codes = {axis.name: axis.code(config[axis.name]) for axis in self._axes}
        if self._shared and self._is_told_elsewhere(codes, None if failed else value):
            return
        self._study.add_trial(
            optuna.trial.create_trial(
                params=codes, distributions=self._distributions, value=value, constraints={_RULE: float(failed)}
            )
        )

    def correct(self, config: Config, time_us: float) -> None:
        """A better measurement of a config whose time was told. Optuna keeps the first."""
        assert self._values.get(config) is not None, "only what was timed can be timed better"
        self._values[config] = time_us

    def withdraw(self, config: Config) -> None:
        """A config that was asked for is not going to be run."""
        trial = self._pending.pop(config)
        self._left[config] = None
        if trial is not None:
            self._study.tell(trial, state=TrialState.FAIL)

    def _take(self, config: Config, trial: optuna.Trial | None) -> Config:
        del self._left[config]
        self._pending[config] = trial
        return config

    def _predicted(self) -> Config | None:
        """Every other time, once there are results: the config that the sum of effects puts first."""
        timed = self.ranking()
        self._guess = not self._guess and len(timed) >= STARTUP_TRIALS
        if not self._guess:
            return None
        left = list(self._left)
        return left[int(Effects(timed, self.configs).predicted_us(left).argmin())]

    def _dismiss(self, trial: optuna.Trial, config: Config) -> None:
        """A proposal that cannot or need not be run: it breaks a constraint, or is known or on its way."""
        known = self._values.get(config)
        if known is None and config in self._pending:
            self._study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_constraint(_RULE, float(known is None))
        self._study.tell(trial, self._objective(known))
        if config in self._values:
            return
        reasons = self._reasons(config)
        if reasons:
            self._values[config] = None
            if self._on_rejected is not None:
                self._on_rejected(config, reasons[0])

    def _is_told_elsewhere(self, codes: dict[str, int | str], value: float | None) -> bool:
        """Whether another process asked for a config; if it has not told the result, or died before, that is done."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING)):
            if trial.params == codes:
                if trial.state == TrialState.RUNNING:
                    state = TrialState.FAIL if value is None else None
                    self._study.tell(trial.number, value, state=state, skip_if_finished=True)
                return True
        return False

    def _objective(self, time_us: float | None) -> float:
        """What Optuna minimises: the logarithm of the time; a failed config, not feasible, is twice the slowest."""
        if time_us is None:
            time_us = 2 * max((value for value in self._values.values() if value is not None), default=1.0)
        return math.log(time_us)

    def _config(self, codes: dict[str, int | str]) -> Config:
        proposed = self._fixed | {axis.name: axis.value(codes[axis.name]) for axis in self._axes}
        return Config({param.name: proposed[param.name] for param in self.space.params})
