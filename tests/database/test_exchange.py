"""Files out and in: round trips, and every way in which a file can be wrong; then nothing of it is taken."""

import json

import pandas as pd
import pytest

from sse_tune.database.exchange import read_file
from sse_tune.database.store import TuningDatabase
from sse_tune.errors import DeviceError, ExchangeError
from sse_tune.templates import registry


def same(a, b):
    """Equality by text: NaN errors are equal to themselves."""
    return [record.to_dict() for record in a] == [record.to_dict() for record in b]


def test_json_holds_everything(filled, tmp_path):
    file = tmp_path / "all.json"
    filled.export(file)
    with TuningDatabase(tmp_path / "copy.db") as copy:
        assert copy.import_file(file) == 8
        for part in ("studies", "trials", "answers", "quarantine"):
            assert same(getattr(copy.contents(), part), getattr(filled.contents(), part))
        assert copy.import_file(file) == 0
        copy.export(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_hold_trials_and_answers(filled, tmp_path, kind):
    file = tmp_path / f"all.{kind}"
    filled.export(file)
    with TuningDatabase(tmp_path / "copy.db") as copy:
        assert copy.import_file(file) == 7
        for part in ("studies", "trials", "answers"):
            assert same(getattr(copy.contents(), part), getattr(filled.contents(), part))


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_empty_database(path, tmp_path, kind):
    with TuningDatabase(path) as database:
        database.export(tmp_path / f"none.{kind}")
        assert database.import_file(tmp_path / f"none.{kind}") == 0


def test_table_is_ready_for_analysis(filled, tmp_path):
    filled.export(tmp_path / "all.parquet")
    frame = pd.read_parquet(tmp_path / "all.parquet")
    trials = frame[frame["record"] == "trial"]
    assert trials.groupby("outcome")["time_us"].min()["ok"] == 0.1 + 0.2
    assert set(trials["study_device"]) == {"test-cpu", "nvidia-h200"}


def test_format_by_name_or_ending(filled, tmp_path):
    filled.export(tmp_path / "file", format="json")
    assert json.loads((tmp_path / "file").read_text())["version"] == 1
    for act in (lambda: filled.export(tmp_path / "file.pkl"), lambda: filled.import_file(tmp_path / "file.pkl")):
        with pytest.raises(ExchangeError, match="json, csv, parquet"):
            act()


def test_export_that_fails_leaves_the_old_file(filled, tmp_path, monkeypatch):
    (tmp_path / "all.json").write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ExchangeError, match="No space left"):
        filled.export(tmp_path / "all.json")
    assert (tmp_path / "all.json").read_text() == "old"
    assert not list(tmp_path.glob(".sse-tune-*"))


def refused(file, tmp_path):
    """Imports a bad file; returns the message once it is one line and the database is as empty as before."""
    with TuningDatabase(tmp_path / "target.db") as target:
        with pytest.raises(ExchangeError) as caught:
            target.import_file(file)
        contents = target.contents()
    assert not (contents.studies or contents.trials or contents.answers or contents.quarantine)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _set(*keys, to):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = to

    return change


WHOLE = ("answers", -1, "plan", "stages", "whole")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (_set("more", to=[]), r"unknown \['more'\]"),
        (lambda data: data.pop("quarantine"), r"missing \['quarantine'\]"),
        (_set("format", to="something else"), "the file must say"),
        (_set("version", to=2), "the file must say"),
        (_set("version", to=True), "the file must say"),
        (_set("answers", to={}), "must be a list"),
        (_set("answers", 0, to=7), "answers.0."),
        (_set("answers", 0, "more", to=1), r"unknown \['more'\]"),
        (_set("trials", 0, "more", to=1), r"unknown \['more'\]"),
        (_set("studies", 0, "more", to=1), r"unknown \['more'\]"),
        (_set("quarantine", 0, "more", to=1), r"unknown \['more'\]"),
        (_set("answers", 0, "time_us", to=-5), "positive"),
        (_set("answers", 0, "time_us", to="fast"), "positive"),
        (_set("answers", 0, "timings_us", to=[1.0, None]), "positive"),
        (_set("trials", 0, "time_us", to=float("nan")), "must be JSON"),
        (_set("trials", 0, "number", to=1.5), "an integer"),
        (_set("trials", 0, "number", to=-1), "0 or more"),
        (_set("trials", 1, "number", to=0), "0 or more and new"),
        (_set("trials", 0, "study", to="unknown"), "study must be in the file"),
        (_set("trials", 0, "outcome", to="splendid"), "outcome"),
        (_set("studies", 0, "problem", "top_k", to=99), "top_k"),
        (_set("studies", 0, "problem", "shared", to="yes"), "types"),
        (_set("answers", 0, "problem", "extra", to=1), "unknown"),
        (_set("answers", 0, "problem", "seq_len", to="long"), "seq_len"),
        (_set("answers", 0, "problem", "seq_len", to=10**6), "bucket"),
        (_set("answers", 0, "bucket", to="nonsense"), "bucket"),
        (_set("answers", 0, "sources", to={}), "exactly the plan's templates"),
        (_set("answers", 0, "plan", "graph", to="secret"), "graph must be known"),
        (_set("answers", 0, "plan", "stages", to={}), "exactly the stages"),
        (_set(*WHOLE, "backend", to="os"), "backend must be known"),
        (_set(*WHOLE, "template", to="system"), "template must be one"),
        (_set(*WHOLE, "config", "chunk_size", to=65), "chunk_size"),
        (_set(*WHOLE, "config", "chunk_size", to="64"), "chunk_size"),
        (_set(*WHOLE, "config", "chunk_size", to=True), "chunk_size"),
        (_set(*WHOLE, "config", "surprise", to=1), "exactly the parameters"),
        (_set("answers", 0, "plan", "outer", "chunk_size", to=8192), "chunk_size"),
        (_set("answers", 0, "plan", "stages", "scan", "template", to="combine"), "template must be one"),
        (_set("trials", -1, "plan", "outer", "chunk_size", to=8192), "chunk_size"),
    ],
)  # fmt: skip
def test_json_that_does_not_fit(filled, tmp_path, change, rule):
    filled.export(tmp_path / "all.json")
    data = json.loads((tmp_path / "all.json").read_text())
    data["answers"].sort(key=lambda answer: answer["device"])  # the GPU's first
    data["trials"].sort(key=lambda trial: (trial["kind"], trial["number"]))
    change(data)
    (tmp_path / "all.json").write_text(json.dumps(data))
    with pytest.raises(ExchangeError, match=rule):
        read_file(tmp_path / "all.json")
    assert refused(tmp_path / "all.json", tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", '{"a": 1, "a": 2}', "[" * 100000, '{"x": NaN}', '{"x": 1' + "0" * 10000 + "}", "\ufeff{}"],
    ids=lambda text: text[:12] or "empty",
)
def test_what_is_not_json(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    assert refused(tmp_path / "bad.json", tmp_path)


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_bytes_missing_or_random(filled, tmp_path, kind):
    file = tmp_path / f"all.{kind}"
    filled.export(file)
    data = file.read_bytes()
    for bad in (data[: len(data) * 2 // 3], data[:-40], bytes(range(256)) * 8):
        file.write_bytes(bad)
        assert refused(file, tmp_path)
    file.unlink()
    assert refused(file, tmp_path)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    "change",
    [
        lambda frame: frame.assign(more=1),
        lambda frame: frame.drop(columns="time_us"),
        lambda frame: frame.assign(record="secret"),
        lambda frame: frame.assign(time_us=-1.0),
        lambda frame: frame.assign(time_us=float("nan")),
        lambda frame: frame.assign(plan="__import__('os')"),
        lambda frame: frame.assign(plan='{"graph": NaN}'),
        lambda frame: frame.assign(bucket="x"),
        lambda frame: frame.assign(number=0),
        lambda frame: frame.assign(study_note="{}").assign(study_created=[str(i) for i in range(len(frame))]),
        lambda frame: frame.assign(plan=frame["plan"].str.replace('"chunk_size":64', '"chunk_size":65')),
    ],
    ids=range(11),
)  # fmt: skip
def test_table_that_does_not_fit(filled, tmp_path, kind, change):
    file = tmp_path / f"all.{kind}"
    filled.export(file)
    if kind == "csv":
        change(pd.read_csv(file)).to_csv(file, index=False)
    else:
        change(pd.read_parquet(file)).to_parquet(file, index=False)
    assert refused(file, tmp_path)


def test_backend_that_is_not_installed(filled, tmp_path, monkeypatch):
    filled.export(tmp_path / "all.json")
    real = registry.templates_of

    def without_triton(backend):
        if backend == "triton":
            raise DeviceError("the backend 'triton' needs the package 'triton'", "none", "pip install triton")
        return real(backend)

    monkeypatch.setattr(registry, "templates_of", without_triton)
    message = refused(tmp_path / "all.json", tmp_path)
    assert "need their compiler" in message
    assert "pip install triton" in message


def test_constraints_hold_for_the_answers_architecture(filled, tmp_path):
    filled.export(tmp_path / "all.json")
    data = json.loads((tmp_path / "all.json").read_text())
    answer = next(answer for answer in data["answers"] if answer["arch"] == "sm_90")
    # a value of the space, that breaks the rule chunk_size * K <= 16384 of a smaller head size only
    answer["plan"]["outer"].update(state_dtype="fp32", chunk_size=128)
    answer["problem"].update(head_dim=256, head_dim_v=256)
    answer["bucket"] = answer["bucket"].replace("k128-v128", "k256-v256")
    (tmp_path / "all.json").write_text(json.dumps(data))
    assert "16384" in refused(tmp_path / "all.json", tmp_path)
