"""The answers that ship with the package: every one is sound, and what is written reads back."""

import dataclasses
import json

import pytest

from sse_tune.database.exchange import check_answer
from sse_tune.database.shipped import read_shipped, shipped_answers, shipped_root, write_shipped
from sse_tune.errors import ExchangeError

ROOT = shipped_root()
FILES = sorted(ROOT.glob("**/*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_file_is_sound(path):
    assert path.parent.parent == ROOT
    answers = read_shipped(path)
    assert answers
    for answer in answers:
        check_answer(answer)


def test_folder_is_found():
    assert shipped_root().name in ("tuning_db", "_tuning_db")
    assert len(shipped_answers()) >= len(FILES)


def test_round_trip(make_answer, h200, cpu, training, tmp_path):
    answer, other = make_answer(5.0, h200, training), make_answer()
    path = write_shipped(answer, tmp_path)
    assert path == tmp_path / "nvidia-h200" / f"{training.bucket.name}.json"
    write_shipped(other, tmp_path)
    assert shipped_answers(h200, tmp_path) == shipped_answers("nvidia-h200", tmp_path) == (answer,)
    assert shipped_answers(cpu, tmp_path) == (other,)
    assert shipped_answers(root=tmp_path) == (answer, other)
    assert shipped_answers("unknown", tmp_path) == ()
    check_answer(answer)


def test_file_is_readable(make_answer, tmp_path):
    how = {"a": "opens [ b", "c": "d ] closes", "tricky": " [\n b] { ", "list": [1, 2], "empty": [], "none": {}}
    text = write_shipped(make_answer(how=how), tmp_path).read_text()
    assert '"timings_us": [100.0, 100.1]' in text
    assert json.loads(text)["answers"][0]["how"] == how
    assert max(map(len, text.splitlines())) < 160


def test_one_answer_for_each_toolchain(make_answer, tmp_path):
    first = make_answer(100.0)
    path = write_shipped(first, tmp_path)
    write_shipped(make_answer(200.0), tmp_path)
    assert read_shipped(path) == (first,)  # slower
    other = make_answer(300.0, toolchain={"torch": "2.8"})
    write_shipped(other, tmp_path)
    assert len(read_shipped(path)) == 2
    stale = dict.fromkeys(first.sources, "0" * 16)
    renewed = make_answer(400.0, sources=stale)
    write_shipped(renewed, tmp_path)  # new sources: the old times say nothing
    assert {answer.time_us for answer in read_shipped(path)} == {300.0, 400.0}


@pytest.mark.parametrize("sources", [{}, {"torch:another": "0"}], ids=["same sources", "other sources"])
def test_what_was_outdone_is_not_shipped(outdone, tmp_path, sources):
    first, later = outdone
    later = dataclasses.replace(later, sources=sources or later.sources)
    path = write_shipped(first, tmp_path)
    write_shipped(later, tmp_path)
    assert read_shipped(path) == (later,)
    write_shipped(first, tmp_path)
    assert read_shipped(path) == (later,)


def test_misplaced_or_malformed(make_answer, tmp_path):
    path = write_shipped(make_answer(), tmp_path)
    moved = path.rename(path.with_name("elsewhere.json"))
    with pytest.raises(ExchangeError, match="lies in"):
        read_shipped(moved)
    moved.rename(path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "more": 1}))
    with pytest.raises(ExchangeError, match="more"):
        shipped_answers(root=tmp_path)
    path.write_text(json.dumps(data)[:-30])
    with pytest.raises(ExchangeError, match="JSON"):
        shipped_answers(root=tmp_path)


def test_plan_outside_the_space_is_found(make_answer):
    answer = make_answer()
    choice = answer.plan.stages["whole"]
    outside = dataclasses.replace(choice, config=choice.config.replace(chunk_size=65))
    with pytest.raises(ExchangeError, match="chunk_size"):
        check_answer(dataclasses.replace(answer, plan=answer.plan.replace_stage("whole", outside)))
