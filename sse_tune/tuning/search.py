"""`search`: from a problem to a tuned, admitted plan in the database, within a budget of time."""

from __future__ import annotations

import contextlib
import pathlib
import statistics
from collections.abc import Sequence

import torch

from sse_tune.database.keys import sources_of, study_key, toolchain_of
from sse_tune.database.records import Answer, now
from sse_tune.database.store import TuningDatabase
from sse_tune.device import Device, driver_version, toolchain
from sse_tune.errors import SearchError
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.templates.registry import BACKENDS, default_backend, default_plan, graph_of
from sse_tune.tuning import jobs
from sse_tune.tuning.ahead import CompileAhead
from sse_tune.tuning.cases import FINAL, QUICK
from sse_tune.tuning.check import chunk_size_of
from sse_tune.tuning.evaluate import PLAN_DEADLINE_S, Evaluator
from sse_tune.tuning.jobs import Attempt
from sse_tune.tuning.measure import Timing
from sse_tune.tuning.recorder import Progress, Recorder
from sse_tune.tuning.report import SearchInterrupted, SearchReport
from sse_tune.tuning.staged import PLAN_TIME_LIMIT_S, search_staged, search_whole
from sse_tune.tuning.worker import Worker

_TUNING_SHARE = 0.8  # of the budget; the rest is for the finalists
_FINALISTS = 3
_CLOSE = 1.25
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
    device: Device | torch.device | str | None = None,
) -> SearchReport:
    """Tune a problem on this machine and keep the answer.

    The default plan is admitted and timed first. Candidates are compiled ahead where there is a compiler, admitted
    against the reference, timed in a worker process, and written to the database as each ends. The fastest are measured
    again in turn with the default: the answer is the default unless another beats it by more than the noise.

    Args:
        problem: what to tune; its bucket shares the answer.
        budget_s: seconds of wall clock the search aims to end within.
        backends: "triton", "torch", ...; None: Triton on a GPU, torch on a CPU.
        database: where trials and the answer go, a file or URL; None: the user's default database.
        resume: go on with the trials of this problem, device and backends that are there.
        trials: run at most so many candidates; None: what the budget allows.
        progress: called with (phase, done, total, best time in us so far).
        device: what to tune for; None: the GPU if there is one, else the CPU.

    Returns:
        SearchReport: timings of the default and of the answer, the plan, errors, trials by outcome.

    Raises:
        SearchError: the budget or a backend makes no sense, or no plan was admitted.
        SearchInterrupted: Ctrl-C; what was tried is kept.
        WorkerError: no worker process can be started.
    """
    if budget_s <= 0 or (trials is not None and trials < 1):
        raise SearchError("the budget must be positive", f"budget_s={budget_s}, trials={trials}", "give it seconds")
    with contextlib.ExitStack() as stack:
        opened = database
        if not isinstance(opened, TuningDatabase):
            opened = stack.enter_context(TuningDatabase(database))  # type: ignore[arg-type]
        worker = stack.enter_context(Worker())
        found = device if isinstance(device, Device) else _detect(worker, device)
        chosen = _backends(backends, found)
        study = opened.open_study(study_key(problem, found, chosen), problem, found, {"budget_s": budget_s})
        known = opened.trials(study) if resume else []
        recorder = Recorder(opened, study, known, budget_s, trials, progress)
        evaluator = Evaluator(problem, found, recorder, worker)
        ahead = None
        if found.kind == "cuda" and "triton" in chosen:
            ahead = stack.enter_context(CompileAhead(found))
        try:
            return _search(evaluator, ahead, chosen)
        except KeyboardInterrupt:
            recorder.interrupt()
            raise SearchInterrupted(study, len(recorder.known)) from None


def _search(evaluator: Evaluator, ahead: CompileAhead | None, backends: tuple[str, ...]) -> SearchReport:
    problem, device, recorder = evaluator.problem, evaluator.device, evaluator.recorder
    recorder.report("admitting the default", 0, 1)
    default = default_plan(problem, device, _first_backend(backends, device))
    if ahead is not None:
        for future in ahead.submit_plan(default, problem, chunk_size_of(default), QUICK):
            future.exception()
    first = evaluator.plan(default, PLAN_TIME_LIMIT_S)
    found: list[Plan] = []
    staged = tuple(backend for backend in backends if graph_of(backend) == "staged")
    groups = [staged] if staged else []
    groups += [(backend,) for backend in backends if graph_of(backend) == "whole"]
    for number, group in enumerate(groups, start=1):
        share = _TUNING_SHARE * number / len(groups)
        if graph_of(group[0]) == "staged":
            found += search_staged(evaluator, ahead, group, share, _SEED)
        else:
            found += search_whole(evaluator, group[0], share, _SEED)
    finalists = _finalists(evaluator, found, default, admitted=first.outcome == "ok")
    if not finalists:
        raise SearchError(
            "some plan must pass admission", f"the default failed: {first.outcome}, {first.reason}",
            "run `sse-tune check` for the whole story",
        )
    best, timings, errors = _decide(evaluator, finalists, default)
    timing = timings[best.key]
    default_timing = timings.get(default.key)
    answer = Answer(
        bucket=problem.bucket.name,
        device=device.slug,
        arch=device.arch,
        driver=driver_version() if device.kind == "cuda" else None,
        toolchain=toolchain_of(best, toolchain()),
        sources=sources_of(best),
        problem=problem.to_dict(),
        plan=best,
        time_us=timing.median_us,
        default_time_us=None if default_timing is None else default_timing.median_us,
        timings_us=timing.times_us,
        errors=errors,
        created=now(),
        how={
            "study": recorder.study, "trials": sum(recorder.outcomes.values()), "budget_s": recorder.budget_s,
            "seed": _SEED, "backends": list(backends), "wall_s": round(recorder.elapsed_s, 1),
        },
    )  # fmt: skip
    recorder.report("done", 1, 1)
    return SearchReport(
        problem=problem,
        device=device,
        bucket=problem.bucket.name,
        study=recorder.study,
        default=default_timing,
        best=timing,
        plan=best,
        is_default=best == default,
        errors=errors,
        outcomes=dict(recorder.outcomes),
        trials=sum(recorder.outcomes.values()),
        wall_s=recorder.elapsed_s,
        stored=recorder.database.put_answer(answer),
        default_failure=None if first.outcome == "ok" else f"{first.outcome}: {first.reason}",
    )


def _finalists(evaluator: Evaluator, found: list[Plan], default: Plan, *, admitted: bool) -> list[Plan]:
    """The default, if admitted, and the fastest of the others."""
    timed: dict[str, tuple[float, Plan]] = {}
    for plan in found:
        known = evaluator.recorder.lookup("plan", None, plan)
        if known is not None and known.outcome == "ok" and plan != default:
            timed[plan.key] = (statistics.median(known.timings_us), plan)
    ranked = sorted(timed.values(), key=lambda pair: pair[0])[:_FINALISTS]
    # those that two runs could not tell from the best; others would only take its time
    fastest = [plan for time_us, plan in ranked if time_us <= _CLOSE * ranked[0][0]]
    return ([default] if admitted else []) + fastest


def _decide(
    evaluator: Evaluator, finalists: list[Plan], default: Plan
) -> tuple[Plan, dict[str, Timing], dict[str, float]]:
    """Measures the finalists in turn and takes the first, by time, that passes the longer admission.

    The default stays unless the noise cannot explain the difference.
    """
    recorder, worker = evaluator.recorder, evaluator.worker
    problem, device = evaluator.problem, evaluator.device
    recorder.report("finalists", 0, len(finalists))
    limit = min(15.0, max(1.0, 0.6 * recorder.remaining_s()))
    by_key = {plan.key: plan for plan in finalists}
    done = worker.run(jobs.time_in_turn, by_key, problem, device, limit, deadline_s=PLAN_DEADLINE_S)
    if done.outcome != "ok":
        raise SearchError("the finalists must run again", f"{done.outcome}: {done.reason}", "resume the search")
    timings = {key: Timing(times) for key, times in done.value.items()}
    base = timings.get(default.key)
    faster = [key for key, timing in timings.items() if base is None or timing.beats(base)]
    ranked = sorted(faster, key=lambda key: timings[key].median_us)
    if base is not None:
        ranked.append(default.key)
    failures: list[str] = []
    for number, key in enumerate(ranked):
        recorder.report("final admission", number, len(ranked))
        checked = worker.run(jobs.check, by_key[key], problem, device, FINAL, deadline_s=PLAN_DEADLINE_S)
        attempt = checked.value if checked.outcome == "ok" else Attempt(checked.outcome, checked.reason)
        if attempt.outcome == "ok":
            return by_key[key], timings, attempt.errors
        recorder.begin("plan", None, by_key[key])
        recorder.end(attempt)
        failures.append(f"{attempt.outcome}, {attempt.reason}")
    raise SearchError("some plan must pass the final admission", failures[0], "run `sse-tune check` to see all cases")


def _backends(backends: Sequence[str] | None, device: Device) -> tuple[str, ...]:
    if backends is None:
        return (default_backend(device),)
    unknown = [backend for backend in backends if backend not in BACKENDS]
    if unknown or not backends:
        known = ", ".join(BACKENDS)
        raise SearchError("the backends must be known", ", ".join(unknown) or "none", f"choose of {known}")
    staged = [backend for backend in backends if graph_of(backend) == "staged"]
    if device.kind == "cpu" and staged:
        raise SearchError(f"{', '.join(staged)} kernels need a GPU", device.name, "use --backends torch here")
    return tuple(dict.fromkeys(backends))


def _first_backend(backends: tuple[str, ...], device: Device) -> str:
    """What an untuned call would use if it is among those searched, else the first of them."""
    usual = default_backend(device)
    return usual if usual in backends else backends[0]


def _detect(worker: Worker, device: torch.device | str | None) -> Device:
    """Asked in the worker: this process never touches a GPU."""
    done = worker.run(Device.detect, None if device is None else str(device), deadline_s=120)
    if done.outcome != "ok":
        raise SearchError("the device must be there", str(done.reason), "run `sse-tune doctor`")
    return done.value
