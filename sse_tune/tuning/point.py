"""One outer point of the decomposed search: its base plan, its stages tuned apart, and what is put together of them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sse_tune.plan import Plan, StageChoice
from sse_tune.tuning.candidates import Candidate
from sse_tune.tuning.estimate import estimated_best_us
from sse_tune.tuning.landscape import Slot
from sse_tune.tuning.rehearsal import Ranking, Rehearsal
from sse_tune.tuning.study import SpaceStudy

if TYPE_CHECKING:
    from sse_tune.tuning.strategy import Decomposed


@dataclasses.dataclass
class Track:
    """One stage in one template, for all outer points of one contract."""

    stage: str
    slot: Slot
    study: SpaceStudy
    limit: int
    asked: int = 0
    out: int = 0
    first_us: float | None = None

    def urgency(self, slowest_us: float) -> float:
        """Stages that take longer, were tried less and have more left come first; one never asked for before all.

        Args:
            slowest_us: counts for a track whose first config still compiles, so that others of it compile meanwhile.
        """
        if self.asked == 0:
            return float("inf")
        left = max(0, len(self.study.configs) - self.asked) / len(self.study.configs)
        return left * (self.first_us or slowest_us) / (self.asked + 2)

    def tell(self, choice: StageChoice, time_us: float | None) -> None:
        self.study.tell(choice.config, time_us)
        self.first_us = self.first_us or time_us



class Point:
    """Asks for the base, then for stages, then for the plan of the best; where that is not admitted, stage by stage.

    Args:
        strategy: whose point it is.
        base: the default plan here, or one that is known to run.
        until: the share of the budget at which tuning ends.
        base_us: of a base that is known to run, which is not asked for.
    """

    def __init__(self, strategy: Decomposed, base: Plan, until: float, base_us: float | None = None) -> None:
        self.strategy, self.base, self.until = strategy, base, until
        self.best_us = base_us
        self.closed, self.admitted = False, base_us is not None
        self._tracks: list[Track] | None = None
        self._next: Plan | None = None if self.admitted else base  # a whole plan to be asked for
        self._waiting: Plan | None = None  # one that was
        self._gains: list[tuple[float, str, StageChoice]] = []
        self._grown, self._growing, self._put = base, False, False
        self._rehearsal = Rehearsal(base)

    def ask(self) -> Candidate | None:
        if self._next is not None:
            self._waiting, self._next = self._next, None
            return Candidate("plan", self._waiting)
        if self._waiting is not None or self.closed:
            return None
        if self._tracks is None:
            self._tracks = self._open_tracks()
        if not self._is_over(self._tracks):
            slowest_us = max((track.first_us or 1.0 for track in self._tracks), default=1.0)
            for track in sorted(self._tracks, key=lambda track: -track.urgency(slowest_us)):
                if track.asked < track.limit and (config := track.study.ask()) is not None:
                    track.asked += 1
                    track.out += 1
                    plan = self.base.replace_stage(track.stage, track.slot.choice(config))
                    return Candidate("stage", plan, self.base, track.stage)
        if any(track.out for track in self._tracks):
            return None
        self._put_together(self._tracks)
        return self.ask() if self._next is not None else None

    def tell(self, candidate: Candidate, time_us: float | None) -> None:
        if candidate.stage is not None:
            track = self._track_of(candidate)
            track.out -= 1
            track.tell(candidate.plan.stages[candidate.stage], time_us)
        elif candidate.plan == self._waiting:
            self._waiting = None
            if time_us is not None:
                self.best_us = time_us if self.best_us is None else min(self.best_us, time_us)
            if not self.admitted:
                self.admitted = time_us is not None
                self.closed = time_us is None or not self.strategy.worth_tuning(time_us)
            else:
                self._after_whole(candidate.plan, time_us)

    def correct(self, candidate: Candidate, time_us: float) -> None:
        """See `Strategy.correct`."""
        assert candidate.stage is not None
        self._track_of(candidate).study.correct(candidate.plan.stages[candidate.stage].config, time_us)

    @property
    def is_tuned(self) -> bool:
        """Whether no stage is measured here any more: whole plans are left."""
        return self.admitted and self._waiting is not None

    def rehearse(self) -> Plan | None:
        """See `Strategy.rehearse`."""
        if self._tracks is None or self.closed:
            return None
        return self._rehearsal.next(self._rankings(self._tracks))

    def rehearsed(self, plan: Plan, time_us: float | None) -> bool:
        """See `Strategy.rehearsed`."""
        return self._rehearsal.tell(plan, time_us)

    def withdraw(self, candidate: Candidate) -> bool:
        """See `Strategy.withdraw`: whole plans must be run, what follows depends on them."""
        if candidate.stage is None:
            return False
        track = self._track_of(candidate)
        track.asked, track.out = track.asked - 1, track.out - 1
        track.study.withdraw(candidate.plan.stages[candidate.stage].config)
        return True

    def _track_of(self, candidate: Candidate) -> Track:
        assert candidate.stage is not None
        choice = candidate.plan.stages[candidate.stage]
        wanted = (candidate.stage, choice.backend, choice.template)
        (track,) = (t for t in self._tracks or () if (t.stage, t.slot.backend, t.slot.template) == wanted)
        return track

    def _open_tracks(self) -> list[Track]:
        strategy, settings = self.strategy, self.strategy.settings
        landscape, outer = strategy.landscape, self.base.outer
        slots = [(stage, slot) for stage in self.base.stages for slot in landscape.slots(stage)]
        sampler = settings.sampler_for(sum(slot.count(landscape, outer) for _, slot in slots))
        tracks = []
        for stage, slot in slots:
            contract = landscape.contract(stage, outer)
            key = (stage, slot.backend, slot.template, contract)
            if key not in strategy.tracks:
                chosen = [plan.stages.get(stage) for plan in strategy.known_plans]
                study = SpaceStudy(
                    slot.space, landscape.problem, landscape.device, outer, sampler=sampler, seed=settings.seed,
                    first=[c.config for c in chosen if c and (c.backend, c.template) == (slot.backend, slot.template)],
                    on_rejected=lambda config, reason, stage=stage, slot=slot: settings.on_rejected(  # type: ignore[misc]
                        Candidate(
                            "stage", self.base.replace_stage(stage, slot.choice(config)), self.base, stage
                        ), reason
                    ),
                    storage=settings.storage, name=f"{settings.study}/{stage}/{slot.template}/{contract}",
                )  # fmt: skip
                limit = len(study.configs) if sampler == "exhaustive" else settings.max_stage_trials
                strategy.tracks[key] = Track(stage, slot, study, limit)
            track = strategy.tracks[key]
            self._take_known(track)
            tracks.append(track)
        return tracks

    def _take_known(self, track: Track) -> None:
        """Earlier trials, of this process or another, need not be asked for."""
        told = track.study.told
        for config in track.study.configs:
            if config not in told:
                choice = track.slot.choice(config)
                plan = self.base.replace_stage(track.stage, choice)
                found = self.strategy.settings.known(Candidate("stage", plan, self.base, track.stage))
                if found is not None:
                    track.asked += 1
                    track.tell(choice, found.time_us)

    def _is_over(self, tracks: list[Track]) -> bool:
        settings = self.strategy.settings
        if self.strategy.stopped or settings.used() >= self.until:
            return True
        if settings.target is None:
            return False
        best = estimated = 0.0
        for stage in self.base.stages:
            of_stage = [track.study for track in tracks if track.stage == stage]
            times = [study.best[1] for study in of_stage if study.best is not None]
            estimates = [estimated_best_us(study) for study in of_stage]
            if not times or any(estimate is None for estimate in estimates):
                return False
            best += min(times)
            estimated += min(estimate for estimate in estimates if estimate is not None)
        return best <= settings.target * estimated

    def _rankings(self, tracks: list[Track]) -> dict[str, Ranking]:
        rankings: dict[str, Ranking] = {stage: [] for stage in self.base.stages}
        for track in tracks:
            rankings[track.stage] += [(track.slot.choice(c), time_us) for c, time_us in track.study.ranking()]
        for ranking in rankings.values():
            ranking.sort(key=lambda pair: pair[1])
        return rankings

    def _put_together(self, tracks: list[Track]) -> None:
        for track in tracks:
            self._take_known(track)
        rankings = self._rankings(tracks)
        chosen = self._rehearsal.chosen(rankings)
        for stage, choice in chosen.stages.items():
            if choice != self.base.stages[stage]:
                times = dict(rankings[stage])
                self._gains.append((times.get(self.base.stages[stage], times[choice]) - times[choice], stage, choice))
        self._gains.sort(key=lambda gain: -gain[0])
        if not self._gains:
            self.closed = True
            return
        self._next = chosen

    def _after_whole(self, plan: Plan, time_us: float | None) -> None:
        """The plan of all the best is admitted: done, unless rehearsals have found a faster one since. It is not: grow
        from the base, the largest gain first."""
        if self._growing:
            self._grown = plan if time_us is not None else self._grown
        elif time_us is not None or self._put or len(self._gains) == 1:
            self._put = self._put or time_us is not None
            self._next = self._rehearsal.ahead_of(plan) if time_us is not None else None
            self.closed = self._next is None
            return
        self._growing = True
        if not self._gains:
            self.closed = True
            return
        _, stage, choice = self._gains.pop(0)
        self._next = self._grown.replace_stage(stage, choice)
