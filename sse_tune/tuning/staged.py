"""The search over staged plans: few outer points, best predicted first; inside each the stages are tuned apart.

Stage times are nearly additive once the outer point is fixed, so tuning them one by one finds what the joint space
holds in a sum instead of a product of trials. What is assembled of the best is admitted and timed as a whole.
"""

from __future__ import annotations

import dataclasses
import statistics

from sse_tune.device import Device
from sse_tune.errors import ConstraintError
from sse_tune.plan import Plan, StageChoice
from sse_tune.problem import Problem
from sse_tune.space import Config
from sse_tune.templates.registry import Template, default_plan, templates_for
from sse_tune.templates.stages import GRAPHS, stage_bytes, stage_flops, stages_of
from sse_tune.tuning.ahead import CompileAhead
from sse_tune.tuning.cases import QUICK
from sse_tune.tuning.check import chunk_size_of
from sse_tune.tuning.evaluate import Evaluator
from sse_tune.tuning.study import SpaceStudy

STAGE_TIME_LIMIT_S = 0.05
PLAN_TIME_LIMIT_S = 0.5
_MAX_STAGE_TRIALS = 64
_HOPELESS = 1.5  # times the best: two runs are enough to see it
_MAX_OUTER_POINTS = 4
_SECONDS_PER_OUTER_POINT = 60.0
# what the model counts with where nothing was measured: bytes and FLOPs per second of a data-centre GPU
_BYTES_PER_S, _FLOPS_PER_S = 3e12, 300e12


def predicted_us(problem: Problem, outer: Config) -> float:
    """The roofline's time of the staged graph: each stage at its bandwidth or its arithmetic, whichever is slower."""
    chunk_size = int(outer["chunk_size"])
    return sum(
        1e6 * max(stage_bytes(s, problem, outer) / _BYTES_PER_S, stage_flops(s, problem, chunk_size) / _FLOPS_PER_S)
        for s in stages_of(problem, outer)
    )


def outer_points(problem: Problem, device: Device, first: Config, count: int) -> list[Config]:
    """The outer points to try: `first`, then the best predicted."""
    others = [outer for outer in GRAPHS["staged"].configs(problem, device) if outer != first]
    return [first, *sorted(others, key=lambda outer: predicted_us(problem, outer))][:count]


def search_staged(
    evaluator: Evaluator, ahead: CompileAhead | None, backends: tuple[str, ...], share: float, seed: int
) -> list[Plan]:
    """Tunes until `share` of the budget is used; returns the plans that were admitted, tuned ones first."""
    problem, device, recorder = evaluator.problem, evaluator.device, evaluator.recorder
    default = default_plan(problem, device, backends[0])
    count = max(1, min(_MAX_OUTER_POINTS, int(recorder.remaining_s(share) / _SECONDS_PER_OUTER_POINT)))
    points = outer_points(problem, device, default.outer, count)
    found: list[Plan] = []
    bases: list[Plan] = []
    best_base: float | None = None
    begin = recorder.elapsed_s / recorder.budget_s
    for number, outer in enumerate(points, start=1):
        if not recorder.may_go_on(share):
            break
        try:
            base = default_plan(problem, device, backends[0], outer)
        except ConstraintError:
            continue
        recorder.report(f"admitting C={outer['chunk_size']}", number - 1, len(points))
        if ahead is not None:
            for future in ahead.submit_plan(base, problem, chunk_size_of(base), QUICK):
                future.exception()  # waits; what failed to compile fails again, with its reason, in the trial
        attempt = evaluator.plan(base, PLAN_TIME_LIMIT_S)
        if attempt.outcome != "ok":
            continue
        bases.append(base)
        time_us = statistics.median(attempt.timings_us)
        if best_base is not None and time_us > 1.6 * best_base:
            continue  # stages tuned apart do not make up for this much
        best_base = time_us if best_base is None else min(best_base, time_us)
        until = begin + (share - begin) * number / len(points)
        rankings = _OuterPoint(evaluator, ahead, base, backends, seed).tune(until)
        assembled = _assemble(evaluator, ahead, base, rankings)
        if assembled is not None:
            found.append(assembled)
    return found + bases


@dataclasses.dataclass
class _Track:
    """One stage in one template at an outer point."""

    stage: str
    template: Template
    study: SpaceStudy
    trials: int = 0
    first_us: float | None = None

    def urgency(self) -> float:
        """Stages that take longer, and were tried less, come first; a stage that was never timed before all."""
        return float("inf") if self.trials == 0 else (self.first_us or 1.0) / (self.trials + 2)


Ranking = list[tuple[StageChoice, float]]


class _OuterPoint:
    """Tunes every stage of one outer point on the buffers of a plan that runs."""

    def __init__(
        self, evaluator: Evaluator, ahead: CompileAhead | None, base: Plan, backends: tuple[str, ...], seed: int
    ) -> None:
        self.evaluator, self.ahead, self.base = evaluator, ahead, base
        self.tracks = [self._track(stage, t, seed) for stage in base.stages
                       for t in templates_for(stage, evaluator.problem, backends)]  # fmt: skip

    def tune(self, until: float) -> dict[str, Ranking]:
        """Tries configs until this share of the budget is used, or all are tried; choices by stage, fastest first."""
        recorder = self.evaluator.recorder
        lookahead = 1 if self.ahead is None else 2 * self.ahead.size
        queue: list[tuple[_Track, Config, Plan, list]] = []
        total = sum(min(len(track.study.configs), _MAX_STAGE_TRIALS) for track in self.tracks)
        while recorder.may_go_on(until):
            while len(queue) < lookahead and (proposed := self._propose()) is not None:
                queue.append(proposed)
            if not queue:
                break
            # what is compiled already, else what was asked first
            ready = next((i for i, entry in enumerate(queue) if all(future.done() for future in entry[3])), 0)
            track, config, plan, compiled = queue.pop(ready)
            give_up_us = None if track.study.best is None else _HOPELESS * track.study.best[1]
            attempt = self.evaluator.stage(plan, self.base, track.stage, compiled, STAGE_TIME_LIMIT_S, give_up_us)
            time_us = statistics.median(attempt.timings_us) if attempt.outcome == "ok" else None
            track.study.tell(config, time_us)
            track.first_us = track.first_us or time_us
            done = sum(t.trials for t in self.tracks) - len(queue)
            recorder.report(f"C={self.base.outer['chunk_size']} {track.stage}", done, total)
        rankings: dict[str, Ranking] = {stage: [] for stage in self.base.stages}
        for track in self.tracks:
            rankings[track.stage] += [(self._choice(track, c), time_us) for c, time_us in track.study.ranking()]
        return {stage: sorted(ranking, key=lambda pair: pair[1]) for stage, ranking in rankings.items()}

    def _track(self, stage: str, template: Template, seed: int) -> _Track:
        evaluator, base = self.evaluator, self.base

        def rejected(config: Config, reason: str) -> None:
            plan = base.replace_stage(stage, StageChoice(template.backend, template.name, config))
            evaluator.recorder.reject("stage", stage, plan, reason)

        study = SpaceStudy(
            template.space, evaluator.problem, evaluator.device, base.outer, seed=seed, on_rejected=rejected
        )
        track = _Track(stage, template, study)
        for config in study.configs:
            plan = base.replace_stage(stage, self._choice(track, config))
            known = evaluator.recorder.lookup("stage", stage, plan)
            if known is not None:
                time_us = statistics.median(known.timings_us) if known.outcome == "ok" else None
                study.tell(config, time_us)
                track.trials += 1
                track.first_us = track.first_us or time_us
        return track

    def _propose(self) -> tuple[_Track, Config, Plan, list] | None:
        """The next config of the stage that needs it most, already handed to the compiler."""
        for track in sorted(self.tracks, key=lambda track: -track.urgency()):
            if track.trials >= _MAX_STAGE_TRIALS or (config := track.study.ask()) is None:
                continue
            track.trials += 1
            choice, problem = self._choice(track, config), self.evaluator.problem
            plan = self.base.replace_stage(track.stage, choice)
            compiled = []
            if self.ahead is not None and choice.backend == "triton":
                one_stage = dataclasses.replace(self.base, stages={track.stage: choice})
                compiled = self.ahead.submit_plan(one_stage, problem, chunk_size_of(plan), QUICK[:1])
            return track, config, plan, compiled
        return None

    def _choice(self, track: _Track, config: Config) -> StageChoice:
        return StageChoice(track.template.backend, track.template.name, config)


def _assemble(
    evaluator: Evaluator, ahead: CompileAhead | None, base: Plan, rankings: dict[str, Ranking]
) -> Plan | None:
    """The base with every stage's best; where the whole is not admitted, stage by stage, by what each gains."""
    problem = evaluator.problem
    gains: list[tuple[float, str, StageChoice]] = []
    for stage, ranking in rankings.items():
        times = dict(ranking)
        if ranking and ranking[0][0] != base.stages[stage]:
            gains.append((times.get(base.stages[stage], ranking[0][1]) - ranking[0][1], stage, ranking[0][0]))
    if not gains:
        return None
    plan = dataclasses.replace(base, stages={**base.stages, **{stage: choice for _, stage, choice in gains}})
    if ahead is not None:
        for future in ahead.submit_plan(plan, problem, chunk_size_of(plan), QUICK):
            future.exception()
    if evaluator.plan(plan, PLAN_TIME_LIMIT_S).outcome == "ok":
        return plan
    grown = base
    for _, stage, choice in sorted(gains, key=lambda gain: -gain[0]):
        if not evaluator.recorder.may_go_on():
            break
        candidate = grown.replace_stage(stage, choice)
        if evaluator.plan(candidate, PLAN_TIME_LIMIT_S).outcome == "ok":
            grown = candidate
    return grown if grown != base else None


def search_whole(evaluator: Evaluator, backend: str, share: float, seed: int) -> list[Plan]:
    """Tunes a one-stage plan end to end; returns the plans that were admitted, fastest first."""
    problem, device, recorder = evaluator.problem, evaluator.device, evaluator.recorder
    outer = GRAPHS["whole"].default(problem, device)
    ranked: list[tuple[float, Plan]] = []
    for template in templates_for("whole", problem, (backend,)):

        def plan_of(config: Config, template: Template = template) -> Plan:
            return Plan("whole", outer, {"whole": StageChoice(template.backend, template.name, config)})

        study = SpaceStudy(
            template.space, problem, device, outer, seed=seed,
            on_rejected=lambda config, reason: recorder.reject("plan", None, plan_of(config), reason),
        )  # fmt: skip
        done = 0
        for config in study.configs:
            known = recorder.lookup("plan", None, plan_of(config))
            if known is not None:
                study.tell(config, statistics.median(known.timings_us) if known.outcome == "ok" else None)
                done += 1
        while recorder.may_go_on(share) and (asked := study.ask()) is not None:
            recorder.report("plans", done, len(study.configs))
            give_up_us = None if study.best is None else _HOPELESS * study.best[1]
            attempt = evaluator.plan(plan_of(asked), PLAN_TIME_LIMIT_S, give_up_us)
            study.tell(asked, statistics.median(attempt.timings_us) if attempt.outcome == "ok" else None)
            done += 1
        recorder.report("plans", done, len(study.configs))
        ranked += [(time_us, plan_of(config)) for config, time_us in study.ranking()]
    return [plan for _, plan in sorted(ranked, key=lambda pair: pair[0])]
