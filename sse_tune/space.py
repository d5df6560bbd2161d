"""The parameters of a template: their values, the constraints between them, and the configs that pass."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from sse_tune.errors import ConstraintError

if TYPE_CHECKING:
    from sse_tune.device import Device
    from sse_tune.problem import Problem

Value = int | str | bool


class Config(Mapping[str, Value]):
    """One value for every parameter: an immutable, hashable mapping whose entries also read as attributes."""

    __slots__ = ("_values",)
    _values: dict[str, Value]

    def __init__(self, values: Mapping[str, Value] | None = None, /, **more: Value) -> None:
        object.__setattr__(self, "_values", {**(values or {}), **more})

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Value:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(f"no parameter {name!r}; there are {', '.join(self._values) or 'none'}") from None

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a config does not change; use replace()")

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self._values == other._values

    def __reduce__(self) -> tuple:
        return Config, (self._values,)

    def __repr__(self) -> str:
        return "Config(" + ", ".join(f"{name}={value!r}" for name, value in self._values.items()) + ")"

    def replace(self, **changes: Value) -> Config:
        return Config({**self._values, **changes})


@dataclasses.dataclass(frozen=True)
class Param:
    """A parameter: its values in a meaningful order, and the one to start from.

    `rule_defaults`: the pairs (rule, default) of those state rules that start elsewhere.
    """

    name: str
    values: tuple[Value, ...]
    default: Value
    doc: str
    rule_defaults: tuple[tuple[str, Value], ...] = ()

    def __post_init__(self) -> None:
        for default in (self.default, *(default for _, default in self.rule_defaults)):
            assert default in self.values, f"{self.name}: default {default!r} is not one of {self.values}"

    def default_for(self, problem: Problem) -> Value:
        return dict(self.rule_defaults).get(problem.rule, self.default)


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What must hold between a problem, a config and a device; `rule` is shown to the user when it fails.

    `holds(problem, config, device)`: the config holds the template's parameters and the plan's outer ones together.
    """

    rule: str
    holds: Callable[[Problem, Config, Device], bool]


@dataclasses.dataclass(frozen=True)
class Space:
    """The parameters and constraints of one template, or of a plan's outer choices."""

    params: tuple[Param, ...] = ()
    constraints: tuple[Constraint, ...] = ()

    @property
    def size(self) -> int:
        """How many combinations of values there are, before constraints."""
        product = 1
        for param in self.params:
            product *= len(param.values)
        return product

    def violations(self, problem: Problem, config: Config, device: Device, outer: Config | None = None) -> list[str]:
        """The reasons why `config` cannot be used here; empty when it can."""
        names = {param.name for param in self.params}
        if set(config) != names:
            return [f"the parameters must be {sorted(names)}, but got {sorted(config)}"]
        reasons = [
            f"`{param.name}` must be one of {param.values}, but got {config[param.name]!r}"
            for param in self.params
            if not any(config[param.name] is v or (type(v) is type(config[param.name]) and v == config[param.name])
                       for v in param.values)
        ]
        if reasons:
            return reasons
        joint = Config({**(outer or {}), **config})
        shown = ", ".join(f"{name}={value}" for name, value in joint.items())
        return [
            f"{constraint.rule}, but got {shown}"
            for constraint in self.constraints
            if not constraint.holds(problem, joint, device)
        ]

    def validate(self, problem: Problem, config: Config, device: Device, outer: Config | None = None) -> None:
        """Raises ConstraintError with the first reason why `config` cannot be used here."""
        reasons = self.violations(problem, config, device, outer)
        if reasons:
            raise ConstraintError(reasons[0], "", "choose a config that `Space.configs` lists")

    def configs(self, problem: Problem, device: Device, outer: Config | None = None) -> Iterator[Config]:
        """Every config that passes, in the order of the parameters' values."""
        names = [param.name for param in self.params]
        for values in itertools.product(*(param.values for param in self.params)):
            config = Config(dict(zip(names, values)))
            if not self.violations(problem, config, device, outer):
                yield config

    def default(self, problem: Problem, device: Device, outer: Config | None = None) -> Config:
        """The declared default, or the passing config that lies nearest to it (steps along the value lists).

        Raises:
            ConstraintError: no config passes.
        """
        declared = Config({param.name: param.default_for(problem) for param in self.params})
        reasons = self.violations(problem, declared, device, outer)
        if not reasons:
            return declared
        nearest = self.by_nearness(problem, device, outer)
        if not nearest:
            raise ConstraintError(
                "some config must pass the constraints", reasons[0], "use a smaller head size or another backend"
            )
        return nearest[0]

    def by_nearness(self, problem: Problem, device: Device, outer: Config | None = None) -> tuple[Config, ...]:
        """Every config that passes, the nearest to the declared default first (steps along the value lists)."""
        start = {param.name: param.values.index(param.default_for(problem)) for param in self.params}

        def steps(config: Config) -> int:
            return sum(abs(param.values.index(config[param.name]) - start[param.name]) for param in self.params)

        return tuple(sorted(self.configs(problem, device, outer), key=steps))
