"""Which plan a problem gets: its bucket's, the nearest that fits, or the default; and what `explain` says of it."""

import dataclasses

import pytest
import torch

import sse_tune as st
from sse_tune.database.keys import sources_of, toolchain_of
from sse_tune.database.records import Answer
from sse_tune.device import Device, toolchain
from sse_tune.errors import DatabaseError, DeviceError, ProblemError
from sse_tune.problem import Problem
from sse_tune.runtime import dispatch
from sse_tune.runtime.dispatch import clear_cache, decide, device_of, narrow
from sse_tune.space import Config
from sse_tune.templates.registry import default_plan, validate_plan
from tests.runtime.cases import assert_close, exact, make_case, with_gradients

CPU = Device.detect("cpu")
HOPPER = Device.from_arch("sm_90")
DEMO = Problem.preset("demo")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A user without a database, on whose machine nothing is shipped."""
    monkeypatch.setattr(dispatch, "default_path", lambda: tmp_path / "tuning.db")
    monkeypatch.setattr(dispatch, "shipped_answers", lambda device: ())
    clear_cache()
    yield tmp_path / "tuning.db"
    clear_cache()


def answer_of(problem, chunk_size=32, time_us=100.0, **changes):
    plan = default_plan(problem, CPU)
    choice = plan.stages["whole"]
    plan = plan.replace_stage("whole", dataclasses.replace(choice, config=choice.config.replace(chunk_size=chunk_size)))
    fields = dict(
        bucket=problem.bucket.name, device=CPU.slug, arch=CPU.arch, toolchain=toolchain_of(plan, toolchain()),
        sources=sources_of(plan), problem=problem.to_dict(), plan=plan, time_us=time_us, default_time_us=150.0,
    )  # fmt: skip
    return Answer(**{**fields, **changes})


def store(path, *answers):
    with st.TuningDatabase(path) as database:
        for answer in answers:
            database.put_answer(answer)
    clear_cache()


def chunk_size(decision):
    return decision.plan.stages["whole"].config["chunk_size"]


def test_nothing_known_is_the_default():
    decision = decide(DEMO, CPU)
    assert (decision.source, decision.answer, decision.plan) == ("default", None, default_plan(DEMO, CPU))
    assert "sse-tune search" in decision.reason


def test_the_bucket_s_answer_is_taken(home):
    store(home, answer_of(DEMO))
    decision = decide(DEMO.replace(seq_len=DEMO.seq_len - 100), CPU)
    assert (decision.source, chunk_size(decision)) == ("exact", 32)


def test_a_database_may_be_named(tmp_path):
    store(tmp_path / "other.db", answer_of(DEMO))
    assert decide(DEMO, CPU).source == "default"
    assert decide(DEMO, CPU, tmp_path / "other.db").source == "exact"
    with st.TuningDatabase(tmp_path / "other.db") as database:
        assert decide(DEMO, CPU, database).source == "exact"


def test_shipped_answers_count_too(home, monkeypatch):
    store(home, answer_of(DEMO, 32, time_us=100.0))
    monkeypatch.setattr(dispatch, "shipped_answers", lambda device: (answer_of(DEMO, 128, time_us=90.0),))
    assert chunk_size(decide(DEMO, CPU)) == 128


def chosen_over(*others, time_us=101.0, day=2, **changes):
    """An answer, slower as recorded, found on a day of January in a comparison with the plans of others."""
    how = {"beside": [other.plan.key for other in others]}
    return answer_of(DEMO, 32, time_us, created=f"2026-01-{day:02}T00:00:00+00:00", how=how, **changes)


def earlier(chunk_size, time_us=100.0, **changes):
    return answer_of(DEMO, chunk_size, time_us, created="2026-01-01T00:00:00+00:00", **changes)


def test_what_a_comparison_in_turn_decided_holds_though_the_record_is_slower(home, monkeypatch):
    shipped = earlier(128)
    monkeypatch.setattr(dispatch, "shipped_answers", lambda device: (shipped,))
    mine = chosen_over(shipped)
    store(home, mine)
    decision = decide(DEMO, CPU)
    assert (decision.source, decision.answer, decision.refused) == ("exact", mine, ())
    monkeypatch.setattr(dispatch, "shipped_answers", lambda device: (shipped, earlier(64, 100.5)))
    clear_cache()
    assert chunk_size(decide(DEMO, CPU)) == 64, "nothing but the record says which is faster"


def test_an_older_answer_does_not_outdo_a_newer_one(home, monkeypatch):
    shipped = earlier(128)
    monkeypatch.setattr(dispatch, "shipped_answers", lambda device: (shipped,))
    store(home, dataclasses.replace(chosen_over(shipped), created="2025-12-31T00:00:00+00:00"))
    assert chunk_size(decide(DEMO, CPU)) == 128


@pytest.mark.parametrize(
    ("change", "reason"), [(dict(toolchain={"torch": "1.0"}), "torch 1.0"), (dict(plan=7), "chunk_size")], ids=str
)
def test_an_answer_that_does_not_fit_outdoes_nothing(change, reason, monkeypatch):
    """Of what fits the fastest is taken, and not what the unfit one did not outdo."""
    best, slower = earlier(128), earlier(64, 100.5)
    if "plan" in change:
        change = dict(plan=answer_of(DEMO, change["plan"]).plan)
    unfit = chosen_over(best, **change)
    monkeypatch.setattr(dispatch, "shipped_answers", lambda device: (slower, best, unfit))
    decision = decide(DEMO, CPU)
    assert (decision.source, chunk_size(decision)) == ("exact", 128)
    assert len(decision.refused) == 1 and reason in decision.refused[0]
    monkeypatch.setattr(dispatch, "shipped_answers", lambda device: (best, unfit))
    clear_cache()
    assert chunk_size(decide(DEMO, CPU)) == 128


def test_of_three_the_last_to_be_chosen_is_taken_and_without_it_the_one_before(monkeypatch):
    first = earlier(128)
    second = dataclasses.replace(chosen_over(first), time_us=102.0)
    third = dataclasses.replace(chosen_over(second, time_us=103.0, day=3), plan=earlier(64).plan)
    for answers, expected in (((first, second, third), third), ((first, second), second)):
        monkeypatch.setattr(dispatch, "shipped_answers", lambda device, answers=answers: answers)
        clear_cache()
        assert decide(DEMO, CPU).answer == expected
    unfit = dataclasses.replace(third, toolchain={"torch": "1.0"})
    monkeypatch.setattr(dispatch, "shipped_answers", lambda device: (first, second, unfit))
    clear_cache()
    assert decide(DEMO, CPU).answer == second


def test_the_nearest_is_taken(home):
    store(home, answer_of(DEMO.replace(seq_len=2048), 32), answer_of(DEMO.replace(seq_len=16384), 128))
    decision = decide(DEMO, CPU)
    assert (decision.source, chunk_size(decision)) == ("nearest", 32)
    assert chunk_size(decide(DEMO.replace(seq_len=32768), CPU)) == 128
    assert decide(DEMO.replace(direction="fwd"), CPU).source == "nearest"


@pytest.mark.parametrize(
    "change", [dict(rule="gla"), dict(dtype="bf16"), dict(head_dim=32), dict(norm="before"), dict(shared=False),
               dict(num_partitions=0, top_k=0, read_k=0)], ids=str,
)  # fmt: skip
def test_answers_of_another_kind_are_not_near(home, change):
    store(home, answer_of(DEMO))
    assert decide(DEMO.replace(**change), CPU).source == "default"


def test_a_forward_answer_does_not_train(home):
    store(home, answer_of(DEMO.replace(direction="fwd")))
    assert decide(DEMO, CPU).source == "default"
    assert decide(DEMO.replace(direction="fwd"), CPU).source == "exact"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(toolchain={"torch": "1.0"}), "measured with torch 1.0"),
        (dict(sources={"torch:whole": "0"}), "another source"),
        (dict(arch="sm_80"), "this is"),
    ],
)
def test_what_no_longer_fits_is_passed_over_with_its_reason(home, change, reason):
    store(home, answer_of(DEMO, **change), answer_of(DEMO.replace(seq_len=8192), 128))
    decision = decide(DEMO, CPU)
    assert (decision.source, chunk_size(decision)) == ("nearest", 128)
    assert reason in decision.refused[0] and DEMO.bucket.name in decision.refused[0]
    assert reason in dispatch_text(decision)


def dispatch_text(decision):
    return st.Kernel(DEMO, CPU, decision).explain()


def test_a_plan_outside_its_space_is_passed_over(home):
    answer = answer_of(DEMO, chunk_size=7)
    store(home, answer)
    decision = decide(DEMO, CPU)
    assert decision.source == "default" and "chunk_size" in decision.refused[0]


def test_answers_are_read_once(home):
    assert decide(DEMO, CPU).source == "default"
    with st.TuningDatabase(home) as database:
        database.put_answer(answer_of(DEMO))
    assert decide(DEMO, CPU).source == "default"
    clear_cache()
    assert decide(DEMO, CPU).source == "exact"


def test_a_damaged_database_is_an_error(home):
    home.write_bytes(b"no database" * 100)
    with pytest.raises(DatabaseError):
        decide(DEMO, CPU)


@pytest.mark.parametrize(("rule", "states"), [("gdn", "recompute"), ("gdn", "store"), ("gla", "store")])
def test_training_plans_narrow_to_inference(rule, states):
    problem = Problem(rule=rule, seq_len=512, num_heads=2, head_dim=64)
    plan = default_plan(problem, HOPPER, outer=default_plan(problem, HOPPER).outer.replace(states=states))
    plan = dataclasses.replace(plan, outer=plan.outer.replace(state_dtype="fp32"))
    forward = problem.replace(direction="fwd")
    narrowed = narrow(plan, forward)
    validate_plan(narrowed, forward, HOPPER)
    stages = {"gdn": {"prepare", "scan"}, "gla": {"decay_rows", "states", "output"}}
    assert set(narrowed.stages) == {"routing", "combine", *stages[rule]}
    assert narrowed.outer["states"] == ("store" if rule == "gla" else "recompute")
    assert narrow(plan, problem) is plan


def test_explain_says_it_all(home):
    store(home, answer_of(DEMO))
    text = st.load_best(DEMO).explain()
    config = ("torch:whole", "chunk_size=32")
    for part in ("gdn fp32", DEMO.bucket.name, CPU.name, "exact", "0.100 ms", "1.50 times", *config):
        assert part in text
    assert "not of this one" in st.load_best(DEMO.replace(seq_len=4096)).explain()
    assert "always-on stream alone" in st.load_best(DEMO.replace(num_partitions=0, top_k=0, read_k=0)).explain()


def test_the_op_runs_the_answer(home, monkeypatch):
    case = make_case("gdn", seq_len=40)
    problem = Problem(rule="gdn", batch=2, seq_len=40, num_heads=2, head_dim=8, head_dim_v=12, num_partitions=3,
                      norm="after", dtype="fp32", direction="fwd")  # fmt: skip
    store(home, answer_of(problem, 16))
    used = []

    def whole(plan, *rest):
        used.append(plan)
        return case["v"], None

    monkeypatch.setattr("sse_tune.runtime.whole_graph.whole", whole)
    st.sse_attention(**case)
    assert used[0].stages["whole"].config["chunk_size"] == 16


def test_a_kernel_is_the_op_with_its_plan():
    case = make_case("gdn", state=True)
    problem = Problem(rule="gdn", batch=2, seq_len=11, num_heads=2, head_dim=8, head_dim_v=12, num_partitions=3,
                      norm="after", dtype="fp32")  # fmt: skip
    kernel = st.load_best(problem)
    assert_close(with_gradients(kernel, case), exact(case))
    longer = make_case("gdn", seq_len=20)
    torch.testing.assert_close(kernel(**longer)[0], st.sse_attention(**longer)[0])
    with pytest.raises(ProblemError, match="num_heads=3 instead of 2"):
        kernel(**make_case("gdn", heads=3))
    with pytest.raises(ProblemError, match="direction 'fwd' has no backward pass"):
        with_gradients(st.load_best(problem.replace(direction="fwd")), case)
    elsewhere = st.Kernel(problem, HOPPER, decide(problem, CPU))
    with pytest.raises(ProblemError, match="the device it was loaded for"):
        elsewhere(**case)


def test_devices_have_names():
    assert device_of(None).kind in ("cpu", "cuda") and device_of("cpu") == device_of(CPU) == CPU
    assert device_of("sm_90") is HOPPER
    for wrong in ("sm_12", "nonsense", "meta"):
        with pytest.raises(DeviceError):
            device_of(wrong)


@pytest.mark.parametrize("rule", ["gla", "gdn"])
@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("choice", ["states", "split"])
def test_answers_of_a_version_with_other_outer_choices_are_refused_with_the_reason(rule, direction, choice, home):
    """Their templates may be the same as today's: then nothing but the plan says that they do not fit."""
    trained = Problem(rule=rule, seq_len=512, num_heads=2, head_dim=64)
    plan = default_plan(trained, HOPPER)
    older = dataclasses.replace(plan, outer=Config({k: v for k, v in plan.outer.items() if k != choice}))
    store(home, Answer(
        bucket=trained.bucket.name, device=HOPPER.slug, arch=HOPPER.arch, toolchain=toolchain_of(older, toolchain()),
        sources=sources_of(older), problem=trained.to_dict(), plan=older, time_us=100.0, default_time_us=150.0,
    ))  # fmt: skip
    decision = decide(trained.replace(direction=direction), HOPPER)
    assert decision.source == "default"
    assert choice in decision.refused[0]
