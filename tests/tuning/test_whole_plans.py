"""Sweeps of whole plans: what is asked for, the file, the answers made of it, and how far stage times add up."""

import dataclasses
import gzip
import json
from typing import ClassVar

import pytest

from sse_tune.database.claims import Claim
from sse_tune.database.store import TuningDatabase
from sse_tune.device import ARCHS
from sse_tune.errors import ExchangeError, SearchError
from sse_tune.problem import Problem
from sse_tune.tuning import jobs
from sse_tune.tuning import sweep as sweep_module
from sse_tune.tuning.additivity import additivity
from sse_tune.tuning.candidates import Candidate
from sse_tune.tuning.cases import QUICK
from sse_tune.tuning.evaluate import COMBINATION_TIME_LIMIT_S
from sse_tune.tuning.jobs import Attempt
from sse_tune.tuning.joint import Joint
from sse_tune.tuning.landscape import Templates
from sse_tune.tuning.recorded import Recorded
from sse_tune.tuning.recorder import Recorder
from sse_tune.tuning.replay import compare, main
from sse_tune.tuning.sweep_file import read_sweep, write_sweep
from sse_tune.tuning.worker import JobResult
from tests.tuning.synthetic import CLASH_US, sweep_with_plans, whole_us

DEVICE = ARCHS["sm_90"]
PROBLEM = Problem.preset("sse-gla-128", seq_len=2048, direction="fwd")
STAGES = ("decay_rows", "output")


def made_up_us(stage, config):
    return 100.0 + len(stage) + sum(config.values())


class NoGpu:
    """Lanes whose one worker makes up times; every job is kept. At C = 64 a config with 8 warps fails."""

    made: ClassVar[list] = []
    stop_after: ClassVar[int | None] = None

    def __init__(self, workers):
        self.waiting = []

    def __len__(self):
        return 1

    @property
    def free(self):
        return 1 - len(self.waiting)

    @property
    def busy(self):
        return bool(self.waiting)

    def submit(self, job, tag):
        self.waiting.append((job, tag))

    def wait(self, timeout_s):
        job, tag = self.waiting.pop()
        if len(NoGpu.made) == NoGpu.stop_after:
            raise KeyboardInterrupt
        NoGpu.made.append(job)
        plan = job.arguments[0]
        if job.function is jobs.check_and_time_stage:
            stage = job.arguments[2]
            config = plan.stages[stage].config
            failed = config["num_warps"] == 8 and plan.outer["chunk_size"] == 64
            times = (made_up_us(stage, config),) * 3
        else:
            known = [stage for stage in STAGES if stage in plan.stages]
            failed, times = False, (sum(made_up_us(s, plan.stages[s].config) for s in known) + 40.0,) * 6
        attempt = Attempt("wrong", "other bits") if failed else Attempt("ok", None, times)
        return [(tag, JobResult("ok", attempt, None, 0.01))]

    def close(self):
        pass


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(sweep_module, "Lanes", NoGpu)
    monkeypatch.setattr(sweep_module, "detect", lambda lanes, device: DEVICE)
    monkeypatch.setattr(sweep_module, "compilers_for", lambda backends, device: None)
    monkeypatch.setattr(NoGpu, "made", [])
    monkeypatch.setattr(NoGpu, "stop_after", None)
    return NoGpu


def record(path, **more):
    given = {"stages": STAGES, "nearest": 4, "whole_plans": True, "backends": ("triton",), "database": path}
    return sweep_module.sweep(PROBLEM, **{**given, **more})


def kinds(made):
    """(bases, stages, combinations) that ran."""
    whole = [job for job in made if job.function is jobs.check_and_time]
    bases = [job for job in whole if job.arguments[-1] == QUICK]
    return len(bases), len(made) - len(whole), len(whole) - len(bases)


def test_every_combination_of_what_ran_is_measured_whole(no_gpu, tmp_path):
    found = record(tmp_path / "tuning.db")
    spaces = {space.stage: space for space in found.spaces}
    assert [len(space.rows) for space in spaces.values()] == [4, 4]
    ran = {stage: sum(row.outcome == "ok" for row in space.rows.values()) for stage, space in spaces.items()}
    assert 1 < ran["decay_rows"] < 4, "some failed"
    count = ran["decay_rows"] * ran["output"]
    assert kinds(no_gpu.made) == (1, 8, count)
    assert len(found.plans) == count
    whole = [job for job in no_gpu.made if job.function is jobs.check_and_time][1:]
    stages = [job for job in no_gpu.made if job.function is jobs.check_and_time_stage]
    assert {job.arguments[6] for job in stages} == {None}, "none is given up"
    assert {(job.arguments[3], job.arguments[-1]) for job in whole} == {(COMBINATION_TIME_LIMIT_S, QUICK[:1])}
    assert no_gpu.made[-count:] == whole, "when the stages are known"
    assert all(set(plan.stages) == set(STAGES) and len(row.times_us) == 6 for plan, row in found.plans.items())
    assert "ordinary" in found.how["whole_plans"]
    assert set(found.sources) >= {"triton:gla_decay_rows", "triton:gla_output", "triton:routing_recount"}
    assert additivity(found).median_error < 1e-6


def test_nothing_is_combined_while_a_stage_is_out():
    everything = sweep_module.Everything(Templates(PROBLEM, DEVICE, ("triton",)), STAGES, False, 2, True)
    everything.tell(everything.ask(), 300.0)
    out = [everything.ask() for _ in range(4)]
    assert [candidate.kind for candidate in out] == ["stage"] * 4
    for number, candidate in enumerate(out):
        assert everything.ask() is None
        assert not everything.finished
        everything.tell(candidate, None if number == 0 else 100.0)
    combined = [everything.ask() for _ in range(2)]
    assert [candidate.kind for candidate in combined] == ["combination"] * 2
    assert everything.ask() is None
    assert not everything.finished
    for candidate in combined:
        everything.tell(candidate, 200.0)
    assert everything.ask() is None
    assert everything.finished


def test_stages_alone_are_given_up_when_they_are_slow(no_gpu, tmp_path):
    found = record(tmp_path / "tuning.db", whole_plans=False)
    assert not found.plans
    assert "whole_plans" not in found.how
    assert any(job.arguments[6] is not None for job in no_gpu.made if job.function is jobs.check_and_time_stage)


def test_at_every_outer_point(no_gpu, tmp_path):
    found = record(tmp_path / "tuning.db", every_outer=True, nearest=2)
    outers = {plan.outer for plan in found.plans}
    assert len(outers) > 1
    assert {space.outer for space in found.spaces if space.stage == "output"} == outers
    assert {outer["states"] for outer in outers} == {"store"}, "which states=joint, without an output, is not"
    assert set(Recorded(found).outers) == outers
    path = tmp_path / "sweep.json.gz"
    write_sweep(found, path)
    assert read_sweep(path).plans == found.plans


@pytest.mark.parametrize("stop_after", [0, 5, 11])
def test_a_sweep_of_plans_goes_on_where_it_was_stopped(no_gpu, tmp_path, stop_after):
    once = record(tmp_path / "once.db")
    needed = len(no_gpu.made)
    no_gpu.made.clear()
    no_gpu.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "tuning.db")
    assert len(no_gpu.made) == stop_after
    no_gpu.stop_after = None
    again = record(tmp_path / "tuning.db")
    assert len(no_gpu.made) == needed, "nothing twice"
    assert (again.spaces, again.plans) == (once.spaces, once.plans)
    assert record(tmp_path / "tuning.db").plans == once.plans
    assert len(no_gpu.made) == needed


def test_no_search_takes_a_combination_for_an_admitted_plan(no_gpu, tmp_path):
    path = tmp_path / "tuning.db"
    record(path)
    whole = [job.arguments[0] for job in no_gpu.made if job.function is jobs.check_and_time]
    with TuningDatabase(path) as database:
        study = database.trials()[0].study
        recorder = Recorder(database, study, PROBLEM, resume=True, budget_s=60)
        known = [plan for plan in whole if recorder.lookup(Candidate("plan", plan)) is not None]
        assert set(known) == {whole[0]}, "the base"
        assert all(recorder.lookup(Candidate("combination", plan)) is not None for plan in whole[1:])
        recorder.close()


def test_what_a_dead_sweep_was_combining_is_left_to_the_next_sweep(no_gpu, tmp_path):
    path = tmp_path / "tuning.db"
    record(path, whole_plans=False)
    with TuningDatabase(path) as database:
        study, plan = database.trials()[0].study, no_gpu.made[2].arguments[0]
        for kind in ("combination", "plan"):
            left = Claim(study, Candidate(kind, plan).key(PROBLEM), plan.to_dict(), None)
            database.claim(left, f"dead {kind}", -1.0, 0)
        recorder = Recorder(database, study, PROBLEM, resume=True, budget_s=60)
        assert recorder.take_lapsed(lambda plan, stage: True) == (plan, None)
        assert recorder.take_lapsed(lambda plan, stage: True) is None
        recorder.close()


@pytest.mark.parametrize("stages", [None, ("output",), ("output", "output")])
def test_plans_of_less_than_two_stages_are_refused(no_gpu, tmp_path, stages):
    with pytest.raises(SearchError, match="two or more stages must be named"):
        record(tmp_path / "tuning.db", stages=stages)
    with pytest.raises(SearchError, match="a config of each template must be left"):
        record(tmp_path / "tuning.db", nearest=0)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "plans.json.gz"
    write_sweep(sweep_with_plans(), path)
    return path


def test_plans_read_back(file, tmp_path):
    read = read_sweep(file)
    assert read.plans == sweep_with_plans().plans
    write_sweep(read, tmp_path / "again.json.gz")
    assert (tmp_path / "again.json.gz").read_bytes() == file.read_bytes()


def changed(file, change):
    data = json.loads(gzip.decompress(file.read_bytes()))
    change(data)
    file.write_bytes(gzip.compress(json.dumps(data).encode()))
    return file


def as_before_plans(data):
    data["version"] = 1
    del data["plans"]


def test_a_recording_from_before_plans_is_read(file):
    read = read_sweep(changed(file, as_before_plans))
    assert not read.plans
    assert [space.rows for space in read.spaces] == [space.rows for space in sweep_with_plans().spaces]
    with pytest.raises(SearchError, match="must hold whole plans"):
        additivity(read)


def set_first_version(data):
    data["version"] = 1


def set_no_plans(data):
    del data["plans"]


def set_no_list(data):
    data["plans"] = {}


def set_more_fields(data):
    data["plans"][0]["more"] = 1


def set_one_away(data):
    data["plans"][1]["rows"].pop()


def set_one_twice(data):
    data["plans"][0]["rows"][1] = data["plans"][0]["rows"][0]


def set_point_twice(data):
    data["plans"][1] = data["plans"][0]


def set_other_point(data):
    data["plans"][0]["rows"][0][0][0][0] = 2


def set_row_outside(data):
    data["plans"][0]["rows"][0][0][0][1] = 6


def set_row_that_failed(data):
    data["plans"][0]["rows"][0][0][1] = [1, 5]


def set_stages_swapped(data):
    data["plans"][0]["rows"][0][0].reverse()


def set_no_pair(data):
    data["plans"][0]["rows"][0][0][0] = 0


def set_no_point(data):
    data["plans"][0]["outer"] = {}


def set_ok_without_times(data):
    data["plans"][0]["rows"][0][3] = []


def set_time_of_nothing(data):
    data["plans"][0]["rows"][0][3][0] = 0.0


def set_one_stage(data):
    data["spaces"] = data["spaces"][::2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_first_version, "version 1 has exactly the fields"), (set_no_plans, "exactly the fields"),
        (set_no_list, "`plans` must be a list"), (set_more_fields, r"plans\[0\] has exactly"),
        (set_one_away, r"plans\[1\] must hold each combination"), (set_one_twice, "each combination .* 29 different"),
        (set_point_twice, r"plans\[1\] must hold each combination"),
        (set_other_point, "row 0 must name a config that ran"), (set_row_outside, "row 0 must name a config that ran"),
        (set_row_that_failed, "row 0 must name a config that ran"),
        (set_stages_swapped, "row 0 must name a config that ran"), (set_no_pair, "shape of an outer point"),
        (set_no_point, "shape of an outer point"), (set_ok_without_times, "times exactly if it is ok"),
        (set_time_of_nothing, "positive, finite"), (set_one_stage, "two stages or more"),
    ],
)  # fmt: skip
def test_plans_that_do_not_fit_are_refused(file, change, message):
    with pytest.raises(ExchangeError, match=message):
        read_sweep(changed(file, change))


def test_a_whole_plan_takes_what_was_measured():
    swept = sweep_with_plans()
    recorded = Recorded(swept)
    assert {plan.outer for plan in swept.plans} == set(recorded.outers)
    base = recorded.base(None)
    parts = sum(recorded.answer_us(Candidate("stage", base, base, stage)) for stage in recorded.stages)
    assert recorded.answer_us(Candidate("plan", base)) == pytest.approx(whole_us(base), abs=0.01)
    assert recorded.answer_us(Candidate("plan", base)) == pytest.approx(parts + 300.0 + CLASH_US, abs=0.01)
    assert recorded.best_us() == min(row.time_us for row in swept.plans.values())
    config = base.stages["scan"].config.replace(tile=64, warps=8)
    failed = base.replace_stage("scan", recorded.slots("scan")[0].choice(config))
    assert recorded.answer_us(Candidate("plan", failed)) is None


def test_additivity_is_that_of_the_planted_clash():
    swept = sweep_with_plans()
    found = additivity(swept)
    # both defaults have one tile: the default has the clash, and so does every prediction
    off = [0.0 if len({c.config["tile"] for c in plan.stages.values()}) == 1 else CLASH_US / row.time_us
           for plan, row in swept.plans.items()]  # fmt: skip
    assert found.plans == len(swept.plans) == 60
    assert found.worst_error == pytest.approx(max(off), abs=1e-4)
    assert found.median_error == pytest.approx(sorted(off)[30], abs=1e-3)
    assert found.noise == 0.0
    best, best_sum = min(swept.plans, key=whole_us), min(swept.plans, key=lambda plan: whole_us(plan) - clash(plan))
    assert found.best_by_sums == pytest.approx(whole_us(best_sum) / whole_us(best), abs=1e-4)
    assert found.best_by_sums > 1.03, "by sums both take the tile of 32"
    assert "not within 1.03" in found.line(1.03)
    assert "1.0%" in dataclasses.replace(found, median_error=0.0102, best_by_sums=1.01).line(1.03)


def clash(plan):
    return CLASH_US * (len({choice.config["tile"] for choice in plan.stages.values()}) == 1)


def test_a_default_that_did_not_run_is_named():
    swept = sweep_with_plans()
    base = Recorded(swept).base(None)
    gone = {**swept.plans, base: dataclasses.replace(swept.plans[base], outcome="timeout", times_us=())}
    with pytest.raises(SearchError, match="the default must have run"):
        additivity(dataclasses.replace(swept, plans=gone))


def test_strategies_are_judged_by_whole_plans():
    """Tuned apart, both stages take the tile of 32, and the clash keeps that plan out of reach: a search that trusts
    sums stays there, one that measures whole plans does not."""
    ours, random = compare(sweep_with_plans(), ("ours", "random"), seeds=3, evaluations=80)
    assert min(ours.ratios) > 1.03
    assert ours.median is None
    assert max(random.ratios) == 1.0
    assert all(random.evaluations)


def test_joint_samplers_propose_only_values_that_were_recorded():
    outer = Joint(Recorded(sweep_with_plans()), "random", 0)._outer
    assert [(axis.name, axis.values) for axis in outer.axes] == [("chunk_size", (32, 64))]
    assert dict(outer.fixed) == {"state_dtype": "io", "states": "recompute", "split": 0}


def test_a_replay_of_plans_counts_plans(file, capsys):
    assert main([str(file), "--seeds", "2", "--strategies", "ours,random,exhaustive", "--processes", "1"]) == 0
    printed = capsys.readouterr().out
    assert "| of 72 plans |" in printed
    assert "Additivity: of 60 plans" in printed
    last = json.loads(printed.splitlines()[-1])
    assert (last["configs"], last["plans"], last["additivity"]["plans"]) == (24, 72, 60)
