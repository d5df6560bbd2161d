"""The command: what it says on stdout, on stderr and by its exit code; real searches of a tiny problem."""

import contextlib
import json
import os
import pathlib
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from sse_tune import cli_common
from sse_tune.cli import app
from sse_tune.cli_check import DEFAULT, subjects_of
from sse_tune.cli_common import UsageError, devices, size_bytes
from sse_tune.database.store import TuningDatabase
from sse_tune.device import ARCHS
from sse_tune.errors import (
    AdmissionError,
    CompileError,
    DatabaseError,
    DeviceError,
    ExchangeError,
    ProblemError,
    SearchError,
)
from sse_tune.templates.registry import templates_for
from sse_tune.tuning import finals
from sse_tune.tuning.sweep_file import read_sweep

ROOT = pathlib.Path(__file__).parent.parent
TINY = [
    *("--rule", "gdn", "--heads", "1", "--head-dim", "8", "--partitions", "2", "--top-k", "1"),
    *("--seq-len", "32", "--dtype", "fp32", "--device", "cpu"),
]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def process(*arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "sse_tune.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        **more,
    )


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A database that a real `sse-tune search` filled, and what the search printed."""
    path = tmp_path_factory.mktemp("tuned") / "tuning.db"
    done = process("search", *TINY, "--trials", 3, "--budget", "60s", "--db", path)
    assert done.returncode == 0, done.stderr
    return path, done


def test_search_shows_the_result_and_how_to_use_it(tuned):
    path, done = tuned
    for word in ("default", "best", "speed-up", "error against the reference", str(path), "import sse_tune as st"):
        assert word in done.stdout
    assert "admitting the default" in done.stderr


def test_the_lines_that_search_prints_run(tuned):
    path, done = tuned
    lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("  ")]
    kernel = next(line for line in lines if line.startswith("kernel = "))
    call = next(line for line in lines if line.startswith("o, state = "))
    inputs = """
import torch
q, k, q1, k1, v = (torch.randn(1, 32, 1, 8) for _ in range(5))
k, k1 = (torch.nn.functional.normalize(x, dim=-1) for x in (k, k1))
g, g1 = -torch.rand(1, 32, 1), -torch.rand(1, 32, 1)
beta, beta1 = torch.rand(1, 32, 1), torch.rand(1, 32, 1)
router_logits = torch.randn(1, 32, 2)
"""
    program = f"{inputs}\nimport sse_tune as st\n{kernel}\n{call}\nassert o.shape == v.shape\n"
    program += "assert kernel.decision.source == 'exact', kernel.explain()\n"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert found.returncode == 0, found.stderr


def test_show_best_and_explain_know_the_answer(tuned):
    path, _ = tuned
    shown = json.loads(run("show", "--db", path, "--device", "cpu", "--trials", "--json").stdout)
    assert len(shown["answers"]) == 1
    assert shown["answers"][0]["does_not_fit"] is None
    assert sum(next(iter(shown["studies"].values())).values()) >= 3
    best = run("best", *TINY, "--db", path, "--json")
    assert best.exit_code == 0
    assert json.loads(best.stdout)["source"] == "exact"
    explained = run("explain", *TINY, "--db", path)
    assert "exact" in explained.stdout
    assert "measured" in explained.stdout


def test_best_of_an_untuned_problem_is_the_default_and_exits_1(tuned):
    path, _ = tuned
    found = run("best", "--preset", "sse-gla", "--device", "cpu", "--db", path, "--json")
    assert found.exit_code == 1
    assert json.loads(found.stdout)["source"] == "default"


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_what_is_exported_is_imported(tuned, tmp_path, suffix):
    path, _ = tuned
    exported = run("export", tmp_path / f"out.{suffix}", "--db", path)
    assert exported.exit_code == 0, exported.output
    again = run("export", tmp_path / f"out.{suffix}", "--db", path)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    files = [name for name in tmp_path.iterdir() if name.suffix == f".{suffix}"]
    for name in files:
        taken = run("import", name, "--db", tmp_path / "new.db")
        assert taken.exit_code == 0, taken.output
    shown = json.loads(run("show", "--db", tmp_path / "new.db", "--device", "cpu", "--trials", "--json").stdout)
    assert shown["answers"] or shown["studies"]


def test_merge_takes_the_other_database(tuned, tmp_path):
    path, _ = tuned
    assert run("merge", path, "--db", tmp_path / "new.db").exit_code == 0
    shown = json.loads(run("show", "--db", tmp_path / "new.db", "--device", "cpu", "--json").stdout)
    assert len(shown["answers"]) == 1
    missing = run("merge", tmp_path / "none.db", "--db", tmp_path / "new.db")
    assert missing.exit_code == 2
    assert not (tmp_path / "none.db").exists()


def test_import_refuses_what_does_not_fit(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('{"answers": [], "surprise": 1}')
    refused = run("import", path, "--db", tmp_path / "new.db")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1


def test_a_damaged_database_is_one_line_and_exit_code_4(tmp_path):
    path = tmp_path / "damaged.db"
    path.write_bytes(b"this is no database " * 500)
    for command in ("show", "explain", "doctor"):
        found = run(command, "--db", path) if command != "explain" else run(command, *TINY, "--db", path)
        assert found.exit_code == 4, found.output
    assert path.read_bytes().startswith(b"this is no database")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serch"], "No such command"),
        (["search", "--budget", "soon"], "write 90s, 5m or 1h30m"),
        (["search", "--seq-len", "many"], "--seq-len"),
        (["search", "--preset", "demo", "--rule", "gla"], "exclude each other"),
        (["search", "--rule", "gla"], "--rule needs"),
        (["search", "--preset", "unheard-of"], "the preset must be known"),
        (["search", "--preset", "demo", "--top-k", "9"], "top_k=9, N=4"),
        (["search", "--backends", "cuda"], "--backends must be of"),
        (["search", "--workload", "mix.json", "--seq-len", "64", "--batch", "2"], "got --seq-len and --batch"),
        (["search", "--workload", "/none/such.json"], "the workload file must be readable"),
        (["best", "--seq-len", "64", "--seq-len", "128", "--device", "cpu"], "one --seq-len"),
        (["check", "--rule", "gru"], "--rule must be of gla, gdn"),
        (["check", "--cases", "easy"], "--cases must be of"),
        (["import", "/none/such.json"], "the file must exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments, words):
    found = run(*arguments)
    assert found.exit_code == 2, found.output
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    assert words in found.stderr
    assert found.stdout == ""


def test_a_missing_gpu_is_exit_code_3():
    import torch

    if torch.cuda.is_available():
        device = f"cuda:{torch.cuda.device_count()}"
    else:
        device = "cuda"
    found = run("check", "--device", device)
    assert found.exit_code == 3, found.output
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ProblemError("x"), 2),
        (ExchangeError("x"), 2),
        (DatabaseError("x"), 4),
        (DeviceError("x"), 3),
        (CompileError("x"), 3),
        (AdmissionError("x"), 1),
        (SearchError("x"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_exit_codes(error, code):
    assert cli_common.exit_code(error) == code


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("5m", 300), ("1h30m", 5400), ("45", 45), ("1m30s", 90)])
def test_seconds(text, expected):
    assert cli_common.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0s", "-5m", "5 m", "m", "1d", "nan"])
def test_seconds_refuses(text):
    with pytest.raises(cli_common.UsageError):
        cli_common.seconds(text)


def test_check_is_green_on_the_torch_backend():
    found = run("check", "--device", "cpu", "--rule", "gdn", "--dtype", "fp32", "--cases", "ordinary,lengths", "--json")
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    assert report["passed"]
    assert [row["case"] for row in report["cases"]] == ["ordinary", "lengths"]
    assert {"o", "d_q", "d_router_logits"} <= set(report["cases"][0]["errors"])


def test_check_is_red_when_a_kernel_is_wrong(monkeypatch):
    import sse_tune.tuning.check as checking

    true_run = checking.run_case

    def broken(plan, case):
        results, chosen = true_run(plan, case)
        return {**results, "d_v": results["d_v"] * 1.01}, chosen

    monkeypatch.setattr(checking, "run_case", broken)
    found = run("check", "--device", "cpu", "--rule", "gla", "--dtype", "fp32", "--cases", "ordinary")
    assert found.exit_code == 1, found.output
    assert "FAIL" in found.stdout
    assert "0 passed, 1 failed" in found.stdout


def test_check_runs_every_template_of_the_stages_it_checks():
    """Also those that are no default: specialized warps beside whole blocks."""
    subjects = list(subjects_of(("gdn",), ("bf16",), ("tilelang",), ARCHS["sm_90"], None))
    default = next(subject for subject in subjects if subject.plan_of == DEFAULT)
    untuned = [subject for subject in subjects if subject.problem == default.problem]
    checked = {choice.template for subject in untuned for choice in subject.plan.stages.values()}
    expected = {
        template.name for stage in default.plan.stages
        for template in templates_for(stage, default.problem, ("tilelang",))
    }  # fmt: skip
    others = {"gdn_scan_specialized", "gdn_scan_transposed", "gdn_state_gradient_specialized"}
    assert {"gdn_scan", *others} <= expected <= checked


def test_check_in_two_processes_prints_the_lines_of_one():
    options = ("check", "--device", "cpu", "--dtype", "fp32", "--quick")
    one, two = run(*options), run(*options, "--processes", 2)
    assert one.exit_code == two.exit_code == 0, two.output
    # all but the errors, which may round differently
    lines = [[[*line.split()[:5], line.split()[-1]] for line in done.stdout.splitlines()] for done in (one, two)]
    assert lines[0] == lines[1]
    assert "8 passed, 0 failed" in two.stdout


def test_check_in_two_processes_is_red_when_a_worker_finds_a_failure(monkeypatch):
    from sse_tune.tuning.worker import JobResult

    lost = JobResult("crash", None, "planted", 1.0)
    monkeypatch.setattr("sse_tune.tuning.lanes.Worker.run", lambda self, job, *arguments, deadline_s: lost)
    found = run("check", "--device", "cpu", "--rule", "gla", "--dtype", "fp32", "--cases", "ordinary,gates",
                "--processes", 2)  # fmt: skip
    assert found.exit_code == 1, found.output
    assert found.stdout.count("FAIL  crash: planted") == 2
    assert "0 passed, 2 failed" in found.stdout


def test_check_needs_a_process():
    found = run("check", "--processes", 0)
    assert found.exit_code == 2
    assert "greater than or equal to 1" in found.stderr


def test_doctor_says_what_works():
    found = run("doctor", "--json")
    assert found.exit_code == 0, found.output
    findings = {finding["what"]: finding for finding in json.loads(found.stdout)["findings"]}
    assert {"Python", "torch", "GPU", "driver", "triton", "tilelang", "nvcc", "database"} <= set(findings)
    assert all(finding["state"] in ("ok", "note", "broken") and finding["text"] for finding in findings.values())


def test_bench_prints_times_and_the_floor(tuned):
    path, _ = tuned
    found = run("bench", *TINY, "--db", path, "--time-limit", "1s", "--json")
    assert found.exit_code == 0, found.output
    bench = json.loads(found.stdout.splitlines()[-1])["benches"][0]
    assert bench["timings"]["default"]["median_us"] > bench["floor_us"] > 0


def test_ctrl_c_keeps_the_trials_and_resume_goes_on(tmp_path):
    path = tmp_path / "stopped.db"
    command = [sys.executable, "-m", "sse_tune.cli", "search", *TINY, "--budget", "4m", "--db", str(path)]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while _trials(path) < 1 and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGINT)  # a terminal sends it to the whole group
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "go on with" in err
    assert "--resume" in err
    assert "Traceback" not in err
    before = _trials(path)
    assert before >= 1
    resumed = process("search", *TINY, "--budget", "30s", "--trials", 1, "--db", path, "--resume", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["reports"][0]["trials"] >= before
    assert _trials(path) >= before


def _trials(path):
    """Trials in a SQLite file that another process may be making."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            return connection.execute("select count(*) from sse_trials").fetchone()[0]
    except sqlite3.Error:
        return 0


def test_help_starts_without_the_compilers():
    program = (
        "import sys; from typer.testing import CliRunner; from sse_tune.cli import app; "
        "assert CliRunner().invoke(app, ['search', '--help']).exit_code == 0; "
        "loaded = {'torch', 'triton', 'tilelang', 'optuna', 'sqlalchemy', 'pandas'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "size"), [("2G", 2 * 2**30), ("1.5 GiB", 3 * 2**29), ("800M", 800 * 2**20), ("64k", 65536), ("123", 123)]
)
def test_sizes(text, size):
    assert size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "2T", "-1G", "many"])
def test_no_sizes(text):
    with pytest.raises(UsageError, match="a memory limit must be a size above 0"):
        size_bytes(text)


def test_devices():
    assert devices(None) is None
    assert devices("cuda") == "cuda"
    assert devices("cuda:0, cuda:1") == ("cuda:0", "cuda:1")


def test_a_workload_is_searched_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(finals, "_COMPARISON_S", (0.5, 1.0))  # who wins is not the question here
    file, path = tmp_path / "mix.json", tmp_path / "tuning.db"
    entries = [{"weight": 3, "seq_len": 32}, {"weight": 1, "lengths": [9, 100, 19], "occupancy": [90, 10]}]
    file.write_text(json.dumps({"format": 1, "entries": entries}))
    where = TINY.index("--seq-len")
    tiny = [*TINY[:where], *TINY[where + 2 :], "--workload", file, "--db", path, "--budget", "60s", "--trials", 1]
    done = run("search", *tiny)
    assert done.exit_code == 0, done.stderr
    shown = " ".join(done.stdout.split())
    for words in ("and 1 more, expected time", "75 %: B=1 T=32", "25 %: T=128 in 3 sequences of 9 to 100"):
        assert words in shown
    with TuningDatabase(path) as database:
        assert {answer.problem["num_sequences"] for answer in database.answers()} == {None, 3}
    again = json.loads(run("search", *tiny, "--resume", "--json").stdout)
    (report,) = again["reports"]
    assert [entry["share"] for entry in report["entries"]] == [0.75, 0.25]
    assert report["outcomes"] == {"ok": 2}, "the first search's trial counts"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sampler", "cmaes"), "the sampler must be known"),
        (("--target", "0.9"), "a target must be above 1"),
        (("--max-memory", "1G"), "a memory limit is in bytes, and needs a GPU"),
        (("--device", "cpu,cuda:0"), "the devices must be different ones of a kind"),
        (("--device", "cuda:0,cuda:0"), "the devices must be different ones of a kind"),
    ],
)
def test_search_options_that_make_no_sense(tmp_path, options, message):
    given = list(options) if "--device" in options else [*options, "--device", "cpu"]
    tiny = [option for i, option in enumerate(TINY) if option != "--device" and (i == 0 or TINY[i - 1] != "--device")]
    ended = process("search", *tiny, *given, "--db", tmp_path / "tuning.db")
    assert ended.returncode in (1, 2, 3)
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_sweep_is_recorded_and_goes_on(tmp_path):
    file, path = tmp_path / "sweep.json.gz", tmp_path / "tuning.db"
    first = process("sweep", file, *TINY, "--db", path)
    assert first.returncode == 0, first.stderr
    assert "configs of 1 spaces" in first.stdout
    with TuningDatabase(path) as database:
        made = len(database.trials())
    again = process("sweep", tmp_path / "again.json.gz", *TINY, "--db", path)
    assert again.returncode == 0, again.stderr
    with TuningDatabase(path) as database:
        assert len(database.trials()) == made, "nothing is measured twice"
    assert read_sweep(tmp_path / "again.json.gz").spaces == read_sweep(file).spaces
    refused = process("sweep", tmp_path / "sweep.json", *TINY, "--db", path)
    assert (refused.returncode, "NAME.json.gz" in refused.stderr) == (2, True)
