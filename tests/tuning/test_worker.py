"""A bad candidate costs one job: whatever it does to its process, the next job runs and the reason is kept."""

import concurrent.futures
import os
import time

import pytest

from sse_tune.errors import WorkerError
from sse_tune.tuning.worker import Worker


@pytest.fixture
def worker(planted):
    with Worker(memory_limit_bytes=4 * 2**30, threads=1) as worker:
        yield worker


def test_worker_is_reused_while_healthy(worker, planted):
    first = worker.run(planted.pid, deadline_s=60)
    assert first.outcome == "ok"
    assert first.value not in (None, os.getpid())
    assert worker.run(planted.raises, deadline_s=60).outcome == "crash"
    assert worker.run(planted.pid, deadline_s=60).value == first.value
    assert worker.starts == 1


@pytest.mark.parametrize(
    ("job", "deadline_s", "outcome", "reason"),
    [
        ("hangs", 0.5, "timeout", "no answer within"),
        ("exits", 60, "crash", "exit code 7"),
        ("segfaults", 60, "crash", "SIGSEGV"),
        ("greedy", 60, "out_of_memory", "memory"),
        ("raises", 60, "crash", "ValueError: planted"),
        ("device_error", 60, "crash", "illegal memory access"),
    ],
)
def test_bad_candidate_costs_one_job(worker, planted, job, deadline_s, outcome, reason):
    worker.run(planted.fine, 0, deadline_s=60)  # its start does not count
    result = worker.run(getattr(planted, job), deadline_s=deadline_s)
    assert result.outcome == outcome, result
    assert reason in result.reason
    assert result.value is None
    assert worker.run(planted.fine, 1, deadline_s=60).value == 2


def test_device_error_replaces_the_worker(worker, planted):
    before = worker.run(planted.pid, deadline_s=60).value
    worker.run(planted.device_error, deadline_s=60)
    assert worker.run(planted.pid, deadline_s=60).value != before


def test_close_ends_the_child(planted):
    worker = Worker(threads=1)
    child = worker.run(planted.pid, deadline_s=60).value
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_close_ends_the_job_of_another_thread(planted):
    worker = Worker(threads=1)
    worker.run(planted.fine, 0, deadline_s=60)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        running = threads.submit(worker.run, planted.hangs, deadline_s=60)
        time.sleep(0.2)
        begin = time.monotonic()
        worker.close()
        with pytest.raises(WorkerError, match="closed"):
            running.result()
    assert time.monotonic() - begin < 5


def test_a_closed_worker_starts_nothing(planted):
    worker = Worker(threads=1)
    worker.close()
    with pytest.raises(WorkerError, match="closed"):
        worker.run(planted.fine, 0, deadline_s=60)
    assert worker.pid is None
