"""Compilation ahead of the GPU: candidates built on all cores, and what each will ask of the GPU."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import heapq
import itertools
import threading
from collections.abc import Callable, Iterable

from sse_tune.compile import compile_stage, limits_reason
from sse_tune.device import Device, usable_cores
from sse_tune.errors import ConstraintError, PlanError
from sse_tune.plan import Plan, StageChoice
from sse_tune.problem import Problem
from sse_tune.space import Config
from sse_tune.templates.registry import find_template, is_compiled, validate_plan
from sse_tune.tuning.cases import CASES, case_problem
from sse_tune.tuning.worker import JobResult, Worker

DEADLINE_S = 120.0


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a candidate: resources by name, and why it cannot run (None: it can)."""

    outcome: str
    reason: str | None
    resources: dict[str, int]


def compile_choice(
    choice: StageChoice, problem: Problem, outer: Config, device: Device, with_states: bool
) -> Compiled:
    """Runs in a worker: leaves the binary in the compiler's cache, where the process that measures finds it."""
    template = find_template(choice.backend, choice.template)
    artifact = compile_stage(template, problem, outer, choice.config, device.arch, with_states=with_states)
    resources = {
        "registers": artifact.registers, "spill_bytes": artifact.spill_bytes, "smem_bytes": artifact.smem_bytes
    }  # fmt: skip
    reason = limits_reason(artifact, device)
    return Compiled("ok" if reason is None else "rejected", reason, resources)


class CompileAhead:
    """A pool of compiling processes; `submit` returns at once. What is urgent comes first, then what came first.

    Args:
        device: the GPU to compile for.
        size: how many processes; None: the cores but two, which feed the GPU.
    """

    def __init__(self, device: Device, size: int | None = None) -> None:
        self.device = device
        self.size = size or max(1, usable_cores() - 2)
        self._threads = concurrent.futures.ThreadPoolExecutor(self.size, thread_name_prefix="compile-ahead")
        self._local = threading.local()
        self._workers: list[Worker] = []
        self._closed = False
        self._cache: dict[tuple, concurrent.futures.Future[Compiled]] = {}
        self._left: list[tuple[bool, int, concurrent.futures.Future[Compiled], tuple]] = []  # a heap
        self._lock = threading.Lock()  # of the heap
        self._numbers = itertools.count()

    def __enter__(self) -> CompileAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self, choice: StageChoice, problem: Problem, outer: Config, *, with_states: bool = False, urgent: bool = False
    ) -> concurrent.futures.Future[Compiled]:
        """Compiles a stage for a problem; the same request is answered from memory, and becomes urgent if it is now."""
        key = (choice, problem, outer, with_states)
        known = self._cache.get(key)
        future = self._cache.setdefault(key, concurrent.futures.Future())
        if known is None or (urgent and not known.running() and not known.done()):
            with self._lock:
                heapq.heappush(self._left, (not urgent, next(self._numbers), future, key))
            self._threads.submit(self._compile_next)
        return future

    def submit_plan(
        self, plan: Plan, problem: Problem, chunk_size: int, cases: tuple[str, ...], *, urgent: bool = False
    ) -> list[concurrent.futures.Future[Compiled]]:
        """Compiles a plan for a problem and for the sizes of some cases."""
        wanted = {(problem, False)}
        wanted |= {(case_problem(name, problem, chunk_size, "full")[0], CASES[name].states) for name in cases}
        return [
            self.submit(choice, posed, plan.outer, with_states=with_states, urgent=urgent)
            for posed, with_states in wanted
            for choice in plan.stages.values()
            if is_compiled(choice.backend)
        ]

    def submit_cases(
        self, plan_for: Callable[[Problem], Plan], problem: Problem, chunk_size: int, cases: tuple[str, ...], scale: str
    ) -> list[concurrent.futures.Future[Compiled]]:
        """Compiles what `check_plan` will run: for the sizes of each case the plan that stands for it there.

        Cases that have no plan, or whose plan the constraints refuse, do not apply and are left out.
        """
        submitted = []
        for name in cases:
            posed, _ = case_problem(name, problem, chunk_size, scale)
            try:
                plan = plan_for(posed)
                validate_plan(plan, posed, self.device)
            except (ConstraintError, PlanError):
                continue
            submitted += [
                self.submit(choice, posed, plan.outer, with_states=CASES[name].states)
                for choice in plan.stages.values()
                if is_compiled(choice.backend)
            ]
        return submitted

    def withdraw(self, futures: Iterable[concurrent.futures.Future[Compiled]]) -> None:
        """Takes back what no process has begun, so that what is asked for next need not wait for it."""
        gone = {future for future in futures if future.cancel()}
        self._cache = {key: future for key, future in self._cache.items() if future not in gone}

    def close(self) -> None:
        """Ends all processes; what was not compiled stays so."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for _, _, future, _ in self._left:
                future.cancel()
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True)

    def _compile_next(self) -> None:
        """Takes what comes first; called as often as something was put there, which may have been put there twice."""
        with self._lock:
            _, _, future, key = heapq.heappop(self._left)
            if future.running() or future.done() or not future.set_running_or_notify_cancel():
                return
        try:
            future.set_result(self._compile(*key))
        except BaseException as error:
            future.set_exception(error)

    def _compile(self, choice: StageChoice, problem: Problem, outer: Config, with_states: bool) -> Compiled:
        worker = getattr(self._local, "worker", None)
        if worker is None:
            worker = self._local.worker = Worker(threads=1)
            self._workers.append(worker)
        if self._closed:
            return Compiled("interrupted", "the search ended", {})
        arguments = (choice, problem, outer, self.device, with_states)
        done: JobResult = worker.run(compile_choice, *arguments, deadline_s=DEADLINE_S)
        if done.outcome == "ok":
            return done.value
        outcome = done.outcome if done.outcome in ("compile_error", "out_of_memory", "timeout") else "compile_error"
        return Compiled(outcome, done.reason, {})
