"""Who wins: the incumbent unless beaten beyond the noise, ties as ties, neighbours, memory, and answers of others."""

import concurrent.futures

import pytest

from sse_tune.database.keys import sources_of, toolchain_of
from sse_tune.database.records import Answer
from sse_tune.database.store import TuningDatabase
from sse_tune.device import Device, toolchain
from sse_tune.errors import SearchError
from sse_tune.plan import Plan
from sse_tune.problem import Bucket, Problem
from sse_tune.runtime.dispatch import decide as decision
from sse_tune.templates.registry import default_plan
from sse_tune.tuning import shared
from sse_tune.tuning.ahead import Compiled
from sse_tune.tuning.candidates import Candidate
from sse_tune.tuning.engine import Engine
from sse_tune.tuning.evaluate import Evaluator
from sse_tune.tuning.finals import Finals
from sse_tune.tuning.jobs import Attempt
from sse_tune.tuning.neighbours import neighbours
from sse_tune.tuning.recorder import Recorder
from sse_tune.tuning.report import FrontierPlan, frontier
from sse_tune.tuning.shared import incumbent, known_plans
from sse_tune.tuning.worker import JobResult

JITTER = (1.0, 1.004, 0.996, 1.002, 0.998)


class ScriptedLanes:
    """One lane that runs nothing: each plan takes what `time_of` says, and all are right but the `wrong` ones."""

    def __init__(self, time_of, wrong=(), peak_of=lambda plan: None, jitter=JITTER):
        self.time_of, self.wrong, self.peak_of, self.jitter = time_of, wrong, peak_of, jitter
        self.compared, self.busy = [], False

    def run(self, job):
        if job.function.__name__ == "time_in_turn":
            self.compared.append(list(job.arguments[0].values()))
            return JobResult("ok", {key: tuple(self.time_of(plan) * j for j in self.jitter)
                                    for key, plan in job.arguments[0].items()}, None, 0.1)  # fmt: skip
        plan = job.arguments[0]
        if job.function.__name__ == "check":
            outcome = "wrong" if plan in self.wrong else "ok"
            return JobResult("ok", Attempt(outcome, "planted" if plan in self.wrong else None, (), {"o": 0.1}), None, 0)
        times = tuple(self.time_of(plan) * j for j in self.jitter)
        return JobResult("ok", Attempt("ok", None, times, {"o": 0.1}, peak_bytes=self.peak_of(plan)), None, 0.1)


def config_of(plan):
    return plan.stages["whole"].config


@pytest.fixture
def setting(small, cpu, tmp_path):
    """setting(lanes, max_memory): an engine in which plans have been tried."""
    made = []

    def make(lanes, max_memory_bytes=None):
        database = TuningDatabase(tmp_path / "tuning.db")
        study = database.open_study("key", small, cpu, {})
        recorder = Recorder(database, study, small, resume=False, budget_s=600)
        made.append(recorder)
        return Engine(Evaluator(small, cpu, recorder), None, lanes, max_memory_bytes)

    yield make
    for recorder in made:
        recorder.close()


@pytest.fixture
def default(small, cpu):
    return default_plan(small, cpu)


def varied(plan, **changes):
    choice = plan.stages["whole"]
    return plan.replace_stage("whole", type(choice)(choice.backend, choice.template, choice.config.replace(**changes)))


def decide(engine, default, others, holder=None):
    for plan in (default, *others):
        engine.evaluate(Candidate("plan", plan))
    return Finals(engine, default, holder).decide(others)


def test_the_fastest_wins_and_those_within_the_noise_tie(setting, default):
    fast, near = varied(default, chunk_size=16), varied(default, chunk_size=128)
    times = {fast: 50.0, near: 50.01}
    lanes = ScriptedLanes(lambda plan: times.get(plan, 100.0))
    verdict = decide(setting(lanes), default, [near, fast])
    assert verdict.plan == fast
    assert near in lanes.compared[0]
    assert verdict.default.median_us == 100.0


def test_ties_are_recorded_as_ties(setting, default):
    lanes = ScriptedLanes(lambda plan: 100.0 if plan == default else 100.01)
    verdict = decide(setting(lanes), default, [varied(default, chunk_size=16)])
    assert verdict.plan == default
    assert verdict.ties
    slower = ScriptedLanes(lambda plan: 100.0 if plan == default else 110.0)
    assert not decide(setting(slower), default, [varied(default, chunk_size=16)]).ties


@pytest.mark.parametrize(("gain", "wins"), [(0.995, False), (0.95, True)])
def test_the_incumbent_stays_unless_beaten_beyond_the_noise(setting, default, gain, wins):
    holder, rival = varied(default, chunk_size=32), varied(default, chunk_size=128)
    times = {holder: 50.0, rival: gain * 50.0}
    engine = setting(ScriptedLanes(lambda plan: times.get(plan, 100.0)))
    assert decide(engine, default, [holder, rival], holder).plan == (rival if wins else holder)


@pytest.mark.parametrize(
    ("rival_us", "stage_us", "wins"),
    [(49.9, 30.0, True), (49.9, 39.0, False), (50.1, 30.0, False), (49.9, None, False)],
    ids=["stage clearly faster", "stage hardly faster", "slower beyond the noise", "stage not measured"],
)
def test_of_plans_that_tie_the_one_with_a_faster_stage_wins(setting, default, rival_us, stage_us, wins):
    holder, rival = varied(default, chunk_size=32), varied(default, chunk_size=128)
    times = {holder: 50.0, rival: rival_us}
    engine = setting(ScriptedLanes(lambda plan: times.get(plan, 100.0)))
    for plan, time_us in ((holder, 40.0), (rival, stage_us)):
        if time_us is not None:
            engine.recorder.add(Candidate("stage", plan, plan, "whole"), Attempt("ok", None, (time_us,) * 3))
    assert decide(engine, default, [holder, rival], holder).plan == (rival if wins else holder)


@pytest.mark.parametrize(("whole_us", "wins"), [(49.9, True), (51.0, False)], ids=["ties", "slower"])
def test_the_incumbent_with_a_faster_stage_is_tried_though_no_strategy_put_it_together(
    setting, default, whole_us, wins
):
    holder, rival = varied(default, chunk_size=32), varied(default, chunk_size=128)
    others = [varied(default, chunk_size=size, solve="blocks") for size in (16, 32, 64)]  # more than finalists by time
    times = {holder: 50.0, rival: whole_us, **dict.fromkeys(others, 49.85)}
    lanes = ScriptedLanes(lambda plan: times.get(plan, 100.0))
    engine = setting(lanes)
    for plan, time_us in ((holder, 40.0), (rival, 30.0), (varied(default, chunk_size=64), 33.0)):
        engine.recorder.add(Candidate("stage", plan, plan, "whole"), Attempt("ok", None, (time_us,) * 3))
    assert decide(engine, default, [holder, *others], holder).plan == (rival if wins else holder)
    assert rival in lanes.compared[0]


def test_it_walks_from_neighbour_to_neighbour(setting, default):
    """Only the default was tried; the best lies three steps away, each step a little faster."""

    def time_of(plan):
        config = config_of(plan)
        return 100.0 * (config["chunk_size"] / 64) * (0.9 if config["solve"] == "blocks" else 1.0)

    lanes = ScriptedLanes(time_of)
    verdict = decide(setting(lanes), default, [])
    assert (config_of(verdict.plan)["chunk_size"], config_of(verdict.plan)["solve"]) == (16, "blocks")
    assert verdict.neighbours >= 3


def test_neighbours_are_compiled_before_they_are_tried(setting, default):
    """Those of the fastest while the finalists run in turn, those of the winner before the first of them runs."""
    fast, events = varied(default, chunk_size=32), []

    class Noting(ScriptedLanes):
        def run(self, job):
            events.append((job.function.__name__, job.arguments[0]))
            return super().run(job)

    engine = setting(Noting(lambda plan: 50.0 if plan == fast else 100.0))
    engine.compile = lambda candidate: events.append(("compile", candidate.plan)) or []
    wanted = set(neighbours(fast, "whole", engine))
    assert len(wanted) > 1
    decide(engine, default, [fast])
    compared = [i for i, (name, _) in enumerate(events) if name == "time_in_turn"]
    assert {plan for name, plan in events[: compared[0]] if name == "compile"} >= wanted
    first = next(i for i, (name, plan) in enumerate(events) if i > compared[0] and name == "check_and_time")
    assert {plan for name, plan in events[compared[0] : first] if name == "compile"} >= wanted - {default}


def test_only_neighbours_that_seem_faster_are_admitted_like_other_plans(setting, default):
    faster = varied(default, chunk_size=32)
    engine = setting(ScriptedLanes(lambda plan: 90.0 if plan == faster else 100.0))
    assert decide(engine, default, []).plan == faster
    tried = {(t.kind, config_of(Plan.from_dict(t.plan))["chunk_size"]) for t in engine.recorder.database.trials()}
    assert {("combination", 32), ("plan", 32), ("combination", 128)} <= tried
    assert ("plan", 128) not in tried


def test_a_neighbour_admitted_when_the_budget_ends_is_still_compared(setting, default):
    faster = varied(default, chunk_size=32)

    class EndsTheBudget(ScriptedLanes):
        def run(self, job):
            if job.function.__name__ == "check_and_time" and job.arguments[0] == faster:
                engine.recorder.budget_s = 0.0
            return super().run(job)

    engine = setting(EndsTheBudget(lambda plan: 90.0 if plan == faster else 100.0))
    engine.recorder.add(Candidate("combination", faster), Attempt("ok", None, (90.0,) * 3))
    verdict = decide(engine, default, [])
    assert verdict.plan == faster
    assert verdict.neighbours < len(list(neighbours(default, "whole", engine)))


def test_neighbours_differ_in_one_step_of_one_parameter(setting, default):
    found = list(neighbours(default, "whole", setting(ScriptedLanes(lambda plan: 1.0))))
    assert found
    for plan in found:
        differing = [name for name in config_of(plan) if config_of(plan)[name] != config_of(default)[name]]
        assert len(differing) == 1
    assert {config_of(plan)["chunk_size"] for plan in found} == {32, 64, 128}


def test_what_fails_the_longer_admission_does_not_win(setting, default):
    fast, next_best = varied(default, chunk_size=16), varied(default, chunk_size=32)
    times = {fast: 40.0, next_best: 50.0}
    engine = setting(ScriptedLanes(lambda plan: times.get(plan, 100.0), wrong=(fast,)))
    assert decide(engine, default, [fast, next_best]).plan == next_best
    assert engine.recorder.lookup(Candidate("plan", fast)).outcome == "wrong"
    assert [t.outcome for t in engine.recorder.database.trials()].count("wrong") == 1


def test_the_neighbours_of_a_wrong_winner_are_not_tried(setting, default):
    fast = varied(default, chunk_size=16)
    timed = []

    class Noting(ScriptedLanes):
        def run(self, job):
            if job.function.__name__ == "check_and_time":
                timed.append(job.arguments[0])
            return super().run(job)

    engine = setting(Noting(lambda plan: 40.0 if plan == fast else 100.0, wrong=(fast,)))
    only_its_own = set(neighbours(fast, "whole", engine)) - {default, *neighbours(default, "whole", engine)}
    assert only_its_own
    assert decide(engine, default, [fast]).plan == default
    assert not only_its_own & set(timed)


def test_a_winner_is_admitted_once(setting, default):
    checked = []

    class Noting(ScriptedLanes):
        def run(self, job):
            if job.function.__name__ == "check":
                checked.append(job.arguments[0])
            return super().run(job)

    assert decide(setting(Noting(lambda plan: 100.0)), default, []).plan == default
    assert checked == [default]


def test_neighbours_that_are_compiled_do_not_wait_for_one_that_is_not(setting, default):
    """Its compiler is done only once another neighbour has been tried."""
    timed = []

    class Noting(ScriptedLanes):
        def run(self, job):
            if job.function.__name__ == "check_and_time":
                timed.append(job.arguments[0])
            return super().run(job)

    class OnceAnotherRan(concurrent.futures.Future):
        def done(self):
            return len(timed) > 1

        def result(self, timeout=None):
            return Compiled("ok", None, {})

    engine = setting(Noting(lambda plan: 100.0))
    first, second = list(neighbours(default, "whole", engine))[:2]
    engine.compile = lambda candidate: [OnceAnotherRan()] if candidate.plan == first else []
    decide(engine, default, [])
    assert timed[:3] == [default, second, first]


def test_nothing_passes(setting, default):
    class AllWrong(ScriptedLanes):
        def run(self, job):
            if job.function.__name__ == "check":
                return JobResult("ok", Attempt("wrong", "planted"), None, 0.1)
            return super().run(job)

    with pytest.raises(SearchError, match="some plan must pass the final admission, but got wrong, planted"):
        decide(setting(AllWrong(lambda plan: 1.0)), default, [])


def test_plans_over_the_memory_limit_do_not_count_and_are_recorded_as_they_are(setting, default):
    greedy = varied(default, chunk_size=16)
    lanes = ScriptedLanes(lambda plan: 10.0 if plan == greedy else 100.0, peak_of=lambda p: 300 if p == greedy else 100)
    engine = setting(lanes, max_memory_bytes=200)
    assert decide(engine, default, [greedy]).plan != greedy
    assert engine.over_memory == {greedy: 300}
    (trial,) = [t for t in engine.recorder.database.trials() if Plan.from_dict(t.plan) == greedy]
    assert (trial.outcome, trial.time_us, trial.resources["peak_bytes"]) == ("ok", 10.0, 300)


def test_frontier_of_time_and_memory():
    plans = [FrontierPlan("a", 1.0, 300), FrontierPlan("b", 2.0, 400), FrontierPlan("c", 3.0, 100),
             FrontierPlan("d", 3.0, 90), FrontierPlan("e", 9.0, 90)]  # fmt: skip
    assert [one.plan for one in frontier(plans)] == ["a", "d"]


def answer_of(problem, device, plan, time_us=100.0, **changes):
    fields = dict(
        bucket=problem.bucket.name, device=device.slug, arch=device.arch, toolchain=toolchain_of(plan, toolchain()),
        sources=sources_of(plan), problem=problem.to_dict(), plan=plan, time_us=time_us,
    )  # fmt: skip
    return Answer(**{**fields, **changes})


def test_answers_of_neighbouring_shapes_and_gpus_are_proposed_nearest_first(small, cpu, default, tmp_path):
    longer, other = small.replace(seq_len=256), Device("cpu", "Another CPU", "x86_64", 2)
    plans = {c: varied(default, chunk_size=c) for c in (16, 32, 128)}
    with TuningDatabase(tmp_path / "tuning.db") as database:
        database.put_answer(answer_of(small, other, plans[128]))
        database.put_answer(answer_of(longer, cpu, plans[32]))
        database.put_answer(answer_of(small, cpu, plans[16]))
        database.put_answer(answer_of(small.replace(dtype="bf16"), cpu, default))
        found = known_plans(database, small, cpu, ("torch",))
    assert found == [plans[16], plans[128], plans[32]]


def test_shipped_answers_are_known_for_other_gpus(tmp_path):
    problem, blackwell = Problem.preset("spikingbrain2-5b"), Device.from_arch("sm_100")
    with TuningDatabase(tmp_path / "tuning.db") as database:
        found = known_plans(database, problem, blackwell, ("triton", "tilelang"))
        assert found and all(plan.graph == "staged" for plan in found)
        assert incumbent(database, problem, blackwell) is None, "it was measured elsewhere"


def test_known_plans_run_by_the_default_what_they_ran_by_a_backend_that_is_not_searched(tmp_path):
    problem, hopper = Problem.preset("spikingbrain2-5b"), Device("cuda", "NVIDIA H200", "sm_90", 132, 227 * 1024)
    with TuningDatabase(tmp_path / "tuning.db") as database:
        mixed = known_plans(database, problem, hopper, ("triton", "tilelang"))[0]
        alone = known_plans(database, problem, hopper, ("triton",))[0]
    assert {choice.backend for choice in mixed.stages.values()} == {"triton", "tilelang"}
    base = default_plan(problem, hopper, "triton", mixed.outer)
    assert alone.outer == mixed.outer
    assert alone.stages == {
        stage: choice if choice.backend == "triton" else base.stages[stage] for stage, choice in mixed.stages.items()
    }


def test_the_incumbent_is_what_a_call_would_take(small, cpu, default, tmp_path):
    with TuningDatabase(tmp_path / "tuning.db") as database:
        assert incumbent(database, small, cpu) is None
        stale = varied(default, chunk_size=16)
        database.put_answer(answer_of(small, cpu, stale, 10.0, sources={"torch:whole": "other"}))
        assert incumbent(database, small, cpu) is None
        far, near, kept = (varied(default, chunk_size=size) for size in (128, 64, 32))
        database.put_answer(answer_of(small.replace(seq_len=4096), cpu, far, 1.0))
        assert incumbent(database, small, cpu) == far, "of another bucket, as a call would take it"
        database.put_answer(answer_of(small.replace(seq_len=512), cpu, near, 5.0))
        assert incumbent(database, small, cpu) == near
        database.put_answer(answer_of(small, cpu, kept, 50.0))
        assert incumbent(database, small, cpu) == kept
        assert decision(small, cpu, database).plan == kept


def test_the_incumbent_is_the_answer_that_was_chosen_over_a_faster_record(small, cpu, default, tmp_path, monkeypatch):
    shipped = answer_of(small, cpu, varied(default, chunk_size=32), 49.0, created="2026-01-01T00:00:00+00:00")
    monkeypatch.setattr(shared, "shipped_answers", lambda device=None: (shipped,))
    mine = answer_of(small, cpu, varied(default, chunk_size=16), 50.0, how={"beside": [shipped.plan.key]})
    with TuningDatabase(tmp_path / "tuning.db") as database:
        assert incumbent(database, small, cpu) == shipped.plan
        database.put_answer(mine)
        assert incumbent(database, small, cpu) == mine.plan
        assert known_plans(database, small, cpu, ("torch",)) == [mine.plan, shipped.plan]


def test_the_always_on_stream_alone_begins_with_what_is_fast_beside_partitions(tmp_path, monkeypatch):
    shipped = [answer for answer in shared.shipped_answers() if Bucket.from_name(answer.bucket).num_partitions]
    monkeypatch.setattr(shared, "shipped_answers", lambda: shipped)
    problem, hopper = Problem.preset("spikingbrain2-5b"), Device("cuda", "NVIDIA H200", "sm_90", 132, 227 * 1024)
    plain = problem.replace(num_partitions=0, top_k=0, read_k=0)
    with TuningDatabase(tmp_path / "tuning.db") as database:
        found = known_plans(database, plain, hopper, ("triton", "tilelang"))
        beside = known_plans(database, problem, hopper, ("triton", "tilelang"))
        sums = {"combine", "combine_gradients"}
        assert found and all(set(plan.stages) == set(beside[0].stages) - sums for plan in found)
        assert all(any(plan.stages.items() <= other.stages.items() for other in beside) for plan in found)
        own = default_plan(plain, hopper, "triton")
        database.put_answer(answer_of(plain, hopper, own))
        assert known_plans(database, plain, hopper, ("triton", "tilelang"))[0] == own, "its own are nearer"
        small, alone = (one.replace(head_dim=64, head_dim_v=64) for one in (problem, plain))  # none is shipped
        own = default_plan(alone, hopper, "triton")
        database.put_answer(answer_of(alone, hopper, own))
        sums_at = default_plan(small, hopper, "triton", own.outer).stages
        (found,) = known_plans(database, small, hopper, ("triton",))
        assert found.stages == {**own.stages, **{name: sums_at[name] for name in sums}}
