"""Each candidate is claimed by one process, a dead one's claims are taken up, on SQLite and on PostgreSQL alike."""

import multiprocessing
import os
import signal
import time

import pytest
import sqlalchemy as sa

from sse_tune.database.claims import DONE, MINE, THEIRS, Claim
from sse_tune.database.schema import metadata
from sse_tune.database.store import TuningDatabase


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def where(request, path):
    return path if request.param == "sqlite" else request.getfixturevalue("postgres_url")


@pytest.fixture
def database(where):
    with TuningDatabase(where) as database:
        yield database


@pytest.fixture
def study(database, demo, cpu):
    return database.open_study("key", demo, cpu, {})


def claim_of(study, name, make_trial):
    return Claim(study, name, make_trial(study).plan, None)


def test_one_owner_at_a_time(database, study, make_trial):
    wanted = claim_of(study, "one", make_trial)
    assert database.claim(wanted, "a", 60, 0) == MINE
    assert database.claim(wanted, "a", 60, 0) == MINE
    assert database.claim(wanted, "b", 60, 0) == THEIRS
    assert database.finish_claim(make_trial(study), "one", "b") is None
    assert database.finish_claim(make_trial(study), "one", "a") == 0
    assert database.claim(wanted, "b", 60, 0) == DONE
    assert database.claim(wanted, "b", 60, since=1) == MINE, "a search that starts anew does not take old results"


def test_lapsed_claims_are_taken_up_once(database, study, make_trial):
    for name in ("one", "two"):
        assert database.claim(claim_of(study, name, make_trial), "dead", 2.0, 0) == MINE
    assert database.claim(claim_of(study, "three", make_trial), "alive", 60, 0) == MINE
    assert database.take_lapsed(study, "a", 60, lambda claim: True) is None
    time.sleep(2.1)
    assert database.take_lapsed(study, "a", 60, lambda claim: claim.candidate == "two").candidate == "two"
    taken = database.take_lapsed(study, "b", 60, lambda claim: True)
    assert (taken.candidate, taken.plan) == ("one", make_trial(study).plan)
    assert database.take_lapsed(study, "c", 60, lambda claim: True) is None
    assert database.finish_claim(make_trial(study), "one", "dead") is None, "its lease ran out"
    assert database.finish_claim(make_trial(study), "one", "b") == 0


def test_renewed_leases_hold_and_released_ones_do_not(database, study, make_trial):
    wanted = claim_of(study, "one", make_trial)
    database.claim(wanted, "a", 1.0, 0)
    database.renew_claims("a", 60)
    time.sleep(1.1)
    assert database.claim(wanted, "b", 60, 0) == THEIRS
    database.release_claims("a")
    assert database.claim(wanted, "b", 60, 0) == MINE


def _claim_all(where, study, names, trial, start, owner):
    import dataclasses

    start.wait()
    with TuningDatabase(where) as database:
        for name in names:
            if database.claim(Claim(study, name, trial.plan, None), owner, 60, 0) == MINE:
                database.finish_claim(dataclasses.replace(trial, reason=f"{owner} {name}"), name, owner)


def test_processes_share_the_candidates(where, database, study, make_trial):
    context = multiprocessing.get_context("spawn")
    start, names = context.Event(), [f"{i}" for i in range(12)]
    trial = make_trial(study)
    workers = [
        context.Process(target=_claim_all, args=(where, study, names, trial, start, owner)) for owner in "abc"
    ]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(timeout=120)
    assert [worker.exitcode for worker in workers] == [0] * 3
    trials = database.trials(study)
    assert [trial.number for trial in trials] == list(range(len(names)))
    assert sorted(trial.reason.split()[1] for trial in trials) == sorted(names), "each exactly once"


def _claim_and_hang(where, wanted, claimed):
    with TuningDatabase(where) as database:
        database.claim(wanted, "doomed", 1.0, 0)
        claimed.set()
        time.sleep(600)


def test_claim_of_a_killed_process_is_taken_up(where, database, study, make_trial):
    context = multiprocessing.get_context("spawn")
    claimed, wanted = context.Event(), claim_of(study, "one", make_trial)
    doomed = context.Process(target=_claim_and_hang, args=(where, wanted, claimed))
    doomed.start()
    assert claimed.wait(60)
    assert database.claim(wanted, "heir", 60, 0) == THEIRS
    os.kill(doomed.pid, signal.SIGKILL)
    doomed.join()
    deadline = time.monotonic() + 30
    while database.claim(wanted, "heir", 60, 0) == THEIRS:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert database.finish_claim(make_trial(study), "one", "heir") == 0


def test_database_of_the_version_before_gets_the_table(where, database, study, make_trial):
    with database._engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE sse_claims"))
        connection.execute(sa.text("UPDATE sse_schema SET version = 1"))
    database.add_trial(make_trial(study))
    with TuningDatabase(where) as opened:
        assert len(opened.trials(study)) == 1
        assert opened.claim(claim_of(study, "one", make_trial), "a", 60, 0) == MINE
        assert set(sa.inspect(opened._engine).get_table_names()) == set(metadata.tables)
