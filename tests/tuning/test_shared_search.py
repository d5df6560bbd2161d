"""Several processes at one study: each candidate tried once, the dead ones' taken up; what kill -9 loses."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import sqlalchemy as sa

from sse_tune.database.store import TuningDatabase
from sse_tune.plan import Plan
from sse_tune.tuning.candidates import Candidate
from sse_tune.tuning.jobs import Attempt
from sse_tune.tuning.recorder import Recorder
from sse_tune.tuning.search import search

_PROGRAM = """
import sys
from sse_tune.problem import Problem
from sse_tune.tuning import finals
from sse_tune.tuning.search import search
problem = Problem(rule="gdn", seq_len=64, num_heads=2, head_dim=16, norm="after", dtype="fp32")
finals._COMPARISON_S = (0.5, 1.0)  # who wins is not the question here
def tell(phase, done, total, best): print(phase, done, flush=True)
report = search(problem, 50, database=sys.argv[1], resume=True, device="cpu", progress=tell, sampler=sys.argv[2])
print("done", report.study, flush=True)
"""


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def where(request, tmp_path):
    return str(tmp_path / "tuning.db") if request.param == "sqlite" else request.getfixturevalue("postgres_url")


def start(where, sampler="auto"):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, where, sampler], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip


def plans_of(database):
    return [Plan.from_dict(trial.plan) for trial in database.trials() if trial.kind == "plan" and trial.outcome == "ok"]


def test_two_processes_share_one_study(where):
    processes = [start(where, "tpe") for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    with TuningDatabase(where) as database:
        trials = database.trials()
        assert [trial.number for trial in trials] == list(range(len(trials)))
        plans = plans_of(database)
        assert len(plans) == len(set(plans)) == 16, "every config, and each once"
        assert len(database.studies()) == len(database.answers()) == 1
        tables = set(sa.inspect(database._engine).get_table_names())
        assert ("trials" in tables) == (database.server_url is not None), "Optuna's tables, beside ours"


def test_kill_9_loses_the_trial_in_flight_alone(where):
    process = start(where)
    while not re.fullmatch(r"plans 5\n", process.stdout.readline()):
        assert process.poll() is None, process.stderr.read()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with TuningDatabase(where) as database:
        kept = plans_of(database)
        assert len(kept) >= 5
    resumed = start(where)
    _, errors = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, errors
    with TuningDatabase(where) as database:
        plans = plans_of(database)
        assert plans[: len(kept)] == kept
        assert len(plans) == len(set(plans)) == 16


def recorder_of(database, small, cpu, **options):
    study = database.open_study("key", small, cpu, {})
    return Recorder(database, study, small, resume=True, budget_s=100, **options)


def test_claims_are_left_to_the_living_and_taken_from_the_dead(where, small, cpu):
    from sse_tune.templates.registry import default_plan

    candidate = Candidate("plan", default_plan(small, cpu))
    with TuningDatabase(where) as database:
        one, two = (recorder_of(database, small, cpu, lease_s=1.5) for _ in range(2))
        assert one.claim(candidate)
        time.sleep(2.5)
        assert not two.claim(candidate), "its heart beats"
        one._ended.set()  # as if it were killed: no beat, nothing given back
        one._heart.join()
        deadline = time.monotonic() + 30
        while (lapsed := two.take_lapsed(lambda plan, stage: True)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert lapsed == (candidate.plan, None)
        assert two.claim(candidate)
        two.end(candidate, Attempt("ok", None, (1.0, 2.0, 3.0)))
        one.end(candidate, Attempt("ok", None, (9.0,)))
        assert [trial.time_us for trial in database.trials()] == [2.0], "what came too late is not stored"
        assert one.lookup(candidate).time_us == 2.0
        two.close()


def test_a_search_that_starts_anew_does_not_take_old_results(where, small, cpu):
    from sse_tune.templates.registry import default_plan

    candidate = Candidate("plan", default_plan(small, cpu))
    with TuningDatabase(where) as database:
        first = recorder_of(database, small, cpu)
        assert first.claim(candidate)
        first.end(candidate, Attempt("ok", None, (1.0,)))
        first.close()
        anew = Recorder(database, first.study, small, resume=False, budget_s=100)
        assert anew.lookup(candidate) is None
        assert anew.claim(candidate)
        anew.close()
        resumed = Recorder(database, first.study, small, resume=True, budget_s=100)
        assert resumed.lookup(candidate).time_us == 1.0
        resumed.close()


def test_two_workers_side_by_side(small, tmp_path):
    with TuningDatabase(tmp_path / "tuning.db") as database:
        report = search(small, 60, database=database, device=("cpu", "cpu"), trials=6)
        plans = plans_of(database)
        assert len(plans) == len(set(plans))
        assert 6 <= len(plans) <= 7
        assert report.outcomes["ok"] == len(plans)


def test_claims_given_back_at_the_end(small, tmp_path):
    path = pathlib.Path(tmp_path / "tuning.db")
    search(small, 20, database=path, device="cpu", trials=2)
    with TuningDatabase(path) as database, database._engine.connect() as connection:
        open_claims = connection.execute(sa.text("SELECT count(*) FROM sse_claims WHERE trial IS NULL")).scalar_one()
    assert open_claims == 0
