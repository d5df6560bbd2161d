"""`check` in several processes: a share of the cases in each worker, side by side on one device.

Compiling is what takes the time of a check, so a share is the cases of one plan and of equal sizes: what one of them
compiles serves the others. Results are told in the order of the cases, whichever worker ends first. A worker that is
lost is replaced; the cases it had not answered for run again, each alone, so that one is to blame.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence

import torch

from sse_tune.device import Device
from sse_tune.plan import Plan, StageChoice
from sse_tune.problem import Problem
from sse_tune.templates.registry import default_plan
from sse_tune.tuning.cases import CASES, case_problem, scale_of
from sse_tune.tuning.check import CAPTURE, CaseResult, Report, check_plan, chunk_size_of, names_of
from sse_tune.tuning.evaluate import Job
from sse_tune.tuning.lanes import Lanes
from sse_tune.tuning.worker import JobResult

CASE_DEADLINE_S = 600.0  # of one case, its compilation included


@dataclasses.dataclass(frozen=True)
class Task:
    """A plan to check.

    Args:
        plan, problem: see `check_plan`.
        default_of: the backend whose default for each case's sizes the plan stands for; None: it stands for itself.
        choices: stages in which these take the place of the default's.
    """

    plan: Plan
    problem: Problem
    default_of: str | None
    choices: tuple[tuple[str, StageChoice], ...] = ()

    def plan_for(self, device: Device) -> Callable[[Problem], Plan] | None:
        """See `check_plan`."""
        backend = self.default_of
        if backend is None:
            return None

        def plan(posed: Problem) -> Plan:
            default = default_plan(posed, device, backend)
            return dataclasses.replace(default, stages={**default.stages, **dict(self.choices)})

        return plan


@dataclasses.dataclass(frozen=True)
class Share:
    """Cases of one task that one worker runs, by the number of the task."""

    task: int
    names: tuple[str, ...]

    @property
    def is_big(self) -> bool:
        """Whether it may need most of a GPU's memory: then no other such share runs beside it."""
        return any(name in CASES and CASES[name].needs == "big" for name in self.names)


def check_share(task: Task, device: Device, quick: bool, names: tuple[str, ...]) -> Report:
    """Runs in a worker: some cases of a task; it ends before the last one only when the device failed."""
    report = check_plan(
        task.plan, task.problem, device, quick, names=names, stop_early=False, plan_for=task.plan_for(device)
    )
    if device.kind == "cuda" and not report.poisoned:
        torch.cuda.empty_cache()  # the memory is shared with the other workers
    return report


def check_in_shares(
    tasks: Sequence[Task],
    device: Device,
    lanes: Lanes,
    quick: bool = False,
    *,
    names: tuple[str, ...] | None = None,
    on_case: Callable[[int, CaseResult], None],
    job: Callable[..., Report] = check_share,
) -> list[Report]:
    """Checks plans in several workers.

    Args:
        tasks: what to check.
        device: what the workers run on.
        lanes: the workers.
        quick, names: see `check_plan`.
        on_case: called with the number of a task and each of its results, in the order of tasks and cases.
        job: what a worker runs for a share.

    Returns:
        A report of each task.

    Raises:
        WorkerError: a worker process cannot be started.
    """
    order = [
        (number, name)
        for number, task in enumerate(tasks)
        for name in (names or names_of(task.plan, task.problem, device, quick=quick))
    ]
    waiting = collections.deque(_shares(tasks, order, scale_of(device)))
    running: list[Share] = []
    found: dict[tuple[int, str], CaseResult] = {}
    told = 0
    while waiting or running:
        while lanes.free and (share := _next(waiting, running)) is not None:
            running.append(share)
            arguments = (tasks[share.task], device, quick, share.names)
            lanes.submit(Job(job, arguments, CASE_DEADLINE_S * len(share.names)), share)
        for share, answer in lanes.wait(None):
            running.remove(share)
            results, rest = _read(share, answer)
            found |= {(share.task, result.name): result for result in results}
            waiting.extendleft(reversed(rest))
        while told < len(order) and order[told] in found:
            on_case(order[told][0], found[order[told]])
            told += 1
    return [Report(tuple(found[key] for key in order if key[0] == number)) for number in range(len(tasks))]


def _shares(tasks: Sequence[Task], order: Sequence[tuple[int, str]], scale: str) -> list[Share]:
    """The cases of a task by their sizes, in the order of the first of each."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for number, name in order:
        task = tasks[number]
        # a replay has the sizes of the case that it replays, and compiles what that does
        sized = "gates" if name == CAPTURE else name
        posed, lengths = case_problem(sized, task.problem, chunk_size_of(task.plan), scale)
        groups.setdefault((number, posed, lengths, CASES[sized].states), []).append(name)
    return [Share(int(str(key[0])), tuple(names)) for key, names in groups.items()]


def _next(waiting: collections.deque[Share], running: Sequence[Share]) -> Share | None:
    """Takes the first share that may start now."""
    is_full = any(share.is_big for share in running)
    share = next((share for share in waiting if not (is_full and share.is_big)), None)
    if share is not None:
        waiting.remove(share)
    return share


def _read(share: Share, answer: JobResult) -> tuple[Sequence[CaseResult], list[Share]]:
    """What a worker found, and what is to run again because it did not get there."""
    if answer.outcome == "ok":
        results: tuple[CaseResult, ...] = answer.value.cases
        rest = share.names[len(results) :]
        return results, [Share(share.task, rest)] if rest else []
    if len(share.names) == 1:
        return [CaseResult(share.names[0], answer.outcome, answer.reason, {})], []
    return [], [Share(share.task, (name,)) for name in share.names]
