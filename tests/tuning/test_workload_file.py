"""The file of a workload: what it says, and what is refused."""

import json

import pytest

from sse_tune.database.keys import study_key
from sse_tune.errors import WorkloadError
from sse_tune.tuning.search import search
from sse_tune.tuning.workload import Entry, Workload
from tests.tuning.test_workload import file_of, of


def test_a_file_says_lengths_packings_and_skews(tmp_path, small):
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(file_of(
        {"weight": 1, "seq_len": 24, "lengths": [5, 0, 19], "occupancy": [70, 10, 10, 10]},
        {"weight": 3, "seq_len": 128, "batch": 2},
    )))  # fmt: skip
    found = Workload.read(path, small)
    assert [(e.problem.seq_len, e.problem.batch, e.problem.num_sequences) for e in found.entries] == [
        (128, 2, None), (24, 1, 3)
    ], "the heaviest first"  # fmt: skip
    assert found.shares == (0.75, 0.25)
    assert found.entries[1].occupancy == (0.7, 0.1, 0.1, 0.1)
    assert found.entries[1].lengths == (5, 0, 19)
    assert found.problem == small.replace(seq_len=128, batch=2)
    assert Workload.from_dict(found.to_dict(), small) == found
    assert [e.title for e in found.entries] == [
        "B=2 T=128", "T=24 in 3 sequences of 0 to 19, partitions at 70/10/10/10 %"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "must hold one JSON object, but got a list"),
        ({"format": 1}, "exactly a `format` and a list of `entries`"),
        ({"format": "sse-tune database", "version": 1}, "exactly a `format`"),
        ({"format": 2, "entries": []}, "format must be 1, but got 2"),
        ({"format": True, "entries": []}, "format must be 1"),
        (file_of(), "no entry"),
        (file_of(3), r"entries\[0\]: an entry has a `weight`"),
        (file_of({"seq_len": 8}), "an entry has a `weight`"),
        (file_of({"weight": 1}), "needs a `seq_len` or the `lengths`"),
        (file_of({"weight": 1, "seq_len": 8}, {"weight": 1, "seq_len": 8, "heads": 2}), r"entries\[1\].*'heads'"),
        (file_of({"weight": 0, "seq_len": 8}), "`weight` must be a number above 0"),
        (file_of({"weight": "3", "seq_len": 8}), "`weight` must be a number above 0, but got '3'"),
        (file_of({"weight": True, "seq_len": 8}), "`weight` must be a number above 0"),
        (file_of({"weight": 10**400, "seq_len": 8}), "`weight` must be a number above 0"),
        (file_of({"weight": 1e299, "seq_len": 8}, {"weight": 1e-299, "seq_len": 9}), "weights must be comparable"),
        (file_of({"weight": 1, "seq_len": 0}), "`seq_len` must be an integer, at least 1"),
        (file_of({"weight": 1, "seq_len": 10**12}), "must stay below 2"),
        (file_of({"weight": 1, "seq_len": 8.5}), "`seq_len` must be an integer"),
        (file_of({"weight": 1, "seq_len": 8, "batch": None}), "`batch` must be an integer"),
        (file_of({"weight": 1, "seq_len": 9, "lengths": [4, 4]}), "`seq_len` must be the sum of `lengths`"),
        (file_of({"weight": 1, "lengths": [4, -4]}), "`lengths` must be a list of integers"),
        (file_of({"weight": 1, "lengths": []}), "`lengths` must be a list of integers"),
        (file_of({"weight": 1, "lengths": [8], "batch": 2}), "packed sequences need batch 1"),
        (file_of({"weight": 1, "seq_len": 8, "occupancy": [0.5, 0.5]}), "each of the N partitions.*2 numbers"),
        (file_of({"weight": 1, "seq_len": 8, "occupancy": [0, 0, 0, 0]}), "not all 0"),
        (file_of({"weight": 1, "seq_len": 8, "occupancy": [1, -1, 1, 1]}), "`occupancy` must be numbers, 0 or more"),
        (file_of({"weight": 1, "seq_len": 8, "occupancy": "even"}), "`occupancy` must be a list"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(tmp_path, small, data, words):
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(data))
    with pytest.raises(WorkloadError, match=words) as raised:
        Workload.read(path, small)
    assert "\n" not in str(raised.value)
    assert raised.value.remedy


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"format": 1, "entries": [', "must be JSON"),
        (b'{"format": 1, "format": 1, "entries": []}', "a name is repeated"),
        (b'{"format": 1, "entries": [{"weight": NaN, "seq_len": 8}]}', "NaN is no number"),
        (b"\x1f\x8b\x08\x00\xff", "text in UTF-8"),
        (b"[" * 100000, "must be JSON"),
        (None, "must be readable"),
    ],
)
def test_damaged_files(tmp_path, small, content, words):
    path = tmp_path / "mix.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WorkloadError, match=words):
        Workload.read(path, small)


def test_entries_have_all_but_lengths_in_common(small):
    with pytest.raises(WorkloadError, match="must differ in lengths, packing and occupancy only"):
        Workload((Entry(problem=small), Entry(problem=small.replace(top_k=1))))
    with pytest.raises(WorkloadError, match="must differ in lengths"):
        search(small.replace(dtype="bf16"), 1, device="cpu", workload=Workload.of(small))
    with pytest.raises(WorkloadError, match="those of the problem's packed sequences"):
        Entry(problem=small, lengths=(32, 32))


def test_studies_of_different_workloads_do_not_mix(small, cpu):
    def key(workload):
        return study_key(workload.problem, cpu, ("torch",), workload.key)

    plain, even = {"weight": 2, "seq_len": 64}, {"weight": 1, "seq_len": 32}
    assert key(of(small, plain)) == study_key(small, cpu, ("torch",)), "a problem alone keeps its studies"
    assert key(Workload.of(small)) == study_key(small, cpu, ("torch",))
    different = [
        of(small, plain), of(small, plain, even), of(small, {**plain, "weight": 5}, even),
        of(small, {**plain, "occupancy": [1, 1, 1, 1]}), of(small, {**plain, "occupancy": [2, 1, 1, 1]}),
        of(small, {"weight": 1, "lengths": [32, 32]}), of(small, {"weight": 1, "lengths": [31, 33]}),
    ]  # fmt: skip
    assert len({key(workload) for workload in different}) == len({one.id for one in different}) == len(different)
    same = [of(small, even, {**plain, "weight": 2.0}), of(small, {**plain, "weight": 1}, even, {**plain, "weight": 1})]
    assert {key(workload) for workload in same} == {key(different[1])}, "order and unit do not count"
