"""Several workers side by side, one for each GPU: jobs go to those that are free, answers come as they end."""

from __future__ import annotations

import concurrent.futures
import queue
from collections.abc import Sequence
from typing import Any

from sse_tune.tuning.busy import Stopwatch
from sse_tune.tuning.evaluate import Job
from sse_tune.tuning.worker import JobResult, Worker


class Lanes:
    """Runs one job in each worker at a time.

    Args:
        workers: one for each device; closed by whoever made them.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = list(workers)
        self._free = list(workers)
        self.stopwatch = Stopwatch(len(self._workers))
        self._threads = concurrent.futures.ThreadPoolExecutor(len(self._workers), thread_name_prefix="lane")
        self._running: dict[concurrent.futures.Future[JobResult], tuple[Worker, Any]] = {}
        # not `concurrent.futures.wait`: Ctrl-C there can leave locks behind that the threads need
        self._ended: queue.SimpleQueue[concurrent.futures.Future[JobResult]] = queue.SimpleQueue()

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def submit(self, job: Job, tag: Any) -> None:
        """Runs a job in a free worker; `wait` gives its answer with `tag`."""
        worker = self._free.pop(0)
        future = self._threads.submit(self._run, worker, job)
        self._running[future] = (worker, tag)
        future.add_done_callback(self._ended.put)

    def wait(self, timeout_s: float | None) -> list[tuple[Any, JobResult]]:
        """The answers there are once there is one, or none when the time is up.

        Raises:
            WorkerError: a worker process cannot be started.
        """
        try:
            done = [self._ended.get(timeout=timeout_s)]
        except queue.Empty:
            return []
        while not self._ended.empty():
            done.append(self._ended.get())
        answers = []
        for future in done:
            worker, tag = self._running.pop(future)
            self._free.append(worker)
            answers.append((tag, future.result()))
        return answers

    def run(self, job: Job) -> JobResult:
        """One job alone, in the first worker."""
        assert not self._running, "jobs that are timed against each other must not share the device"
        return self._run(self._workers[0], job)

    def run_in_each(self, job: Job) -> list[JobResult]:
        """The same job in every worker, side by side."""
        for number in range(len(self._workers)):
            self.submit(job, number)
        answers: dict[int, JobResult] = {}
        while self.busy:
            answers |= dict(self.wait(None))
        return [answers[number] for number in range(len(self._workers))]

    def _run(self, worker: Worker, job: Job) -> JobResult:
        result = worker.run(job.function, *job.arguments, deadline_s=job.deadline_s)
        self.stopwatch.ran(result.wall_s)
        return result

    def close(self) -> None:
        """Ends the workers, and so the jobs that they run."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
