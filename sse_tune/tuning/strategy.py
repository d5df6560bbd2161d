"""The decomposed search, by ask and tell: outer points one after the other, and inside each the stages apart.

Stage times are nearly additive once the outer choices are fixed, so tuning stages apart finds in a sum of trials what
the joint space holds in their product. A stage is tuned once for all outer points that share its contract. A strategy
runs nothing and knows no clock: whoever drives it measures what it asks for, on a GPU or from a recorded sweep.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

from sse_tune.errors import ConstraintError
from sse_tune.plan import Plan
from sse_tune.space import Config
from sse_tune.tuning.candidates import Candidate, Settings
from sse_tune.tuning.landscape import Landscape, Slot
from sse_tune.tuning.point import Point, Track
from sse_tune.tuning.study import SpaceStudy

_NOT_WORTH_TUNING = 1.6  # times the best base: stages tuned apart do not make up for this much


class Proposer(abc.ABC):
    """Base of all that is asked and told: `ask` for a candidate, `tell` its time, until `finished`."""

    def __init__(self) -> None:
        self.finished = False
        self.plan_times: dict[Plan, float] = {}

    @abc.abstractmethod
    def ask(self) -> Candidate | None:
        """The next candidate; None: `finished`, or results must be told first."""

    @abc.abstractmethod
    def tell(self, candidate: Candidate, time_us: float | None) -> None:
        """The median time of a candidate; None: it failed."""

    def plans(self) -> list[Plan]:
        """The whole plans that were admitted, fastest first."""
        return sorted(self.plan_times, key=lambda plan: self.plan_times[plan])


class Strategy(Proposer):
    """Base of what the engine drives within a budget.

    `gives_up`: stages, and plans of one stage, that are much slower than the best are left after two repeats.
    """

    gives_up = True

    @abc.abstractmethod
    def stop(self) -> None:
        """The budget for exploring is used: only what puts the findings together is asked from now on."""

    @abc.abstractmethod
    def withdraw(self, candidate: Candidate) -> bool:
        """A candidate that was asked for need not be run, the budget being used; False: it must be all the same."""

    def correct(self, candidate: Candidate, time_us: float) -> None:
        """A stage's candidate that was told has been measured better, on one of the `bases` of now."""
        raise AssertionError("a strategy without a base has no stages to be measured again")

    def rehearse(self) -> Plan | None:
        """A whole plan of configs that were timed, to be measured while nothing else can be run; None: there is none.
        It is admitted for good only when it is asked for as a candidate."""
        return None

    def rehearsed(self, plan: Plan, time_us: float | None) -> bool:
        """The median time of what was rehearsed, None: it failed; told again once it is known better. Whether it is the
        fastest so far at its outer point."""
        return False

    @abc.abstractmethod
    def progress(self) -> tuple[str, int, int]:
        """For people: the phase, and how many of how many trials are made in it."""

    @property
    def bases(self) -> tuple[Plan, ...]:
        """The admitted plans that stages are measured on now."""
        return ()


class WholePlans(Strategy):
    """One-stage plans, each measured end to end."""

    def __init__(self, landscape: Landscape, settings: Settings, known_plans: Sequence[Plan] = ()) -> None:
        super().__init__()
        self.outer = landscape.base(None).outer
        self._studies: dict[tuple[str, str], SpaceStudy] = {}
        self._plans: dict[tuple[str, str], Callable[[Config], Plan]] = {}
        for slot in landscape.slots("whole"):

            def plan_of(config: Config, slot: Slot = slot) -> Plan:
                return Plan("whole", self.outer, {"whole": slot.choice(config)})

            name, chosen = (slot.backend, slot.template), [plan.stages.get("whole") for plan in known_plans]
            study = SpaceStudy(
                slot.space, landscape.problem, landscape.device, self.outer,
                sampler=settings.sampler_for(slot.count(landscape, self.outer)), seed=settings.seed,
                first=[c.config for c in chosen if c is not None and (c.backend, c.template) == name],
                on_rejected=lambda config, reason, plan_of=plan_of: settings.on_rejected(  # type: ignore[misc]
                    Candidate("plan", plan_of(config)), reason
                ),
                storage=settings.storage, name=f"{settings.study}/{slot.backend}:{slot.template}",
            )  # fmt: skip
            for config in study.configs:
                found = settings.known(Candidate("plan", plan_of(config)))
                if found is not None:
                    study.tell(config, found.time_us)
            self._studies[name], self._plans[name] = study, plan_of
            self.plan_times |= {plan_of(config): time_us for config, time_us in study.ranking()}

    def ask(self) -> Candidate | None:
        for name, study in self._studies.items():
            if not self.finished and (config := study.ask()) is not None:
                return Candidate("plan", self._plans[name](config))
        self.finished = True
        return None

    def tell(self, candidate: Candidate, time_us: float | None) -> None:
        choice = candidate.plan.stages["whole"]
        self._studies[choice.backend, choice.template].tell(choice.config, time_us)
        if time_us is not None:
            self.plan_times[candidate.plan] = time_us

    def stop(self) -> None:
        self.finished = True

    def withdraw(self, candidate: Candidate) -> bool:
        choice = candidate.plan.stages["whole"]
        self._studies[choice.backend, choice.template].withdraw(choice.config)
        return True

    def progress(self) -> tuple[str, int, int]:
        told = sum(len(study.told.keys() & set(study.configs)) for study in self._studies.values())
        return "plans", told, sum(len(study.configs) for study in self._studies.values())


class Decomposed(Strategy):
    """Outer points pruned by the roofline: the default, those of known plans and the most promising one (where its base
    is refused, the next one of other stages in its place) before those that Optuna proposes; in each, stages tuned
    apart and put together. The first two, which share the contracts of most stages, are asked by turns; the others one
    after the other. Beside the default point the base of one is the fastest known plan that was admitted there: the
    default plan may be far from it, or not be admitted.

    Args:
        landscape: what can be chosen.
        settings: how.
        known_plans: answers of neighbouring shapes or other GPUs: measured whole right after the default, and their
            choices proposed first in every stage.
    """

    def __init__(self, landscape: Landscape, settings: Settings, known_plans: Sequence[Plan] = ()) -> None:
        super().__init__()
        self.landscape, self.settings, self.known_plans = landscape, settings, tuple(known_plans)
        self.tracks: dict[tuple[object, ...], Track] = {}
        self.stopped = False
        self.best_base_us: float | None = None
        self._to_compare = list(known_plans)
        self._untold = set(known_plans)
        default, self._promising = landscape.base(None).outer, landscape.promising()
        promising = [self._promising] if self._promising else []
        # what was measured elsewhere says more than what is predicted
        first = dict.fromkeys((default, *(plan.outer for plan in known_plans), *promising))
        self._outer = SpaceStudy(
            landscape.outer, landscape.problem, landscape.device, seed=settings.seed, first=first
        )  # fmt: skip
        self._outer.enqueue(default)
        self._together = min(2, sum(outer in self._outer.configs for outer in first))
        self._count = min(max(settings.max_points, self._together), len(self._outer.configs))
        self._opened = 0
        self._refused: list[Config] = []  # promising points whose base was not admitted
        self._begin: float | None = None
        self._points: list[Point] = []  # the next to be asked first
        self._closing: list[Point] = []  # what they put together is still compiled or run, while others are tuned
        self._refill()

    def ask(self) -> Candidate | None:
        for point in list(self._closing):
            candidate = point.ask()
            if candidate is not None:
                return candidate
            if point.closed:
                self._closing.remove(point)
                self._close(point)
        self._refill()
        while self._points:
            if self.best_base_us is not None and self._to_compare and not self.stopped:
                return Candidate("plan", self._to_compare.pop(0))
            for point in list(self._points):
                candidate = point.ask()
                if candidate is not None:
                    self._points.sort(key=lambda other: other is point)  # its next turn is after the others'
                    return candidate
                if point.closed or point.is_tuned:
                    self._points.remove(point)
                    if point.closed:
                        self._close(point)
                    else:
                        self._closing.append(point)
            if not self._refill():
                break
        self.finished = not self._points and not self._closing
        return None

    def tell(self, candidate: Candidate, time_us: float | None) -> None:
        if candidate.kind == "plan":
            self._untold.discard(candidate.plan)
            if time_us is not None:
                self.plan_times[candidate.plan] = time_us
        for point in (*self._points, *self._closing):
            if candidate.stage is None or candidate.base == point.base:
                point.tell(candidate, time_us)

    def stop(self) -> None:
        self.stopped = True
        self._to_compare = []

    def withdraw(self, candidate: Candidate) -> bool:
        return any(point.withdraw(candidate) for point in self._points if point.base == candidate.base)

    def correct(self, candidate: Candidate, time_us: float) -> None:
        (point,) = (point for point in self._points if point.base == candidate.base)
        point.correct(candidate, time_us)

    def rehearse(self) -> Plan | None:
        points = (*self._points, *self._closing)
        return next((plan for point in points if (plan := point.rehearse()) is not None), None)

    def rehearsed(self, plan: Plan, time_us: float | None) -> bool:
        # of a point that is closed by now nothing is put together any more
        points = [point for point in (*self._points, *self._closing) if point.base.outer == plan.outer]
        return bool(points) and points[0].rehearsed(plan, time_us)

    def progress(self) -> tuple[str, int, int]:
        if not self._points:
            return "plans", 1, 1
        done = sum(track.asked - track.out for track in self.tracks.values())
        most = sum(min(len(track.study.configs), track.limit) for track in self.tracks.values())
        sizes = sorted({int(point.base.outer["chunk_size"]) for point in self._points})
        return f"C={','.join(map(str, sizes))} stages", done, most

    @property
    def bases(self) -> tuple[Plan, ...]:
        return tuple(point.base for point in self._points if point.admitted)

    def worth_tuning(self, base_us: float) -> bool:
        """Whether a base of this time can still lead to the best plan."""
        worth = self.best_base_us is None or base_us <= _NOT_WORTH_TUNING * self.best_base_us
        self.best_base_us = base_us if self.best_base_us is None else min(self.best_base_us, base_us)
        return worth

    def _close(self, point: Point) -> None:
        outer = point.base.outer
        self._outer.tell(outer, point.best_us)
        if outer == self._promising and not point.admitted:  # the next one in its place
            self._refused.append(outer)
            self._promising = self.landscape.promising(self._refused)
            if self._promising is not None:
                self._outer.enqueue(self._promising)
                self._opened -= 1

    def _refill(self) -> bool:
        """Opens the next point, if none is open or it is one of the first, once that before it is known to run and so
        are the known plans; whether there was one."""
        is_beside = self._opened < self._together and not self._untold and all(p.admitted for p in self._points)
        is_next = not self._points or is_beside
        point = self._open() if is_next and not self.stopped else None
        self._points += [] if point is None else [point]
        return point is not None

    def _open(self) -> Point | None:
        while self._opened < self._count and (outer := self._outer.ask()) is not None:
            try:
                base = self.landscape.base(outer)
            except ConstraintError:
                self._outer.tell(outer, None)
                continue
            if self._begin is None:
                self._begin = self.settings.used()
            self._opened += 1
            share = min(max(self._opened, self._together), self._count) / self._count
            until = self._begin + (1 - self._begin) * share
            admitted = [plan for plan in self.known_plans if plan.outer == outer and plan in self.plan_times]
            if self._opened == 1 or not admitted:
                return Point(self, base, until)
            fastest = min(admitted, key=lambda plan: self.plan_times[plan])
            return Point(self, fastest, until, self.plan_times[fastest])
        return None
