"""The contract of the store: what is put in comes out, the faster answer stays, nothing is overwritten by accident."""

import dataclasses
import json
import math
import pathlib

import pytest
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from sse_tune.database.records import Answer, Trial
from sse_tune.database.schema import metadata
from sse_tune.database.store import TuningDatabase, default_path
from sse_tune.errors import DatabaseError


@pytest.fixture(params=["path", "text", "url"])
def database(request, path):
    where = {"path": path, "text": str(path), "url": f"sqlite:///{path}"}[request.param]
    with TuningDatabase(where) as opened:
        yield opened


def test_trials_come_back_as_they_went_in(database, demo, cpu, make_trial):
    study = database.open_study("key", demo, cpu, {"budget_s": 60})
    ok = make_trial(study, number=5)
    failed = make_trial(study, outcome="crash", time_us=None, timings_us=(), reason="illegal access")
    stage = make_trial(study, kind="stage", stage="whole")
    assert [database.add_trial(trial) for trial in (ok, failed, stage)] == [5, 6, 7]
    assert database.trials(study) == [
        ok, dataclasses.replace(failed, number=6), dataclasses.replace(stage, number=7)
    ]  # fmt: skip
    assert database.trials("another") == []
    assert database.trials() == database.trials(study)


def test_study_is_opened_once(database, demo, cpu):
    assert database.study("key") is None
    first = database.open_study("key", demo, cpu, {"budget_s": 60})
    assert database.open_study("key", demo, cpu, {"budget_s": 99}) == first
    assert database.study("key").note == {"budget_s": 60}
    assert database.study("key").problem == demo.to_dict()
    assert [study.id for study in database.studies()] == [first]


def test_trial_needs_its_study_and_a_new_number(database, demo, cpu, make_trial):
    with pytest.raises(DatabaseError, match="study must be open"):
        database.add_trial(make_trial("nowhere"))
    study = database.open_study("key", demo, cpu, {})
    database.add_trial(make_trial(study, number=3))
    with pytest.raises(DatabaseError, match="number must be new"):
        database.add_trial(make_trial(study, number=3, outcome="timeout"))
    assert [trial.outcome for trial in database.trials(study)] == ["ok"]


def test_faster_answer_stays(database, make_answer):
    first, slower, faster = make_answer(100.0), make_answer(120.0), make_answer(90.0)
    assert database.put_answer(first)
    assert not database.put_answer(slower)
    assert not database.put_answer(first)
    assert database.answers() == [first]
    assert database.put_answer(faster)
    assert database.answers() == [faster]


def test_what_a_comparison_in_turn_decided_holds_though_the_record_is_slower(database, outdone):
    first, later = outdone
    assert database.put_answer(first)
    assert database.put_answer(later)
    assert database.answers() == [later]
    assert not database.put_answer(first)
    assert database.answers() == [later]


def test_the_same_plan_measured_again_beside_others_takes_its_place(database, outdone):
    _, before = outdone
    again = dataclasses.replace(before, time_us=120.0, created="2026-01-03T00:00:00+00:00")
    assert database.put_answer(before)
    assert database.put_answer(again)
    assert not database.put_answer(before)
    assert database.answers() == [again]


def test_at_most_one_answer_outdoes_the_other(outdone):
    first, later = outdone
    assert later.outdoes(first)
    assert not first.outdoes(later)
    naming = dataclasses.replace(first, how={"beside": [later.plan.key]})
    assert not naming.outdoes(later), "it is older"
    assert later.outdoes(naming)
    assert not later.outdoes(dataclasses.replace(first, created=later.created))
    assert not later.outdoes(later)


@pytest.mark.parametrize("beside", [None, "KEY", ["KEY", 1], {"KEY": 1}, [["KEY"]], [], ["another"]], ids=str)
def test_an_answer_that_does_not_name_the_other_does_not_outdo_it(outdone, beside):
    first, later = outdone
    how = json.loads(json.dumps({"beside": beside}).replace("KEY", first.plan.key))
    assert not dataclasses.replace(later, how=how).outdoes(first)
    assert not dataclasses.replace(later, how={}).outdoes(first)


@pytest.mark.parametrize("changes", [{"bucket": "another"}, {"device": "another"}], ids=str)
def test_answers_of_another_bucket_or_device_are_not_outdone(outdone, changes):
    first, later = outdone
    assert not later.outdoes(dataclasses.replace(first, **changes))


@pytest.mark.parametrize("time_us", [101.0, 100.0], ids=["outdone", "outdone by a tie"])
@pytest.mark.parametrize("decided", [True, False])
def test_merges_in_either_order_end_with_the_same_answer(tmp_path, outdone, time_us, decided):
    first, later = outdone
    later = dataclasses.replace(later, time_us=time_us, how=later.how if decided else {})
    kept = []
    for number, answers in enumerate(((first, later), (later, first))):
        paths = (tmp_path / f"{name}{number}.db" for name in ("here", "there"))
        with TuningDatabase(next(paths)) as here, TuningDatabase(next(paths)) as there:
            here.put_answer(answers[0])
            there.put_answer(answers[1])
            here.merge(there)
            kept += here.answers()
            assert here.merge(there) == 0
    assert kept == [later if decided else first] * 2


@pytest.mark.parametrize(
    "changes", [{"toolchain": {"torch": "1.0"}}, {"sources": {"torch:whole": "0"}}, {"bucket": "another"}], ids=str
)
def test_answers_under_other_keys_stay_apart(database, make_answer, changes):
    assert database.put_answer(make_answer(100.0))
    assert database.put_answer(make_answer(500.0, **changes))
    assert len(database.answers()) == 2


def test_answers_by_device_and_bucket(database, make_answer, h200, training):
    here, there = make_answer(), make_answer(5.0, h200, training)
    database.put_answer(here)
    database.put_answer(there)
    assert database.answers(device=h200.slug) == [there]
    assert database.answers(bucket=here.bucket) == [here]
    assert database.answers(device=h200.slug, bucket=here.bucket) == []


def test_quarantine_keeps_the_first_reason_and_its_key(database):
    key = ("sm_90", "triton 3.6.0", "triton:scan", {"block_v": 64, "num_warps": 4}, "abc")
    assert database.is_quarantined(*key) is None
    database.quarantine(*key, "races")
    database.quarantine(*key, "another reason")
    reordered = ("sm_90", "triton 3.6.0", "triton:scan", {"num_warps": 4, "block_v": 64}, "abc")
    assert database.is_quarantined(*reordered) == "races"
    for position, other in enumerate(("sm_80", "triton 3.7.0", "triton:output", {"block_v": 32}, "abd")):
        assert database.is_quarantined(*key[:position], other, *key[position + 1 :]) is None


def test_merge_takes_what_is_new_and_keeps_the_faster(filled, tmp_path, make_answer, make_trial, demo, cpu):
    with TuningDatabase(tmp_path / "other.db") as other:
        study = other.open_study("key one", demo, cpu, {})
        other.add_trial(make_trial(study, outcome="timeout", time_us=None))  # number 0, as another trial of `filled`
        other.put_answer(make_answer(50.0))
        assert other.merge(filled) == 6  # one study, three trials, one answer, one quarantined config
        assert [trial.outcome for trial in other.trials(study)] == ["timeout", "ok", "wrong"]
        assert other.answers(device=cpu.slug)[0].time_us == 50.0
        before = [trial.to_dict() for trial in other.trials()], other.answers()
        assert other.merge(filled.name) == 0
        assert ([trial.to_dict() for trial in other.trials()], other.answers()) == before


def test_merge_with_what_is_not_there(filled, tmp_path):
    with pytest.raises(DatabaseError, match="must be there"):
        filled.merge(tmp_path / "missing.db")
    assert not (tmp_path / "missing.db").exists()


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"time_us": float("nan")}, "time_us"),
        ({"time_us": -1.0}, "time_us"),
        ({"time_us": 0}, "time_us"),
        ({"time_us": True}, "time_us"),
        ({"default_time_us": "1"}, "time_us"),
        ({"timings_us": (1.0, float("inf"))}, "timings_us"),
        ({"created": "yesterday"}, "created"),
        ({"created": "2026-01-01T00:00:00"}, "created"),
        ({"how": {"a": {1, 2}}}, "how"),
        ({"how": {"a": float("nan")}}, "how"),
        ({"errors": {"o": float("nan")}}, "finite"),
        ({"plan": {"graph": "whole"}}, "plan"),
        ({"bucket": ""}, "bucket"),
    ],
    ids=str,
)
def test_malformed_answer_is_never_made(make_answer, changes, rule):
    with pytest.raises(DatabaseError, match=rule):
        make_answer(**changes)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"outcome": "fine"}, "outcome"),
        ({"kind": "thing"}, "kind"),
        ({"kind": "stage"}, "names a stage"),
        ({"stage": "whole"}, "names a stage"),
        ({"kind": "stage", "stage": "scan"}, "names a stage"),
        ({"time_us": None}, "has a time"),
        ({"number": -2}, "number"),
        ({"plan": {}}, "exactly the fields"),
    ],
    ids=str,
)
def test_malformed_trial_is_never_made(make_trial, changes, rule):
    with pytest.raises(DatabaseError, match=rule):
        make_trial("study", **changes)


def test_reason_of_any_text_is_kept(database, demo, cpu, make_trial):
    study = database.open_study("key", demo, cpu, {})
    database.add_trial(make_trial(study, outcome="crash", reason="ptxas: \0 bad byte \udcff"))
    assert database.trials()[0].reason == "ptxas: \ufffd bad byte ?"


def test_records_are_plain_data_and_back(make_answer, make_trial):
    for record in (make_answer(), make_trial("study", errors={"o": float("inf")})):
        assert type(record).from_dict(record.to_dict()) == record
    error = Trial.from_dict(make_trial("study", errors={"o": float("nan")}).to_dict()).errors["o"]
    assert math.isnan(error)
    fields = make_answer().to_dict() | {"more": 1}
    del fields["time_us"]
    with pytest.raises(DatabaseError, match=r"unknown \['more'\], missing \['time_us'\]"):
        Answer.from_dict(fields)


def test_default_path_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path)
    with TuningDatabase() as database:
        assert database.name == str(default_path())
    assert default_path() == tmp_path / ".cache" / "sse_tune" / "tuning.db"
    assert default_path().is_file()


@pytest.mark.parametrize("url", ["mysql://host/name", "sqlite://", "sqlite:///:memory:", "nonsense://?"])
def test_other_urls_are_refused(url):
    with pytest.raises(DatabaseError) as caught:
        TuningDatabase(url)
    assert "\n" not in str(caught.value)


def test_password_is_not_shown():
    with pytest.raises(DatabaseError) as caught:
        TuningDatabase("postgresql://user:secret@127.0.0.1:1/name")
    assert "secret" not in str(caught.value)


def test_tables_can_be_made_on_postgresql():
    statements = [str(CreateTable(table).compile(dialect=postgresql.dialect())) for table in metadata.sorted_tables]
    assert len(statements) == 6
    assert all("CREATE TABLE sse_" in statement for statement in statements)
