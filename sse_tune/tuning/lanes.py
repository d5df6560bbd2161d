"""Several workers side by side, one for each GPU: jobs go to those that are free, answers come as they end."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence
from typing import Any

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
        self._threads = concurrent.futures.ThreadPoolExecutor(len(self._workers), thread_name_prefix="lane")
        self._running: dict[concurrent.futures.Future[JobResult], tuple[Worker, Any]] = {}

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
        future = self._threads.submit(worker.run, job.function, *job.arguments, deadline_s=job.deadline_s)
        self._running[future] = (worker, tag)

    def wait(self, timeout_s: float | None) -> list[tuple[Any, JobResult]]:
        """The answers there are once there is one, or none when the time is up.

        Raises:
            WorkerError: a worker process cannot be started.
        """
        done, _ = concurrent.futures.wait(
            self._running, timeout_s, return_when=concurrent.futures.FIRST_COMPLETED
        )
        answers = []
        for future in done:
            worker, tag = self._running.pop(future)
            self._free.append(worker)
            answers.append((tag, future.result()))
        return answers

    def run(self, job: Job) -> JobResult:
        """One job alone, in the first worker."""
        assert not self._running, "jobs that are timed against each other must not share the device"
        return self._workers[0].run(job.function, *job.arguments, deadline_s=job.deadline_s)

    def run_in_each(self, job: Job) -> list[JobResult]:
        """The same job in every worker, side by side."""
        for number in range(len(self._workers)):
            self.submit(job, number)
        answers: dict[int, JobResult] = {}
        while self.busy:
            answers |= dict(self.wait(None))
        return [answers[number] for number in range(len(self._workers))]

    def close(self) -> None:
        """Ends the workers, and so the jobs that they run."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
