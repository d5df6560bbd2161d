"""Search strategies compared on a recorded sweep, with no GPU: evaluations until within 3 % of the exhaustive best.

    python -m sse_tune.tuning.replay FILE [--seeds 20] [--noise 0.02] [--evaluations 400] [--strategies ours,tpe]

One evaluation is one measurement, of a stage or of a whole plan. After each, a strategy is judged by the exact time of
the plan it would answer with: of those it measured whole or could put together of the stages it measured, the one it
believes to be the fastest. What counts is the evaluation from which on that plan stays within reach. All strategies
begin with the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence

from sse_tune.errors import SearchError, SSETuneError
from sse_tune.plan import Plan, StageChoice
from sse_tune.tuning.candidates import Candidate, Settings
from sse_tune.tuning.joint import Joint
from sse_tune.tuning.recorded import Recorded
from sse_tune.tuning.samplers import check_sampler
from sse_tune.tuning.strategy import Decomposed, Proposer, WholePlans
from sse_tune.tuning.sweep_file import Sweep, read_sweep

STRATEGIES = ("ours", "random", "tpe", "gp", "exhaustive")
WITHIN = 1.03


@dataclasses.dataclass(frozen=True)
class Result:
    """How a strategy did over several seeds.

    Args:
        strategy: its name.
        evaluations: until within `WITHIN` of the best, by seed; None: not within the evaluations there were.
        ratios: of the answer's exact time to the best, when the evaluations were used or, without noise, once within
            reach; by seed.
    """

    strategy: str
    evaluations: tuple[int | None, ...]
    ratios: tuple[float, ...]

    @property
    def median(self) -> float | None:
        """Of the evaluations; None: not even half of the seeds came within reach."""
        ordered = sorted(float("inf") if count is None else count for count in self.evaluations)
        middle = statistics.median(ordered)
        return None if middle == float("inf") else middle

    def to_dict(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "median": self.median}


class Incumbent:
    """The plan a strategy would answer with, from what it was told."""

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded
        self._plans: dict[Plan, float] = {}
        self._stages: dict[tuple[str, object], dict[StageChoice, float]] = {}

    def saw(self, candidate: Candidate, time_us: float | None) -> None:
        if time_us is None:
            return
        if candidate.stage is None:
            self._plans[candidate.plan] = time_us
            return
        contract = self.recorded.contract(candidate.stage, candidate.plan.outer)
        times = self._stages.setdefault((candidate.stage, contract), {})
        times[candidate.plan.stages[candidate.stage]] = time_us

    def plan(self) -> Plan | None:
        """None: nothing was admitted yet."""
        believed = [self._improved(plan, time_us) for plan, time_us in self._plans.items()]
        return min(believed, key=lambda pair: pair[1])[0] if believed else None

    def _improved(self, plan: Plan, time_us: float) -> tuple[Plan, float]:
        """A measured plan with the stages that were measured to be faster than its own."""
        for stage, choice in plan.stages.items():
            times = self._stages.get((stage, self.recorded.contract(stage, plan.outer)), {})
            if choice in times:
                best = min(times, key=lambda other: times[other])
                plan, time_us = plan.replace_stage(stage, best), time_us - times[choice] + times[best]
        return plan, time_us


def compare(
    sweep: Sweep, strategies: Sequence[str] = STRATEGIES, *, seeds: int = 20, evaluations: int = 400, noise: float = 0.0
) -> list[Result]:
    """Runs strategies on a sweep.

    Args:
        sweep: the recording.
        strategies: of `STRATEGIES`.
        seeds: how many runs of each; every one has its own samplers and noise.
        evaluations: at most, of a run.
        noise: see `Recorded`.

    Raises:
        SearchError: a strategy is not known, or its packages are missing.
    """
    for name in strategies:
        if name not in STRATEGIES:
            raise SearchError("the strategy must be known", repr(name), f"choose of {', '.join(STRATEGIES)}")
        check_sampler("exhaustive" if name in ("ours", "exhaustive") else name)
    found = []
    for name in strategies:
        if name == "exhaustive":
            # whoever tries everything knows the best at the end, and not before
            exact = Recorded(sweep)
            found.append(Result(name, (exact.plans,) * seeds, (1.0,) * seeds))
            continue
        runs = [_run(name, Recorded(sweep, noise, seed), seed, evaluations) for seed in range(seeds)]
        found.append(Result(name, tuple(count for count, _ in runs), tuple(ratio for _, ratio in runs)))
    return found


def _run(name: str, recorded: Recorded, seed: int, evaluations: int) -> tuple[int | None, float]:
    strategy, best_us, incumbent = _strategy(name, recorded, seed, evaluations), recorded.best_us(), Incumbent(recorded)
    reached, ratio, made = None, float("inf"), 0
    while made < evaluations and (candidate := strategy.ask()) is not None:
        time_us = recorded.answer_us(candidate)
        strategy.tell(candidate, time_us)
        incumbent.saw(candidate, time_us)
        made += 1
        plan = incumbent.plan()
        exact = None if plan is None else recorded.exact_us(plan)
        ratio = float("inf") if exact is None else exact / best_us
        if ratio > WITHIN:
            reached = None  # it was believed to be there, and is led away again
        elif reached is None:
            reached = made
            if recorded.noise == 0.0:
                break  # what is believed is exact, and can only become better
    return reached, ratio


def _strategy(name: str, recorded: Recorded, seed: int, evaluations: int) -> Proposer:
    if name != "ours":
        return Joint(recorded, name, seed)
    settings = Settings(sampler="tpe", seed=seed, max_points=len(recorded.outers))
    return WholePlans(recorded, settings) if recorded.graph == "whole" else Decomposed(recorded, settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; the last line is one JSON object. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sse_tune.tuning.replay", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=pathlib.Path, help="a sweep, NAME.json.gz")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--evaluations", type=int, default=400, help="at most, of a run")
    parser.add_argument("--noise", type=float, default=0.0, help="0.02: each answer is blurred by about 2 %%")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    given = parser.parse_args(arguments)
    try:
        sweep = read_sweep(given.file)
        results = compare(
            sweep, given.strategies.split(","), seeds=given.seeds, evaluations=given.evaluations, noise=given.noise
        )
    except SSETuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    recorded = Recorded(sweep)
    print(f"{sweep.problem.bucket.name} on {sweep.device}: {recorded.plans} plans of {', '.join(recorded.stages)}")
    print(f"evaluations until within {WITHIN} of {recorded.best_us():.1f} us, over {given.seeds} seeds")
    print(f"{'strategy':12}{'median':>10}{'least':>10}{'most':>10}{'reached':>9}{'worst ratio':>13}")
    for result in results:
        counts = [count for count in result.evaluations if count is not None]
        median = "-" if result.median is None else f"{result.median:.0f}"
        least, most = (str(min(counts)), str(max(counts))) if counts else ("-", "-")
        print(
            f"{result.strategy:12}{median:>10}{least:>10}{most:>10}{len(counts):>6}/{given.seeds:<2}"
            f"{max(result.ratios):>13.3f}"
        )
    print(json.dumps({"file": given.file.name, "noise": given.noise, "results": [one.to_dict() for one in results]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
