"""Recorded sweeps: the file, the answers made of it, and strategies compared on them."""

import dataclasses
import gzip
import json
import math
import pathlib
import re

import pytest

from sse_tune.errors import ExchangeError, SearchError
from sse_tune.tuning.candidates import Candidate
from sse_tune.tuning.joint import Joint
from sse_tune.tuning.recorded import Recorded
from sse_tune.tuning.regret import medians
from sse_tune.tuning.replay import compare, main, table
from sse_tune.tuning.sweep_file import read_sweep, write_sweep
from tests.tuning.synthetic import OUTERS, other_space_of, space_of, sweep

FILES = sorted((pathlib.Path(__file__).parents[1] / "data").glob("*.json.gz"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sweep.json.gz"
    write_sweep(sweep(), path)
    return path


def test_what_is_written_reads_back(file, tmp_path):
    read, written = read_sweep(file), sweep()
    assert (read.problem, read.how, read.sources) == (written.problem, written.how, written.sources)
    assert [(s.stage, s.outer, s.rows, s.default) for s in read.spaces] == [
        (s.stage, s.outer, s.rows, s.default) for s in written.spaces
    ]
    again = tmp_path / "again.json.gz"
    write_sweep(read_sweep(file), again)
    assert again.read_bytes() == file.read_bytes()


def set_unknown(data):
    data["more"] = 1


def set_newer(data):
    data["version"] = 3


def set_no_problem(data):
    data["problem"]["rule"] = "other"


def set_no_spaces(data):
    data["spaces"] = []


def set_row_twice(data):
    data["spaces"][0]["rows"].append(data["spaces"][0]["rows"][0])


def set_value_outside(data):
    data["spaces"][0]["rows"][0][0][0] = 48


def set_ok_without_times(data):
    data["spaces"][0]["rows"][0][3] = []


def set_negative_time(data):
    data["spaces"][0]["rows"][0][3][0] = -1.0


def set_unknown_outcome(data):
    data["spaces"][0]["rows"][0][1] = "fine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_unknown, "exactly the fields"), (set_newer, "must say"), (set_no_problem, "problem must be one"),
        (set_no_spaces, "list with an entry"), (set_row_twice, "each config once"),
        (set_value_outside, r"spaces\[0\] row 0 must hold values of its parameters"),
        (set_ok_without_times, "times exactly if it is ok"), (set_negative_time, "positive, finite"),
        (set_unknown_outcome, "spaces.0. row 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(file, change, message):
    data = json.loads(gzip.decompress(file.read_bytes()))
    change(data)
    file.write_bytes(gzip.compress(json.dumps(data).encode()))
    with pytest.raises(ExchangeError, match=message):
        read_sweep(file)


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"no gzip", lambda b: gzip.compress(b"{")])
def test_damaged_files_are_refused(file, damage):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ExchangeError):
        read_sweep(file)


def test_answers_are_what_was_recorded():
    recorded = Recorded(sweep())
    assert set(recorded.outers) == set(OUTERS), "stages of a contract recorded elsewhere count"
    base = recorded.base(None)
    parts = [recorded.answer_us(Candidate("stage", base, base, stage)) for stage in recorded.stages]
    assert recorded.answer_us(Candidate("plan", base)) == pytest.approx(sum(parts))
    slot = recorded.slots("scan")[0]
    failed = base.replace_stage("scan", slot.choice(base.stages["scan"].config.replace(block=256, warps=8)))
    assert recorded.answer_us(Candidate("plan", failed)) is None


@pytest.mark.parametrize("stages", [("state_gradient", "gradients"), ("recompute", "state_gradient")], ids=str)
def test_points_that_no_recorded_stage_tells_apart_are_one(stages):
    """GDN's states may be kept or walked again: later stages are the same, and one has no `recompute`."""
    again = OUTERS[2]
    spaces = tuple(space_of_any(stage, again) for stage in stages)
    recorded = Recorded(dataclasses.replace(sweep(), spaces=spaces))
    assert recorded.outers == [again]
    assert recorded.promising() is None


def space_of_any(stage, outer):
    """The times of `scan` in the name of another stage."""
    return dataclasses.replace(space_of("scan", outer), stage=stage, template=f"gdn_{stage}")


def test_noise_is_seeded():
    base = Candidate("plan", Recorded(sweep()).base(None))
    exact = Recorded(sweep()).answer_us(base)

    def answers(seed):
        blurred = Recorded(sweep(), noise=0.05, seed=seed)
        return [blurred.answer_us(base) for _ in range(5)]

    first = answers(1)
    assert first == answers(1)
    assert first != answers(2)
    assert len(set(first)) == 5
    assert all(0.7 < answer / exact < 1.4 for answer in first)


def test_the_decomposed_search_needs_fewer_evaluations_than_the_joint_ones():
    results = {r.strategy: r for r in compare(sweep(), ("ours", "random", "tpe", "exhaustive"), seeds=6)}
    assert all(count is not None for count in results["ours"].evaluations)
    assert max(results["ours"].ratios) <= 1.03
    assert results["ours"].median <= 0.8 * results["tpe"].median
    assert results["random"].median is None, "400 evaluations do not do at random"
    assert results["exhaustive"].median == 4 * 48**3


@pytest.mark.parametrize("file", [f for f in FILES if "whole-plans" in f.name], ids=lambda f: f.name)
def test_recorded_whole_plans_are_found_early_and_ahead_of_the_joint_searches(file):
    recorded = read_sweep(file)
    ours, at_random = compare(recorded, ("ours", "random"), seeds=20, evaluations=60)
    (tpe,) = compare(recorded, ("tpe",), seeds=5, evaluations=60)  # a quarter of the seeds: its sampler is slow
    assert max(ours.ratios) <= 1.03
    assert ours.median is not None and ours.median <= 0.1 * len(recorded.plans)
    for other in (at_random, tpe):
        assert other.median is None or ours.median < other.median


def test_noise_does_not_lead_it_astray():
    (ours,) = compare(sweep(), ("ours",), seeds=4, noise=0.01)
    assert max(ours.ratios) <= 1.06


def test_gp_on_the_joint_space():
    pytest.importorskip("scipy", reason="the sampler gp needs scipy")
    (found,) = compare(sweep(), ("gp",), seeds=1, evaluations=12)
    assert found.ratios[0] < Recorded(sweep()).exact_us(Recorded(sweep()).base(None)) / Recorded(sweep()).best_us()


@pytest.fixture(scope="module")
def two_templates():
    return sweep((space_of, other_space_of))


def test_several_templates_of_a_stage(two_templates, tmp_path):
    recorded = Recorded(two_templates)
    assert [slot.backend for slot in recorded.slots("scan")] == ["triton", "tilelang"]
    assert recorded.plans == 4 * (48 + 6) ** 3
    assert recorded.configs == 8 * (48 + 6)
    assert recorded.best_us() == pytest.approx(0.9 * Recorded(sweep()).best_us(), rel=1e-3)
    write_sweep(two_templates, tmp_path / "two.json.gz")
    assert Recorded(read_sweep(tmp_path / "two.json.gz")).plans == recorded.plans


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_joint_proposals_choose_among_templates(two_templates, sampler):
    recorded = Recorded(two_templates)
    joint, chosen = Joint(recorded, sampler, 0), set()
    for _ in range(60):
        candidate = joint.ask()
        for stage, choice in candidate.plan.stages.items():
            assert recorded.has(stage, candidate.plan.outer, choice)
            chosen.add((stage, choice.backend))
        joint.tell(candidate, recorded.answer_us(candidate))
    assert len(chosen) == 6
    joint.tell(Candidate("plan", joint._any_plan()), 100.0)  # what nobody proposed is told all the same


def test_the_better_template_is_found(two_templates):
    ours, random = compare(two_templates, ("ours", "random"), seeds=3, evaluations=200)
    assert max(ours.ratios) <= 1.03
    reached = [evaluations or math.inf for evaluations in random.evaluations]
    assert max(evaluations or math.inf for evaluations in ours.evaluations) < min(reached)


def test_processes_change_nothing(two_templates):
    alone = compare(two_templates, ("ours", "random"), seeds=2, evaluations=40, noise=0.01)
    assert compare(two_templates, ("ours", "random"), seeds=2, evaluations=40, noise=0.01, processes=2) == alone


def test_the_table_is_markdown():
    results = compare(sweep(), ("ours", "random", "exhaustive"), seeds=2, evaluations=60)
    head, line, ours, random, exhaustive = table(results, 384, "configs")
    assert head.startswith("| strategy | median | of 384 configs |")
    assert line == "|---|---|---|---|---|---|---|"
    assert re.fullmatch(r"\| ours \| \d+(\.5)? \| \d+\.\d% \| \d+ \| \d+ \| 2 of 2 \| 1\.0\d\d \|", ours)
    assert random.startswith("| random | - | - | - | - | 0 of 2 | 1.")
    assert "| 2 of 2 | 1.000 |" in exhaustive


def test_medians_over_seeds():
    inf = float("inf")
    curves = [(inf, 1.5, 1.2), (1.4,), (inf, inf, 1.3, 1.1)]
    assert medians(curves) == [(2, 1.5), (3, 1.3), (4, 1.2)]
    assert medians(()) == []


def test_curves_go_on_to_the_end():
    short, long = (compare(sweep(), ("ours",), seeds=1, to_end=to_end)[0] for to_end in (False, True))
    assert short.evaluations == long.evaluations
    assert short.curves[0] == long.curves[0][: short.evaluations[0]]
    assert long.curves[0][-1] <= short.curves[0][-1]


def test_a_plot(file, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="a plot needs matplotlib")
    picture = tmp_path / "regret.png"
    given = [str(file), "--seeds", "2", "--evaluations", "30", "--processes", "1", "--plot", str(picture)]
    assert main([*given, "--strategies", "ours,random,exhaustive"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "| ours |" in capsys.readouterr().out


def test_a_plot_without_matplotlib(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([str(file), "--plot", str(tmp_path / "regret.png")]) == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


def test_unknown_strategy():
    with pytest.raises(SearchError, match="strategy must be known, but got 'best'"):
        compare(sweep(), ("best",))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_recordings_replay(path, capsys):
    assert path.stat().st_size <= 2 * 2**20
    recorded = read_sweep(path)
    assert str(recorded.how["command"]).startswith("sse-tune sweep")
    given = ["--seeds", "2", "--strategies", "ours,random", "--evaluations", "60", "--processes", "1"]
    assert main([str(path), *given]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    ours, random = last["results"]
    assert all(count is not None for count in ours["evaluations"])
    assert min(random["ratios"]) >= 1.0


def test_a_search_needs_a_tenth_of_a_recorded_sweep():
    recorded = read_sweep(next(path for path in FILES if "two-stages" in path.name))
    configs = sum(len(space.rows) for space in recorded.spaces)
    (ours,) = compare(recorded, ("ours",), seeds=20, evaluations=60)
    assert ours.median is not None
    assert ours.median <= 0.1 * configs


def test_there_is_a_recording():
    assert FILES


def test_a_missing_file_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none.json.gz")]) == 2
    assert capsys.readouterr().err.startswith("error: a sweep must be a gzip file")
