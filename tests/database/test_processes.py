"""Several processes at once, and processes that are killed: nothing stored is lost, nothing is stored by halves."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import signal
import time

import pytest

from sse_tune.database.rows import put_answer
from sse_tune.database.schema import writing
from sse_tune.database.store import TuningDatabase

WRITERS, EACH = 4, 12


def _write_many(path, study_arguments, trial, answer, writer, start):
    start.wait()
    with TuningDatabase(path) as database:  # all four make the file at once, too
        study = database.open_study(*study_arguments)
        for i in range(EACH):
            database.add_trial(dataclasses.replace(trial, study=study, reason=f"{writer}/{i}"))
            database.put_answer(dataclasses.replace(answer, time_us=1000.0 - i + writer / 10))
            database.quarantine("sm_90", "triton 3.6.0", "triton:scan", {"block_v": i}, "abc", f"{writer}")


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def test_four_writers_all_succeed(request, kind, path, demo, cpu, make_trial, make_answer):
    path = path if kind == "sqlite" else request.getfixturevalue("postgres_url")
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    arguments = ("key", demo, cpu, {})
    writers = [
        context.Process(target=_write_many, args=(path, arguments, make_trial("any"), make_answer(), i, start))
        for i in range(WRITERS)
    ]
    for writer in writers:
        writer.start()
    start.set()
    for writer in writers:
        writer.join(timeout=120)
    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    with TuningDatabase(path) as database:
        trials = database.trials()
        assert [trial.number for trial in trials] == list(range(WRITERS * EACH))
        assert {trial.reason for trial in trials} == {f"{w}/{i}" for w in range(WRITERS) for i in range(EACH)}
        assert [answer.time_us for answer in database.answers()] == [1000.0 - (EACH - 1)]
        assert len(database.quarantined()) == EACH


@pytest.mark.postgres
def test_an_answer_is_compared_with_the_one_that_it_replaces(postgres_url, outdone):
    """A writer that began while another one was about to store what outdoes its answer."""
    first, later = outdone
    between = dataclasses.replace(first, time_us=90.0)
    with TuningDatabase(postgres_url) as database, concurrent.futures.ThreadPoolExecutor(1) as pool:
        database.put_answer(first)
        with writing(database._engine) as connection:
            assert put_answer(connection, later)
            other = pool.submit(database.put_answer, between)
            assert not concurrent.futures.wait([other], timeout=1.0).done
        assert not other.result(timeout=60)
        assert database.answers() == [later]


def _write_until_killed(path, trial, stored):
    with TuningDatabase(path) as database:
        while True:
            stored.send(database.add_trial(trial))


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.3])
def test_kill_in_mid_write(path, demo, cpu, make_trial, after_s):
    with TuningDatabase(path) as database:
        study = database.open_study("key", demo, cpu, {})
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    # a large record: a write takes long enough to be hit
    trial = make_trial(study, timings_us=tuple(float(i + 1) for i in range(20000)))
    writer = context.Process(target=_write_until_killed, args=(path, trial, send))
    writer.start()
    send.close()
    last = receive.recv()
    time.sleep(after_s)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    while True:
        try:
            last = receive.recv()
        except EOFError:
            break
    with TuningDatabase(path) as database:
        numbers = [found.number for found in database.trials(study)]
        # every trial that was reported is there; at most the one in flight was stored and not reported
        assert numbers == list(range(len(numbers)))
        assert last + 1 <= len(numbers) <= last + 2
        assert database.add_trial(trial) == len(numbers)


def _write_after_fork(database, trial):
    database.add_trial(trial)
    os._exit(0)


def test_object_crosses_a_fork(path, demo, cpu, make_trial):
    with TuningDatabase(path) as database:
        study = database.open_study("key", demo, cpu, {})
        database.add_trial(make_trial(study))
        child = multiprocessing.get_context("fork").Process(
            target=_write_after_fork, args=(database, make_trial(study))
        )
        child.start()
        child.join(timeout=60)
        assert child.exitcode == 0
        assert len(database.trials(study)) == 2
