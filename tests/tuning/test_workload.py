"""Several problems as one: inputs that are skewed as told, the guard, one answer for all."""

import concurrent.futures
import json
import math

import pytest
import torch

from sse_tune.database.store import TuningDatabase
from sse_tune.device import Device
from sse_tune.errors import ConstraintError
from sse_tune.problem import Problem
from sse_tune.reference.routing import largest
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.registry import default_plan
from sse_tune.tuning import jobs, landscape, machine
from sse_tune.tuning.candidates import Candidate
from sse_tune.tuning.cases import QUICK
from sse_tune.tuning.engine import Engine
from sse_tune.tuning.evaluate import Evaluator, Job
from sse_tune.tuning.finals import Finals
from sse_tune.tuning.inputs import workload as make_inputs
from sse_tune.tuning.jobs import Attempt
from sse_tune.tuning.landscape import PRUNE_RATIO, Templates, base_plan, predicted_us
from sse_tune.tuning.measure import Measured, Timing, compare, weighted
from sse_tune.tuning.neighbours import neighbours
from sse_tune.tuning.recorder import Recorder
from sse_tune.tuning.search import search
from sse_tune.tuning.shared import incumbent, known_plans
from sse_tune.tuning.worker import JobResult
from sse_tune.tuning.workload import Workload

JITTER = (1.0, 1.004, 0.996, 1.002, 0.998)
TINY = Problem(rule="gdn", seq_len=32, num_heads=1, head_dim=8, num_partitions=2, top_k=1, dtype="fp32")


def file_of(*entries):
    return {"format": 1, "entries": list(entries)}


def of(problem, *entries):
    return Workload.from_dict(file_of(*entries), problem)


# the inputs


@pytest.mark.parametrize("occupancy", [(0.7, 0.1, 0.1, 0.1), (0.05, 0.9, 0.05, 0.0)])
def test_first_choices_follow_the_occupancy_and_further_ones_are_drawn_without_replacement(small, occupancy):
    tokens = 20000
    problem = small.replace(seq_len=tokens, head_dim=1, head_dim_v=1, num_heads=1)
    logits = make_inputs(problem, "cpu", None, occupancy).inputs.router_logits
    assert logits.isfinite().all()
    chosen = largest(logits, 2)
    for partition, share in enumerate(occupancy):
        realised = (chosen[:, 0] == partition).double().mean().item()
        assert realised == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / tokens))
    hot = max(range(4), key=lambda i: occupancy[i])
    second = chosen[chosen[:, 0] == hot, 1]
    for partition in {0, 1, 2, 3} - {hot}:
        share = occupancy[partition] / (1 - occupancy[hot])
        realised = (second == partition).double().mean().item()
        assert realised == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / len(second)))


def test_lengths_are_those_of_the_file_and_a_problem_alone_has_its_inputs_of_before(small):
    load = of(small, {"weight": 1, "lengths": [5, 0, 19]})
    (case,) = jobs.cases(load, "cpu")
    assert case.inputs.cu_seqlens.tolist() == [0, 5, 5, 24]
    assert case.lengths == (5, 0, 19)
    (alone,) = jobs.cases(Workload.of(small.replace(num_sequences=3)), "cpu")
    assert alone.inputs.cu_seqlens.tolist() == [0, 21, 42, 64]
    generator = torch.Generator("cpu").manual_seed(0)
    assert torch.equal(alone.inputs.shared_q is not None and alone.inputs.q,
                       torch.randn((64, 2, 16), generator=generator))  # fmt: skip


# what all entries must let a candidate do


SHORT = Constraint("big tiles are for long sequences", lambda p, c, d: c["tile"] < 64 or p.seq_len >= 64)
SPACE = Space((Param("tile", (16, 32, 64, 128), 64, "a size"),), (SHORT,))


def test_a_config_must_pass_the_constraints_of_every_entry(small, cpu):
    load = of(small, {"weight": 3, "seq_len": 64}, {"weight": 1, "seq_len": 32})
    joint = load.joint(SPACE)
    assert SPACE.default(small, cpu) == Config(tile=64)
    assert [config["tile"] for config in joint.configs(small, cpu)] == [16, 32]
    assert joint.violations(small, Config(tile=64), cpu) == ["big tiles are for long sequences, but got tile=64"]
    assert Workload.of(small).joint(SPACE) is SPACE


def test_the_default_is_one_that_every_entry_can_run(small, cpu, monkeypatch):
    load = of(small, {"weight": 3, "seq_len": 64}, {"weight": 1, "seq_len": 32})
    plans = {64: default_plan(small, cpu), 32: varied(default_plan(small, cpu), chunk_size=32)}
    monkeypatch.setattr(landscape, "default_plan", lambda problem, *more: plans[problem.seq_len])
    assert base_plan(load, cpu, "torch") == plans[64]

    def refuse(plan, problem, device):
        if plan == plans[64]:
            raise ConstraintError("planted")

    monkeypatch.setattr(landscape, "validate_plan", refuse)
    assert base_plan(load, cpu, "torch") == plans[32]
    monkeypatch.setattr(landscape, "validate_plan", lambda plan, problem, device: refuse(plans[64], problem, device))
    with pytest.raises(ConstraintError, match="planted"):
        base_plan(load, cpu, "torch")


def test_outer_points_are_pruned_by_the_expected_floor():
    problem, gpu = Problem.preset("spikingbrain2-5b"), Device.from_arch("sm_90")
    load = of(problem, {"weight": 3, "seq_len": 512}, {"weight": 1, "lengths": [7] * 4096, "seq_len": 28672})
    outer = Templates(load, gpu, ("triton",)).outer

    def expected(point):
        return sum(entry.weight * predicted_us(Workload.of(entry.problem), gpu, point) for entry in load.entries)

    declared = list(landscape.GRAPHS["staged"].configs(problem, gpu))
    best, kept = min(map(expected, declared)), set(outer.configs(problem, gpu))
    default = default_plan(problem, gpu).outer

    def pays(point):
        return point["split"] == 0 or expected(point) < expected(point.replace(split=0))

    near = {point for point in declared if expected(point) <= PRUNE_RATIO * best and pays(point)}
    assert near | {default} == kept
    assert any(f"the {best:.0f} us of the best" in constraint.rule for constraint in outer.constraints)


def test_each_layout_is_admitted_and_compiled_for(small):
    load = of(
        small, {"weight": 4, "seq_len": 64}, {"weight": 3, "seq_len": 256}, {"weight": 2, "lengths": [9, 9]},
        {"weight": 1.5, "seq_len": 128, "batch": 8}, {"weight": 1, "lengths": [9] * 50},
        {"weight": 1, "seq_len": 64, "occupancy": [1, 2, 3, 4]}, {"weight": 0.5, "lengths": [9] * 60},
    )  # fmt: skip
    assert [(p.batch, p.num_sequences) for p in load.layouts] == [(1, None), (1, 2), (8, None), (1, 50)]
    asked = []

    class Ahead:
        def submit_plan(self, plan, problem, chunk_size, names, urgent):
            asked.append((problem, names))
            return [shared]

    shared = concurrent.futures.Future()
    engine = Engine.__new__(Engine)
    engine.workload, engine.problem, engine.ahead = load, load.problem, Ahead()
    gpu = Device.from_arch("sm_90")
    base = default_plan(load.problem, gpu)
    assert engine.compile(Candidate("plan", base)) == [shared]
    assert dict(asked) == {p: QUICK if p == load.problem else QUICK[:1] if p in load.layouts else ()
                           for p in load.problems}  # fmt: skip


def test_the_report_of_a_wrong_layout_refuses_the_plan(small, cpu, monkeypatch):
    load = of(small, {"weight": 2, "seq_len": 64}, {"weight": 1, "lengths": [9, 9]})
    checked = []

    class Report:
        def __init__(self, problem, names):
            self.outcome = "wrong" if problem.num_sequences else "ok"
            self.reason, self.poisoned, self.errors = "planted", False, {"o": 1.0 if problem.num_sequences else 0.1}
            checked.append((problem.num_sequences, names))

    monkeypatch.setattr(jobs, "check_plan", lambda plan, problem, device, quick, names: Report(problem, names))
    attempt = jobs.check(default_plan(small, cpu), load, cpu)
    assert (attempt.outcome, attempt.errors) == ("wrong", {"o": 1.0})
    assert checked == [(None, QUICK), (2, QUICK[:1])]


# measuring


def test_the_expected_time_is_what_counts(monkeypatch):
    first, second = Timing((10.0, 12.0, 14.0)), Timing((100.0, 100.0, 100.0, 100.0))
    assert weighted([first], (1.0,)) == first
    assert weighted([first, second], (0.75, 0.25)).times_us == (32.5, 34.0, 35.5)
    monkeypatch.setattr("sse_tune.tuning.measure._CpuSampler", lambda: lambda call: call())
    calls = {"a": lambda: 10.0, "b": lambda: 100.0}
    limits = dict(min_repeats=3, time_limit_s=5, until_precise=True, shares=(0.75, 0.25))
    assert len(compare(calls, "cpu", give_up_us=32, **limits)["a"].times_us) == 2, "hopeless as a whole"
    assert len(compare(calls, "cpu", give_up_us=33, **limits)["a"].times_us) == 5, "though one side alone is slower"


def test_a_plan_is_timed_on_every_entry_and_needs_the_most_memory_of_any(small, cpu, monkeypatch):
    load = of(small, {"weight": 3, "seq_len": 64}, {"weight": 1, "seq_len": 32})
    monkeypatch.setattr(jobs, "check", lambda *arguments: Attempt("ok", None, (), {"o": 0.1}))
    monkeypatch.setattr(jobs, "plan_call", lambda plan, case: lambda: float(case.problem.seq_len))
    monkeypatch.setattr(jobs, "peak_bytes", lambda call, device: int(10 * call()))
    monkeypatch.setattr("sse_tune.tuning.measure._CpuSampler", lambda: lambda call: call())
    attempt = jobs.check_and_time(default_plan(small, cpu), load, cpu, 1.0)
    assert attempt.entries_us == ((64.0,) * 5, (32.0,) * 5)
    assert attempt.timings_us == (56.0,) * 5
    assert attempt.peak_bytes == 640
    confirmed = jobs.check_and_time(default_plan(small, cpu), load, cpu, 1.0, None, 57.0)
    assert [len(times) for times in confirmed.entries_us] == [10, 10]


def test_a_stage_is_timed_on_the_buffers_of_every_entry(small, cpu, monkeypatch):
    load, ran = of(small, {"weight": 3, "seq_len": 64}, {"weight": 1, "seq_len": 32}), []

    class Running:
        def __init__(self, plan, problem, inputs, *, scale, keep):
            assert keep and len(inputs.q) == problem.seq_len
            self.plan, self.problem = plan, problem

        def forward(self):
            ran.append((self.plan, self.problem.seq_len, "forward"))

        def backward(self, do):
            ran.append((self.plan, len(do), "backward"))

        def run_stage(self, stage, choice):
            return float(self.problem.seq_len) if (stage, choice) == ("whole", plan.stages["whole"]) else 0.0

    monkeypatch.setattr(jobs, "check", lambda *arguments: Attempt("ok", None, (), {"o": 0.1}))
    monkeypatch.setattr(jobs, "Execution", Running)
    monkeypatch.setattr("sse_tune.tuning.measure._CpuSampler", lambda: lambda call: call())
    jobs._running.cache_clear()
    base = default_plan(small, cpu)
    plan = varied(base, chunk_size=16)
    attempt = jobs.check_and_time_stage(plan, base, "whole", load, cpu, 1.0)
    assert (attempt.entries_us, attempt.timings_us) == (((64.0,) * 5, (32.0,) * 5), (56.0,) * 5)
    assert ran == [(base, tokens, way) for tokens in (64, 32) for way in ("forward", "backward")]
    jobs._running.cache_clear()


# who wins


class ScriptedLanes:
    """One lane that runs nothing: each plan takes `time_of(plan, number)` on each entry, and all are right."""

    def __init__(self, load, time_of):
        self.load, self.time_of, self.busy = load, time_of, False

    def run(self, job):
        if job.function.__name__ == "time_in_turn":
            plans, number = job.arguments[0], job.arguments[4]
            return JobResult("ok", {key: self._times(plan, number) for key, plan in plans.items()}, None, 0.1)
        plan, errors = job.arguments[0], {"o": 0.1}
        if job.function.__name__ == "check":
            return JobResult("ok", Attempt("ok", None, (), errors), None, 0)
        entries = tuple(self._times(plan, number) for number in range(len(self.load.entries)))
        total = weighted([Timing(times) for times in entries], self.load.shares).times_us
        return JobResult("ok", Attempt("ok", None, total, errors, entries_us=entries), None, 0.1)

    def _times(self, plan, number):
        return tuple(self.time_of(plan, number) * j for j in JITTER)


def varied(plan, **changes):
    choice = plan.stages["whole"]
    return plan.replace_stage("whole", type(choice)(choice.backend, choice.template, choice.config.replace(**changes)))


@pytest.fixture
def decide(small, cpu, tmp_path):
    """decide(times, incumbents): the verdict where plans take these times on a light and a heavy entry, others 200."""
    load, made = of(small, {"weight": 3, "seq_len": 64}, {"weight": 1, "seq_len": 1024}), []

    def run(times, *incumbents):
        lanes = ScriptedLanes(load, lambda plan, number: times.get(plan, (200.0, 2000.0))[number])
        database = TuningDatabase(tmp_path / "tuning.db")
        study = database.open_study("key", load.problem, cpu, {})
        recorder = Recorder(database, study, load.problem, resume=False, budget_s=600)
        made.append(recorder)
        engine = Engine(Evaluator(load, cpu, recorder), None, lanes)
        for plan in times:
            engine.evaluate(Candidate("plan", plan))
        default, *others = times
        return Finals(engine, default, *(incumbents or (None, None))).decide(others)

    yield run
    for recorder in made:
        recorder.close()


@pytest.fixture
def plans(small, cpu):
    default = default_plan(small, cpu)
    return [default, *(varied(default, chunk_size=size) for size in (16, 32, 128))]


@pytest.mark.parametrize(("light_us", "wins"), [(100.0, True), (100.5, True), (102.0, False), (130.0, False)])
def test_a_plan_that_slows_an_entry_beyond_the_noise_does_not_win(decide, plans, light_us, wins):
    default, rival, *_ = plans
    verdict = decide({default: (100.0, 1000.0), rival: (light_us, 700.0)})
    assert verdict.plan == (rival if wins else default)
    assert verdict.slowed == ()
    if wins:
        assert verdict.timing.median_us == pytest.approx(0.75 * light_us + 0.25 * 700.0)
        assert [timing.median_us for timing in verdict.default.entries] == [100.0, 1000.0]


def test_of_those_that_slow_nothing_the_least_expected_time_wins(decide, plans):
    default, spoiler, good, better = plans
    times = {default: (100.0, 1000.0), spoiler: (120.0, 500.0), good: (50.0, 990.0), better: (99.0, 700.0)}
    assert decide(times).plan == better


def test_finalists_that_seem_to_slow_an_entry_come_last(decide, plans, small, cpu):
    """Three that are faster as a whole and spoil an entry must not keep out one that is good."""
    default, *spoilers = plans
    good = varied(default, chunk_size=16, solve="blocks")  # no neighbour of the default
    times = {default: (100.0, 1000.0), **dict.fromkeys(spoilers, (150.0, 300.0)), good: (90.0, 900.0)}
    assert decide(times).plan == good


def test_each_entry_is_guarded_by_its_own_incumbent(decide, plans):
    default, short, long, rival = plans
    times = {default: (100.0, 1000.0), short: (60.0, 1200.0), long: (130.0, 600.0), rival: (95.0, 610.0)}
    kept = decide(times, short, long)
    assert kept.plan == long, "nothing beats both: the best of the incumbents, for the entry that it does not slow"
    assert kept.slowed == (0,)
    times[rival] = (60.1, 500.0)
    found = decide(times, short, long)
    assert (found.plan, found.slowed) == (rival, ())


def test_a_neighbour_must_slow_nothing_either(decide, plans, small, cpu):
    default = plans[0]
    engine = type("Bare", (), {"workload": Workload.of(small), "problem": small,
                               "evaluator": type("Bare", (), {"device": cpu})})  # fmt: skip
    near = list(neighbours(default, "whole", engine))

    def times_of(light_us):
        return {default: (100.0, 1000.0), **dict.fromkeys(near, (light_us, 700.0))}

    assert decide(times_of(140.0)).plan == default
    assert decide(times_of(100.0)).plan in near


def test_timings_of_all_entries_are_compared(small):
    before = Measured((Timing((100.0,) * 5), Timing((1000.0,) * 5)), (0.75, 0.25))
    after = Measured((Timing((110.0,) * 5), Timing((500.0,) * 5)), (0.75, 0.25))
    assert after.beats(before)
    assert after.slower_on(before) == (0,)
    assert before.slower_on(after) == (1,)


# the whole


def test_an_entry_s_answer_is_chosen_over_no_plan_that_is_faster_there(plans, tmp_path, small, cpu, monkeypatch):
    default, light, winner, _ = plans
    times = {default: (100.0, 1000.0), light: (50.0, 990.0), winner: (99.0, 700.0)}
    load = of(small, {"weight": 3, "seq_len": 64}, {"weight": 1, "seq_len": 1024})
    lanes = ScriptedLanes(load, lambda plan, number: times.get(plan, (200.0, 2000.0))[number])

    class Scripted:
        def close(self):
            pass

        def run(self, function, *arguments, deadline_s):
            return lanes.run(Job(function, arguments, deadline_s))

    monkeypatch.setattr(machine, "Worker", lambda gpu, threads: Scripted())
    with TuningDatabase(tmp_path / "tuning.db") as database:
        search(small, 30, database=database, device=cpu, workload=load)
        answers = {answer.time_us: answer for answer in database.answers()}
    assert {answer.plan for answer in answers.values()} == {winner}
    beside = {time_us: set(answer.how["beside"]) for time_us, answer in answers.items()}
    assert {default.key, light.key} <= beside[700.0]
    assert beside[99.0] == beside[700.0] - {light.key}


def test_search_finds_one_answer_for_the_buckets_of_all_entries(tmp_path, cpu):
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(file_of(
        {"weight": 3, "seq_len": 32}, {"weight": 1, "lengths": [5, 20, 7], "occupancy": [9, 1]},
        {"weight": 1, "seq_len": 200, "occupancy": [9, 1]},
    )))  # fmt: skip
    load = Workload.read(path, TINY)
    with TuningDatabase(tmp_path / "tuning.db") as database:
        report = search(TINY.replace(seq_len=999), 120, database=database, trials=2, device="cpu", workload=path)
        (study,) = database.studies()
        assert study.note["workload"] == load.to_dict()
        answers = {answer.bucket: answer for answer in database.answers()}
        assert set(answers) == {entry.problem.bucket.name for entry in load.entries}
        assert len(answers) == 3
        for entry, found in zip(load.entries, report.entries):
            answer = answers[found.bucket]
            assert answer.plan == report.plan
            assert answer.problem == entry.problem.to_dict()
            assert (answer.time_us, answer.timings_us) == (found.best.median_us, found.best.times_us)
            assert answer.default_time_us == found.default.median_us
            how = answer.how["workload"]
            assert (how["id"], how["entries"], how["entry"]) == (load.id, 3, entry.to_dict())
            assert found.stored
        assert report.stored
        for trial in database.trials():
            entries = trial.resources["entries_us"]
            assert [len(times) for times in entries] == [len(trial.timings_us)] * 3
            assert trial.timings_us[0] == pytest.approx(sum(s * t[0] for s, t in zip(load.shares, entries)))
        for entry in load.entries:
            assert incumbent(database, entry.problem, cpu, load.problems) == report.plan
        assert known_plans(database, load, cpu, ("torch",)) == [report.plan]
        again = search(TINY, 120, database=database, resume=True, trials=1, device="cpu", workload=load)
        assert again.study == report.study
        tried = [json.dumps(trial.plan, sort_keys=True) for trial in database.trials() if trial.outcome == "ok"]
        assert len(tried) == len(set(tried)) == 3, "what was tried is known with its entries"
    assert report.best.times_us == weighted([one.best for one in report.entries], load.shares).times_us
    assert report.entries[1].title in "\n".join(report.lines())
    assert [entry["bucket"] for entry in report.to_dict()["entries"]] == [one.bucket for one in report.entries]
