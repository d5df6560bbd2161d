"""`sse-tune bench`: what it measures, its last line, and its picture."""

import importlib.util
import json
import pathlib
import types

import pytest
from typer.testing import CliRunner

from sse_tune.bench import plans, plot
from sse_tune.bench.plans import Bench
from sse_tune.bench.sides import SideResult
from sse_tune.cli import app
from sse_tune.cli_bench import _print
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.runtime.dispatch import Decision
from sse_tune.space import Config
from sse_tune.templates import roofline
from sse_tune.tuning import regret
from sse_tune.tuning.measure import Timing

TINY = [
    *("--rule", "gdn", "--heads", "1", "--head-dim", "8", "--partitions", "2", "--top-k", "1"),
    *("--dtype", "fp32", "--device", "cpu", "--time-limit", "0.1s"),
]

PLAN = Plan("staged", Config(), {})


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    """The two seconds that measuring them takes are not what is tested here."""
    monkeypatch.setattr("sse_tune.bench.roofline.measure_ceilings", lambda device, dtype: roofline.Ceilings(1e10, 1e11))


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def without(monkeypatch, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )


def refuse_to_measure(monkeypatch):
    def bench(*arguments, **options):
        raise AssertionError("measured")

    monkeypatch.setattr(plans, "bench", bench)


def made(problem, sides=("default", "mask, fla-core")):
    """A result as a GPU would give it: a time for each side, larger with T and N."""
    directions = ("fwd", "fwd+bwd") if problem.trains else ("fwd",)
    size = float(problem.seq_len * (1 + problem.num_partitions))
    stages = (roofline.StageFloor("prepare", 1, 1.0, size / 10, 1.0),)
    floor = roofline.Floor(roofline.Ceilings(1e10, 1e11), stages, 1.0)
    return Bench(
        problem,
        {way: Decision(PLAN, "default", "a reason") for way in directions},
        dict.fromkeys(directions, floor),
        tuple(
            SideResult(name, way, Timing((size * (1 + index),)), Timing((size * (2 + index),)), 2**20)
            for way in directions
            for index, name in enumerate(sides)
        ),
        (),
    )


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_the_last_line_is_json_with_both_directions(flags, tmp_path):
    found = run(*TINY, "--seq-len", 16, "--seq-len", 24, "--db", tmp_path / "none.db", *flags)
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert (len(lines) == 1) is bool(flags)
    whole = json.loads(lines[-1])
    assert [bench["problem"]["seq_len"] for bench in whole["benches"]] == [16, 24]
    for bench in whole["benches"]:
        assert bench["timings"].keys() == bench["forward"]["timings"].keys() == {"default"}
        assert bench["timings"]["default"]["peak_bytes"] is None
        assert bench["timings"]["default"]["repeats"] >= 5
        assert bench["floor_us"] > bench["forward"]["floor_us"] > 0
        assert bench["peers"] == []


def test_a_forward_problem_has_one_direction_and_its_table_no_memory_on_a_cpu(tmp_path):
    found = run(*TINY, "--seq-len", 16, "--direction", "fwd", "--stages", "--db", tmp_path / "none.db")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout.splitlines()[-1])["benches"][0]["forward"] is None
    assert "fwd+bwd ±" not in found.stdout
    row = next(line for line in found.stdout.splitlines() if "default" in line)
    assert [cell.strip() for cell in row.split("│")][4:6] == ["-", "-"]
    assert "Medians by the clock" in found.stdout
    assert "idle:" not in found.stdout


def test_a_single_call_on_an_idle_gpu_has_a_column_of_its_own(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _print(made(Problem.preset("demo", seq_len=24, num_partitions=4, direction="fwd")), "cuda", False)
    shown = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in shown.splitlines()]
    names = ("x floor", "default", "floor, all in one")
    head, row, floor = (next(row for row in cells if name in row) for name in names)
    assert dict(zip(head[1:5], row[1:5])) == {
        "fwd ± noise": "0.120 ms ± 0.0 us", "x floor": "10.00", "idle": "0.240 ms", "extra MiB": "1"
    }  # fmt: skip
    assert floor[3:] == ["-", "-", "inputs and results once, the same FLOPs"]
    assert "a single call on a GPU that waits" in " ".join(shown.split())


def test_several_partition_counts_are_several_problems(tmp_path):
    tiny = [word for word in TINY if word not in ("--partitions", "2")]
    found = run(*tiny, "--seq-len", 16, "--partition-counts", "1, 3", "--db", tmp_path / "none.db", "--json")
    assert found.exit_code == 0, found.output
    benches = json.loads(found.stdout)["benches"]
    assert [line for line in found.stderr.splitlines() if line.startswith("measuring ")] == [
        f"measuring {one['bucket']}, 1 x {one['problem']['seq_len']} tokens" for one in benches
    ], "people who wait are told for what"
    assert [bench["problem"]["num_partitions"] for bench in benches] == [1, 3]


def test_no_partitions_are_the_always_on_stream_alone(tmp_path):
    tiny = [word for word in TINY if word not in ("--partitions", "--top-k", "1", "2")]
    tiny.insert(tiny.index("--heads") + 1, "1")
    found = run(*tiny, "--partitions", 0, "--seq-len", 16, "--db", tmp_path / "none.db")
    assert found.exit_code == 0, found.output
    (bench,) = json.loads(found.stdout.splitlines()[-1])["benches"]
    assert (bench["problem"]["num_partitions"], bench["problem"]["top_k"], bench["problem"]["shared"]) == (0, 0, True)
    assert bench["timings"].keys() == {"default"}


def test_skewed_routing_stands_beside_the_uniform_one(tmp_path):
    found = run(*TINY, "--seq-len", 16, "--occupancy", "90, 10", "--db", tmp_path / "none.db")
    assert found.exit_code == 0, found.output
    (bench,) = json.loads(found.stdout.splitlines()[-1])["benches"]
    assert bench["occupancy"] == [0.9, 0.1]
    assert bench["timings"].keys() == bench["forward"]["timings"].keys() == {"default", "default, skewed"}
    assert "skewed: first choices at 90/10 %" in " ".join(found.stdout.split())


def test_heads_in_groups_stand_beside_all_at_once(tmp_path):
    found = run(*TINY, "--heads", 4, "--seq-len", 16, "--head-groups", "2, 4", "--db", tmp_path / "none.db")
    assert found.exit_code == 0, found.output
    (bench,) = json.loads(found.stdout.splitlines()[-1])["benches"]
    sides = {"default", "best, 2 head groups", "best, 4 head groups"}
    assert bench["timings"].keys() == bench["forward"]["timings"].keys() == sides
    assert "--heads 1 " in bench["head_groups"]["4"]["fwd+bwd"]["reason"]  # that of a group


def test_the_plan_that_ran_is_named(tmp_path):
    found = run(*TINY, "--seq-len", 16, "--db", tmp_path / "none.db")
    (bench,) = json.loads(found.stdout.splitlines()[-1])["benches"]
    assert f"plan {bench['plan_key']}" in " ".join(found.stdout.split())
    assert (bench["source"], bench["forward"]["source"]) == ("default", "default")
    assert Plan.from_dict(bench["plan"]).key == bench["plan_key"]


def test_what_does_not_fit_is_left_out_with_the_reason(monkeypatch, tmp_path):
    workload = plans.workload

    def limited(problem, where):
        if problem.seq_len > 16:
            raise RuntimeError("CUDA out of memory. Tried to allocate 4.00 GiB. GPU 0 has a total capacity of 79 GiB")
        return workload(problem, where)

    limited.cache_clear = workload.cache_clear
    monkeypatch.setattr(plans, "workload", limited)
    found = run(*TINY, "--seq-len", 16, "--seq-len", 24, "--stages", "--db", tmp_path / "none.db")
    assert found.exit_code == 0, found.output
    fits, large = json.loads(found.stdout.splitlines()[-1])["benches"]
    assert fits["timings"].keys() == {"default"}
    assert fits["left_out"] == []
    assert large["timings"] == large["forward"]["timings"] == {}
    reason = "RuntimeError: CUDA out of memory. Tried to allocate 4.00 GiB"
    assert large["left_out"] == [{"name": "inputs", "direction": "fwd+bwd", "reason": reason}]
    assert reason in " ".join(found.stdout.split("2 x 24 tokens")[-1].split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--occupancy", "90,x"), "must be numbers"),
        (("--occupancy", "90,5,5"), "3 numbers, N=2"),
        (("--occupancy", "0,0"), "not all 0"),
        (("--partition-counts", "2,4"), "exclude each other"),
        (("--partition-counts", "2,x"), "must be numbers"),
        (("--head-groups", "1,x"), "must be numbers"),
        (("--head-groups", "2"), "divides H"),
        (("--peers",), "--peers needs"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(monkeypatch, arguments, message):
    refuse_to_measure(monkeypatch)
    found = run(*TINY, *arguments)
    assert found.exit_code in (2, 3)
    assert message in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_plot_needs_matplotlib_before_anything_is_measured(monkeypatch, tmp_path):
    refuse_to_measure(monkeypatch)
    without(monkeypatch, "matplotlib")
    found = run(*TINY, "--seq-len", 16, "--seq-len", 24, "--plot", tmp_path / "x.png")
    assert found.exit_code == 3
    assert "pip install 'sse-tune[plot]'" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seq-len", 16), "against T or against N"),
        (("--seq-len", 16, "--seq-len", 24, "--plot", "x.pdf"), "takes a .png file"),
        (("--seq-len", 16, "--seq-len", 24, "--plot", "no-such-folder/x.png"), "in a folder that exists"),
    ],
)
def test_plot_says_what_it_cannot_draw(monkeypatch, arguments, message):
    refuse_to_measure(monkeypatch)
    monkeypatch.setattr(regret, "require_matplotlib", lambda: None)
    found = run(*TINY, "--plot", "x.png", *arguments)
    assert found.exit_code == 2
    assert message in found.stderr


def test_lines_of_a_picture_go_through_every_side_that_was_timed():
    base = Problem.preset("demo", seq_len=100, num_partitions=4)
    long = base.replace(seq_len=200)
    assert plot.axis_of([base, long]) == "seq_len"
    assert plot.axis_of([base, base.replace(num_partitions=8)]) == "num_partitions"
    assert plot.axis_of([base, long.replace(num_partitions=8)]) is None
    lines = plot.lines_of([made(long, ("default",)), made(base)], "seq_len")
    assert list(lines) == ["fwd", "fwd+bwd"]
    assert lines["fwd+bwd"] == {
        "default": [(100, 0.5), (200, 1.0)],
        "mask, fla-core": [(100, 1.0)],
        "floor": [(100, 0.05), (200, 0.1)],
    }


def test_draw_makes_a_panel_of_each_direction_with_logarithmic_axes(monkeypatch):
    drawn = []

    class Axes:
        def __getattr__(self, name):
            return lambda *given, **options: drawn.append((name, given, options))

    class Figure(Axes):
        def __init__(self, **options):
            pass

        def subplots(self, rows, columns, squeeze):
            return [[Axes() for _ in range(columns)]]

    monkeypatch.setattr(plot.importlib, "import_module", lambda name: types.SimpleNamespace(Figure=Figure))
    base = Problem.preset("demo", seq_len=100)
    benches = [made(base.replace(num_partitions=n)) for n in (4, 8)]
    plot.draw(benches, "num_partitions", pathlib.Path("x.png"), "a GPU")
    assert [options["label"] for name, _, options in drawn if name == "plot"] == [
        "default",
        "mask, fla-core",
        "floor",
    ] * 2
    assert [(o["title"], o["xscale"], o["yscale"]) for name, _, o in drawn if name == "set"] == [
        ("fwd", "log", "log"), ("fwd+bwd", "log", "log")
    ]  # fmt: skip
    assert ("savefig", (pathlib.Path("x.png"),), {"dpi": 150}) in drawn


def test_draw_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    base = Problem.preset("demo", seq_len=100)
    plot.draw([made(base), made(base.replace(seq_len=200))], "seq_len", tmp_path / "x.png", "a GPU")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
