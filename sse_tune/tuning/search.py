"""`search`: from a problem to a tuned, admitted plan in the database, within a budget of time."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Sequence

import torch

from sse_tune.database.keys import sources_of, study_key, toolchain_of
from sse_tune.database.records import Answer, now
from sse_tune.database.store import TuningDatabase
from sse_tune.device import Device, driver_version, toolchain
from sse_tune.errors import SearchError
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.templates.registry import graph_of
from sse_tune.tuning.busy import Busy
from sse_tune.tuning.candidates import Candidate, Settings
from sse_tune.tuning.engine import Engine
from sse_tune.tuning.evaluate import Evaluator
from sse_tune.tuning.finals import Finals, Verdict
from sse_tune.tuning.jobs import Attempt
from sse_tune.tuning.landscape import Templates, base_plan, other_defaults
from sse_tune.tuning.lanes import Lanes
from sse_tune.tuning.machine import backends_for, compilers_for, detect, workers_for
from sse_tune.tuning.recorder import Progress, Recorder
from sse_tune.tuning.report import EntryResult, FrontierPlan, SearchInterrupted, SearchReport, frontier
from sse_tune.tuning.samplers import check_sampler
from sse_tune.tuning.shared import incumbent, known_plans, shared_storage
from sse_tune.tuning.strategy import Decomposed, Strategy, WholePlans
from sse_tune.tuning.workload import Entry, Workload

_EXPLORING_SHARE = 0.75  # of the budget; the rest is for the finalists and the neighbours of the best
_MAX_OUTER_POINTS = 4
_SECONDS_PER_OUTER_POINT = 60.0
_SEED = 0


def search(
    problem: Problem,
    budget_s: float = 300,
    *,
    backends: Sequence[str] | None = None,
    database: TuningDatabase | str | pathlib.Path | None = None,
    resume: bool = False,
    trials: int | None = None,
    progress: Progress | None = None,
    device: Device | torch.device | str | Sequence[str] | None = None,
    sampler: str = "auto",
    target: float | None = None,
    max_memory_bytes: int | None = None,
    workload: Workload | str | pathlib.Path | None = None,
) -> SearchReport:
    """Tune a problem, or a workload of several lengths, packings and skews, on this machine and keep the answer.

    The default plan is admitted and timed first. Candidates are compiled ahead where there is a compiler, admitted
    against the reference, timed in a worker process, and written to the database as each ends. The fastest are measured
    again in turn with what would run without this search, then the neighbours of the best: the answer is the incumbent
    unless another beats it by more than the noise. Several processes, on one host or many, may search the same problem
    on the same kind of device in one database: each candidate is tried by one of them.

    Args:
        problem: what to tune; its bucket shares the answer. Of a workload: all but the lengths.
        budget_s: seconds of wall clock the search aims to end within.
        backends: "triton", "torch", ...; None: Triton on a GPU, torch on a CPU.
        database: where trials and the answer go, a file or URL; None: the user's default database.
        resume: go on with the trials of this problem, device and backends that are there.
        trials: run at most so many candidates; None: what the budget allows.
        progress: called with (phase, done, total, best time in us so far).
        device: what to tune for; None: the GPU if there is one, else the CPU. Several names of equal devices: a worker
            for each, side by side.
        sampler: "tpe", "gp", "random", "exhaustive", or "auto": exhaustive where a space fits the budget, else TPE.
        target: end once what was found is estimated to be within this factor of the best, 1.03 for 3 %.
        max_memory_bytes: leave out plans that need more above their inputs, on any entry; on a GPU only.
        workload: tune for all its entries at once, or for those of a file: the plan of the least expected time that is
            slower on no entry than what would run there without this search. It is the answer of every entry's bucket.

    Returns:
        SearchReport: timings of the default and of the answer, the plan, errors, trials by outcome.

    Raises:
        SearchError: the budget, a backend, the sampler, the target or the memory limit makes no sense, or no plan was
            admitted.
        WorkloadError: the workload's file is damaged, or does not fit the problem.
        SearchInterrupted: Ctrl-C; what was tried is kept.
        WorkerError: no worker process can be started.
    """
    if budget_s <= 0 or (trials is not None and trials < 1):
        raise SearchError("the budget must be positive", f"budget_s={budget_s}, trials={trials}", "give it seconds")
    if target is not None and target <= 1:
        raise SearchError("a target must be above 1", f"target={target}", "1.03 asks for 3 % of the best")
    check_sampler(sampler)
    tuned = _workload_of(problem, workload)
    problem = tuned.problem
    with contextlib.ExitStack() as stack:
        opened = database
        if not isinstance(opened, TuningDatabase):
            opened = stack.enter_context(TuningDatabase(database))  # type: ignore[arg-type]
        lanes = Lanes(workers_for(device))
        stack.callback(lanes.close)
        found = detect(lanes, device)
        chosen = backends_for(backends, found)
        if max_memory_bytes is not None and (found.kind != "cuda" or max_memory_bytes < 1):
            raise SearchError("a memory limit is in bytes, and needs a GPU", f"{max_memory_bytes} on {found.name}",
                              "leave it out")  # fmt: skip
        note: dict[str, object] = {"budget_s": budget_s} | ({} if tuned.key is None else {"workload": tuned.key})
        study = opened.open_study(study_key(problem, found, chosen, tuned.key), problem, found, note)
        recorder = Recorder(
            opened, study, problem, resume=resume, budget_s=budget_s, max_trials=trials, progress=progress
        )
        stack.callback(recorder.close)
        ahead = compilers_for(chosen, found)
        if ahead is not None:
            stack.enter_context(ahead)
        engine = Engine(Evaluator(tuned, found, recorder), ahead, lanes, max_memory_bytes)
        try:
            return _search(engine, chosen, sampler, target)
        except KeyboardInterrupt:
            recorder.interrupt()
            raise SearchInterrupted(study, len(recorder.known)) from None


def _workload_of(problem: Problem, workload: Workload | str | pathlib.Path | None) -> Workload:
    if workload is None:
        return Workload.of(problem)
    if not isinstance(workload, Workload):
        return Workload.read(workload, problem)
    Workload((*workload.entries, Entry(problem=problem)))  # refused where they differ in more than lengths
    return workload


def compiled_first(
    workload: Workload, device: Device, default: Plan, known: Sequence[Plan], staged: tuple[str, ...]
) -> list[Candidate]:
    """What is compiled while the default is admitted, in this order; should that fail, it is lost. Whole plans, then
    the default of every other template beside the nearest known plan, whose outer point is tuned first, and beside the
    default."""
    found = [Candidate("plan", plan) for plan in (default, *known)]
    for base in dict.fromkeys((*known[:1], default)):
        if base.graph == "staged":
            for stage, choice in other_defaults(Templates(workload, device, staged), base):
                found.append(Candidate("stage", base.replace_stage(stage, choice), base, stage))
    return found


def _search(engine: Engine, backends: tuple[str, ...], sampler: str, target: float | None) -> SearchReport:
    workload, device, recorder = engine.workload, engine.evaluator.device, engine.recorder
    recorder.report("admitting the default", 0, 1)
    default = base_plan(workload, device, backends[0])
    staged = tuple(backend for backend in backends if graph_of(backend) == "staged")
    known = known_plans(recorder.database, workload, device, backends)
    for candidate in compiled_first(workload, device, default, known, staged):
        engine.compile(candidate)
    first = engine.evaluate(Candidate("plan", default))
    holders: list[Plan | None] = []
    for entry in workload.entries:
        holder = incumbent(recorder.database, entry.problem, device, workload.problems)
        is_searched = holder is not None and {choice.backend for choice in holder.stages.values()} <= set(backends)
        holders.append(holder if is_searched else None)
    storage = shared_storage(recorder.database)
    groups = [staged] if staged else []
    groups += [(backend,) for backend in backends if graph_of(backend) == "whole"]
    found: list[Plan] = []
    for number, group in enumerate(groups, start=1):
        share = _EXPLORING_SHARE * number / len(groups)
        points = round(recorder.remaining_s(share) / _SECONDS_PER_OUTER_POINT)
        settings = Settings(
            sampler=sampler, seed=_SEED, target=target,
            max_points=max(1, min(_MAX_OUTER_POINTS, points)),
            used=lambda share=share: recorder.elapsed_s / (share * recorder.budget_s),  # type: ignore[misc]
            room=lambda share=share: recorder.room(share),  # type: ignore[misc]
            known=engine.known, on_rejected=recorder.reject, storage=storage, study=recorder.study,
        )  # fmt: skip
        kind: type[Strategy] = Decomposed if graph_of(group[0]) == "staged" else WholePlans
        of_graph = [plan for plan in known if plan.graph == graph_of(group[0])]
        strategy = kind(Templates(workload, device, group), settings, of_graph)  # type: ignore[call-arg]
        engine.run(strategy, share)
        found += strategy.plans()
    for holder in dict.fromkeys(plan for plan in holders if plan is not None):  # if exploring ended before its turn
        recorder.report("admitting the incumbent", 0, 1)
        engine.evaluate(Candidate("plan", holder))
    admitted = engine.known(Candidate("plan", default))
    if not found and (admitted is None or admitted.time_us is None):
        reason = f"{first.outcome}, {first.reason}"
        if engine.over_memory:
            reason = f"the least memory was {min(engine.over_memory.values())} bytes above the inputs"
        raise SearchError(
            "some plan must pass admission and the limits", f"the default failed: {reason}",
            "run `sse-tune check` for the whole story",
        )  # fmt: skip
    verdict = Finals(engine, default, *holders).decide(found)
    busy = engine.lanes.stopwatch.busy(engine.compile_wait_s)
    how: dict[str, object] = {
        "study": recorder.study, "trials": sum(recorder.outcomes.values()), "budget_s": recorder.budget_s,
        "sampler": sampler, "seed": _SEED, "backends": list(backends), "wall_s": round(recorder.elapsed_s, 1),
        "ties": [plan.key for plan in verdict.ties], "neighbours": verdict.neighbours,
        "busy": busy.to_dict(),
    }  # fmt: skip
    return _report(engine, default, first, verdict, busy, how)


def _report(
    engine: Engine, default: Plan, first: Attempt, verdict: Verdict, busy: Busy, how: dict[str, object]
) -> SearchReport:
    """Stores the answer for the bucket of every entry, as measured on it, and tells what was found."""
    recorder, workload = engine.recorder, engine.workload
    base, best = verdict.default, verdict.timing
    # of entries in one bucket the heaviest speaks for all; what an entry would suffer from is not stored for it
    buckets: dict[str, int] = {}
    for number, problem in enumerate(entry.problem for entry in workload.entries):
        buckets.setdefault(problem.bucket.name, number)
    spoiled = {workload.entries[number].problem.bucket.name for number in verdict.slowed}
    stored = {
        bucket: bucket not in spoiled and recorder.database.put_answer(_answer(engine, verdict, number, how))
        for bucket, number in buckets.items()
    }
    recorder.report("done", 1, 1)
    timed = [
        FrontierPlan(Plan.from_dict(trial.plan).key, trial.time_us, int(trial.resources["peak_bytes"]))
        for trial in recorder.known.values()
        if trial.kind == "plan" and trial.outcome == "ok" and trial.time_us and "peak_bytes" in trial.resources
    ]
    return SearchReport(
        problem=workload.problem,
        device=engine.evaluator.device,
        bucket=workload.problem.bucket.name,
        study=recorder.study,
        default=None if base is None else base.total,
        best=best.total,
        plan=verdict.plan,
        is_default=verdict.plan == default,
        errors=verdict.errors,
        outcomes=dict(recorder.outcomes),
        trials=sum(recorder.outcomes.values()),
        wall_s=recorder.elapsed_s,
        stored=all(stored.values()),
        default_failure=None if first.outcome == "ok" else f"{first.outcome}: {first.reason}",
        ties=len(verdict.ties),
        frontier=frontier(timed),
        over_memory=len(engine.over_memory),
        busy=busy,
        entries=tuple(
            EntryResult(
                title=entry.title, share=entry.weight, bucket=entry.problem.bucket.name,
                default=None if base is None else base.entries[number], best=best.entries[number],
                stored=stored[entry.problem.bucket.name],
            )
            for number, entry in enumerate(workload.entries)
        ),
    )  # fmt: skip


def _answer(engine: Engine, verdict: Verdict, number: int, how: dict[str, object]) -> Answer:
    """The answer for an entry's bucket, with what was measured on that entry."""
    workload, device, plan = engine.workload, engine.evaluator.device, verdict.plan
    entry, timing = workload.entries[number], verdict.timing.entries[number]
    base = verdict.default
    beside = [  # a plan that is better for other entries only is none that this entry's answer was chosen over
        other.key for other, measured in verdict.timings.items()
        if other != plan and not measured.entries[number].beats(timing)
    ]  # fmt: skip
    how = how | {"beside": beside}
    if workload.key is not None:
        how = how | {"workload": {
            "id": workload.id, "entries": len(workload.entries), "entry": entry.to_dict(),
            "time_us": verdict.timing.median_us, "default_time_us": None if base is None else base.median_us,
        }}  # fmt: skip
    return Answer(
        bucket=entry.problem.bucket.name,
        device=device.slug,
        arch=device.arch,
        driver=driver_version() if device.kind == "cuda" else None,
        toolchain=toolchain_of(plan, toolchain()),
        sources=sources_of(plan),
        problem=entry.problem.to_dict(),
        plan=plan,
        time_us=timing.median_us,
        default_time_us=None if base is None else base.entries[number].median_us,
        timings_us=timing.times_us,
        errors=verdict.errors,
        created=now(),
        how=how,
    )
