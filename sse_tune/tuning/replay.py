"""Search strategies compared on a recorded sweep, with no GPU: evaluations until within 3 % of the exhaustive best.

    python -m sse_tune.tuning.replay FILE [--seeds 20] [--noise 0.02] [--evaluations 400] [--strategies ours,tpe]
                                     [--plot FILE.png] [--processes 2]

One evaluation is one measurement, of a stage or of a whole plan. After each, a strategy is judged by the exact time of
the plan it would answer with: of those it measured whole or could put together of the stages it measured, the one it
believes to be the fastest. What counts is the evaluation from which on that plan stays within reach. All strategies
begin with the default. A stage may have several templates; the table is in Markdown. Where whole plans were recorded,
they take that, not the sum of their stages, and a line says how far the two are apart.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import pathlib
import statistics
import sys
from collections.abc import Sequence

from sse_tune.device import usable_cores
from sse_tune.errors import SearchError, SSETuneError
from sse_tune.plan import Plan, StageChoice
from sse_tune.tuning.additivity import additivity
from sse_tune.tuning.candidates import Candidate, Settings
from sse_tune.tuning.joint import Joint
from sse_tune.tuning.recorded import Recorded
from sse_tune.tuning.regret import draw, require_matplotlib
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
        ratios: of the answer's exact time to the best, when the evaluations were used or, where all that is believed
            is exact, once within reach; by seed.
        curves: of each run the ratio after every evaluation, infinite before a plan was admitted.
    """

    strategy: str
    evaluations: tuple[int | None, ...]
    ratios: tuple[float, ...]
    curves: tuple[tuple[float, ...], ...] = dataclasses.field(default=(), repr=False)

    @property
    def median(self) -> float | None:
        """Of the evaluations; None: not even half of the seeds came within reach."""
        ordered = sorted(float("inf") if count is None else count for count in self.evaluations)
        middle = statistics.median(ordered)
        return None if middle == float("inf") else middle

    def to_dict(self) -> dict[str, object]:
        found = {**dataclasses.asdict(self), "median": self.median}
        return {name: value for name, value in found.items() if name != "curves"}


class Incumbent:
    """The plan a strategy would answer with, from what it was told."""

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded
        self._plans: dict[Plan, float] = {}
        self._best: tuple[float, Plan] | None = None
        self._stages: dict[tuple[str, object], dict[StageChoice, float]] = {}

    def saw(self, candidate: Candidate, time_us: float | None) -> None:
        if time_us is None:
            return
        if candidate.stage is None:
            self._plans[candidate.plan] = time_us
            self._offer(candidate.plan)
            return
        contract = self.recorded.contract(candidate.stage, candidate.plan.outer)
        times = self._stages.setdefault((candidate.stage, contract), {})
        times[candidate.plan.stages[candidate.stage]] = time_us
        self._best = None
        for plan in self._plans:
            self._offer(plan)

    def plan(self) -> Plan | None:
        """None: nothing was admitted yet."""
        return None if self._best is None else self._best[1]

    def _offer(self, plan: Plan) -> None:
        improved, time_us = self._improved(plan, self._plans[plan])
        if self._best is None or time_us < self._best[0]:
            self._best = time_us, improved

    def _improved(self, plan: Plan, time_us: float) -> tuple[Plan, float]:
        """A measured plan with the stages that were measured to be faster than its own."""
        for stage, choice in plan.stages.items():
            times = self._stages.get((stage, self.recorded.contract(stage, plan.outer)), {})
            if choice in times:
                best = min(times, key=lambda other: times[other])
                plan, time_us = plan.replace_stage(stage, best), time_us - times[choice] + times[best]
        return plan, time_us


def compare(
    sweep: Sweep,
    strategies: Sequence[str] = STRATEGIES,
    *,
    seeds: int = 20,
    evaluations: int = 400,
    noise: float = 0.0,
    to_end: bool = False,
    processes: int = 1,
) -> list[Result]:
    """Runs strategies on a sweep.

    Args:
        sweep: the recording.
        strategies: of `STRATEGIES`.
        seeds: how many runs of each; every one has its own samplers and noise.
        evaluations: at most, of a run.
        noise: see `Recorded`.
        to_end: go on once within reach, for the curves; else a run without noise, whose plans are sums of stages, ends
            there.
        processes: side by side; the results are the same.

    Raises:
        SearchError: a strategy is not known, or its packages are missing.
    """
    for name in strategies:
        if name not in STRATEGIES:
            raise SearchError("the strategy must be known", repr(name), f"choose of {', '.join(STRATEGIES)}")
        check_sampler("exhaustive" if name in ("ours", "exhaustive") else name)
    wanted = [(name, seed) for name in strategies if name != "exhaustive" for seed in range(seeds)]
    arguments = [(sweep, name, seed, evaluations, noise, to_end) for name, seed in wanted]
    if processes > 1 and len(wanted) > 1:
        spawned = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks without the threads
        with concurrent.futures.ProcessPoolExecutor(processes, spawned) as pool:
            made = list(pool.map(_run, *zip(*arguments)))
    else:
        made = list(itertools.starmap(_run, arguments))
    runs = dict(zip(wanted, made))
    found = []
    for name in strategies:
        if name == "exhaustive":
            # whoever tries everything knows the best at the end, and not before
            found.append(Result(name, (Recorded(sweep).plans,) * seeds, (1.0,) * seeds))
            continue
        reached = tuple(runs[name, seed][0] for seed in range(seeds))
        curves = tuple(runs[name, seed][1] for seed in range(seeds))
        found.append(Result(name, reached, tuple(curve[-1] for curve in curves), curves))
    return found


def _run(
    sweep: Sweep, name: str, seed: int, evaluations: int, noise: float, to_end: bool
) -> tuple[int | None, tuple[float, ...]]:
    """From which evaluation on it was within reach, and the ratio after each."""
    recorded = Recorded(sweep, noise, seed)
    strategy, best_us, incumbent = _strategy(name, recorded, seed, evaluations), recorded.best_us(), Incumbent(recorded)
    reached, ratios = None, [float("inf")]
    while len(ratios) <= evaluations and (candidate := strategy.ask()) is not None:
        time_us = recorded.answer_us(candidate)
        strategy.tell(candidate, time_us)
        incumbent.saw(candidate, time_us)
        plan = incumbent.plan()
        exact = None if plan is None else recorded.exact_us(plan)
        ratios.append(float("inf") if exact is None else exact / best_us)
        if ratios[-1] > WITHIN:
            reached = None  # it was believed to be there, and is led away again
        elif reached is None:
            reached = len(ratios) - 1
            if recorded.noise == 0.0 and not recorded.has_whole_plans and not to_end:
                break  # what is believed is exact, and can only become better
    return reached, tuple(ratios[1:] or ratios)


def _strategy(name: str, recorded: Recorded, seed: int, evaluations: int) -> Proposer:
    if name != "ours":
        return Joint(recorded, name, seed)
    settings = Settings(sampler="tpe", seed=seed, max_points=len(recorded.outers))
    return WholePlans(recorded, settings) if recorded.graph == "whole" else Decomposed(recorded, settings)


def table(results: Sequence[Result], all_of_them: int, things: str) -> list[str]:
    """In Markdown: evaluations until within `WITHIN`, and the median as a share of what trying everything takes."""
    headings = ("strategy", "median", f"of {all_of_them} {things}", "least", "most", "reached", "worst ratio")
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for result in results:
        counts = [count for count in result.evaluations if count is not None]
        median = "-" if result.median is None else f"{result.median:g}"
        share = "-" if result.median is None else f"{result.median / all_of_them:.1%}"
        least, most = (min(counts), max(counts)) if counts else ("-", "-")
        reached = f"{len(counts)} of {len(result.evaluations)}"
        shown = (result.strategy, median, share, least, most, reached, f"{max(result.ratios):.3f}")
        lines.append(f"| {' | '.join(map(str, shown))} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; the last line is one JSON object. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sse_tune.tuning.replay", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=pathlib.Path, help="a sweep, NAME.json.gz")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--evaluations", type=int, default=400, help="at most, of a run")
    parser.add_argument("--noise", type=float, default=0.0, help="0.02: each answer is blurred by about 2 %%")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--plot", type=pathlib.Path, help="a picture to draw, ratio against evaluations")
    parser.add_argument("--processes", type=int, default=usable_cores())
    given = parser.parse_args(arguments)
    try:
        if given.plot is not None:
            require_matplotlib()
        sweep = read_sweep(given.file)
        sums = additivity(sweep) if sweep.plans else None
        results = compare(
            sweep, given.strategies.split(","), seeds=given.seeds, evaluations=given.evaluations, noise=given.noise,
            to_end=given.plot is not None, processes=given.processes,
        )  # fmt: skip
    except SSETuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    recorded = Recorded(sweep)
    title = f"{sweep.problem.bucket.name} on {sweep.device}"
    print(f"{title}: {recorded.plans} plans of {', '.join(recorded.stages)}\n")
    print(f"Evaluations until within {WITHIN} of {recorded.best_us():.1f} us, over {given.seeds} seeds:\n")
    # stages that add up are known once each config was tried, whole plans only once each of them was
    all_of_them = (recorded.plans, "plans") if recorded.has_whole_plans else (recorded.configs, "configs")
    print("\n".join(table(results, *all_of_them)) + "\n")
    if sums is not None:
        print(sums.line(WITHIN) + "\n")
    if given.plot is not None:
        draw({result.strategy: result.curves for result in results}, WITHIN, given.plot, title)
    found: dict[str, object] = {"file": given.file.name, "noise": given.noise, "configs": recorded.configs,
                                "plans": recorded.plans, "results": [one.to_dict() for one in results]}  # fmt: skip
    print(json.dumps(found if sums is None else {**found, "additivity": dataclasses.asdict(sums)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
