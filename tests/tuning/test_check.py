"""Admission finds what is wrong: every planted fault turns a case red, and a right kernel passes them all."""

import pytest
import torch

from sse_tune.device import ARCHS
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.space import Config
from sse_tune.templates.registry import default_plan
from sse_tune.tuning import check as admission
from sse_tune.tuning import inputs
from sse_tune.tuning.cases import CASES, FINAL, OWN, QUICK, case_names, case_problem
from sse_tune.tuning.check import check_plan, chunk_size_of, run_case
from sse_tune.tuning.inputs import build

NAMES = ("ordinary", "lengths")


def problem_of(rule, dtype="fp32", norm="after", **changes):
    fields = dict(rule=rule, seq_len=256, num_heads=2, head_dim=16, head_dim_v=24, norm=norm, dtype=dtype)
    return Problem(**{**fields, **changes})


def whole_plan(problem, device, **changes):
    plan = default_plan(problem, device, "torch")
    choice = plan.stages["whole"]
    config = choice.config.replace(chunk_size=16, **changes)
    return Plan(plan.graph, plan.outer, {"whole": type(choice)(choice.backend, choice.template, config)})


@pytest.mark.parametrize("sequences", [1, 2, 3, 50])
@pytest.mark.parametrize("scale", ["tiny", "full"])
def test_the_ordinary_case_of_packed_sequences_has_some(sequences, scale):
    problem = problem_of("gdn", num_sequences=sequences)
    for chunk_size in (16, 64, 128):
        posed, lengths = case_problem("ordinary", problem, chunk_size, scale)
        assert min(lengths) > 0
        assert (sum(lengths), len(lengths)) == (posed.seq_len, posed.num_sequences)


@pytest.mark.parametrize("rule", ["gdn", "gla"])
@pytest.mark.parametrize(("dtype", "norm"), [("fp32", "after"), ("bf16", "before"), ("fp16", "none")])
def test_torch_backend_passes_every_hazard(rule, dtype, norm, cpu):
    problem = problem_of(rule, dtype, norm)
    report = check_plan(whole_plan(problem, cpu), problem, cpu, scale="tiny", stop_early=False)
    assert report.passed, report.reason
    assert {case.name for case in report.cases} == set(case_names(problem, quick=False, scale="tiny"))
    assert all(case.outcome == "ok" for case in report.cases)
    gradients = {"d_q", "d_k", "d_v", "d_g", "d_router_logits", "d_initial_state", "d_shared_q"}
    assert gradients <= set(report.errors)


def faulty(change):
    """A run that does everything right, and then one thing wrong."""

    def run(plan, case):
        results, chosen = run_case(plan, case)
        results = {name: x.clone() for name, x in results.items()}
        changed = change(results, case)
        return results, chosen if changed is None else changed

    return run


def last_row_unwritten(name):
    def change(results, case):
        results[name][-1] = float("nan")

    return change


def last_row_missing(name):
    def change(results, case):
        results[name][-1] = 0.0

    return change


def slightly_scaled(name):
    def change(results, case):
        results[name] *= 1.001

    return change


def one_state_stale(results, case):
    if "final_state" in results:
        results["final_state"][0, -1, -1] = case.inputs.initial_state[0, -1, -1] + 1


def other_choice(results, case):
    return torch.zeros(case.do.shape[0], case.problem.lanes, dtype=torch.int32)


def no_gradient(results, case):
    del results["d_beta"]


def bf16_tail_head(results, case):
    """One head of the last row of a short sequence: a thousandth of the tensor's norm."""
    results["d_v"][-1, -1] *= 1.5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (last_row_unwritten("o"), "o: "),
        (last_row_unwritten("d_g"), "d_g: "),
        (last_row_missing("d_k"), "d_k: "),
        (last_row_missing("d_shared_q"), "d_shared_q: "),
        (last_row_missing("d_router_logits"), "d_router_logits: "),
        (slightly_scaled("d_beta"), "d_beta: "),
        (slightly_scaled("d_router_logits"), "d_router_logits: "),
        (one_state_stale, "final_state: "),
        (other_choice, "chosen: "),
        (no_gradient, "no result for d_beta"),
        (bf16_tail_head, "d_v: "),
    ],
    ids=lambda value: getattr(value, "__qualname__", str(value)).split(".")[0],
)
def test_planted_fault_is_found(change, reason, cpu):
    problem = problem_of("gdn")
    report = check_plan(whole_plan(problem, cpu), problem, cpu, True, names=NAMES, run=faulty(change))
    assert not report.passed
    assert report.outcome == "wrong"
    assert reason in report.reason


def test_small_fault_in_one_segment_is_found_in_bf16(cpu):
    """The whole tensor is within its tolerance; the one segment is not, and is named."""
    problem = problem_of("gdn", "bf16", num_partitions=8)

    def change(results, case):
        results["o"][case.lengths[0] + case.lengths[1] :, 1] *= 0.97

    report = check_plan(
        whole_plan(problem, cpu), problem, cpu, True, names=("equal_logits",), run=faulty(change)
    )
    assert report.outcome == "wrong"
    assert "in sequence 2" in report.reason
    assert report.errors["o"] < 8e-3


def test_bits_that_change_on_a_repeat_are_found(cpu):
    problem = problem_of("gdn")
    calls = []

    def change(results, case):
        calls.append(case.name)
        results["d_q"][0, 0, 0] += 1e-9 * len(calls)

    report = check_plan(whole_plan(problem, cpu), problem, cpu, True, names=NAMES, run=faulty(change))
    assert report.outcome == "wrong"
    assert "other bits on a repeat" in report.reason


@pytest.mark.parametrize(
    ("error", "outcome", "is_poisoned"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "crash", True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "out_of_memory", False),
        (MemoryError(), "out_of_memory", False),
        (ValueError("a bug"), "crash", False),
    ],
)
def test_failures_are_outcomes(error, outcome, is_poisoned, cpu):
    def run(plan, case):
        raise error

    problem = problem_of("gdn")
    report = check_plan(whole_plan(problem, cpu), problem, cpu, True, run=run)
    assert (report.outcome, report.poisoned) == (outcome, is_poisoned)
    assert len(report.cases) == 1


def test_cases_a_plan_cannot_run_are_not_passed(cpu):
    problem = problem_of("gla")
    plan = whole_plan(problem, cpu)
    broken = Plan(plan.graph, plan.outer, {
        "whole": type(plan.stages["whole"])("torch", "whole", plan.stages["whole"].config.replace(sub_block=3))
    })  # fmt: skip
    report = check_plan(broken, problem, cpu, True)
    assert not report.passed
    assert report.outcome == "rejected"
    assert all(case.outcome == "not_applicable" for case in report.cases)
    assert "sub_block" in report.reason


def test_forward_problems_have_no_gradients(cpu):
    problem = problem_of("gdn", direction="fwd")
    report = check_plan(whole_plan(problem, cpu), problem, cpu, True)
    assert report.passed, report.reason
    assert set(report.errors) == {"o", "final_state"}


@pytest.mark.parametrize("name", [name for name, hazard in CASES.items() if hazard.needs == "tiny"])
def test_tiny_cases_are_tiny_and_repeatable(name):
    problem = Problem.preset("spikingbrain2-5b")
    case = build(name, problem, 16, "cpu", "tiny")
    assert case.problem.batch * case.problem.seq_len <= 64
    assert case.problem.num_heads <= 2
    assert case.problem.key_dim <= 32
    assert sum(case.lengths) == case.problem.batch * case.problem.seq_len
    again = inputs._make(name, problem, 16, "cpu", "tiny")
    for tensor, other in zip(case.inputs.present().values(), again.inputs.present().values(), strict=True):
        assert torch.equal(tensor, other)


def test_case_sets_are_known():
    assert {*QUICK, *OWN} <= set(FINAL) <= set(CASES)
    assert all(not CASES[name].changes for name in FINAL), "a final case must not ask for more compilation"


@pytest.mark.parametrize("sequences", [None, 5])
def test_the_cases_of_stages_run_what_is_compiled_for_the_ordinary_one(sequences):
    problem = Problem.preset("spikingbrain2-5b", seq_len=8192, num_sequences=sequences)
    assert len({case_problem(name, problem, 64, "full") for name in OWN}) == 1
    assert len({CASES[name].states for name in OWN}) == 1
    assert case_problem(OWN[0], problem, 64, "full")[0].num_heads == problem.num_heads
    assert case_problem("gates", problem, 64, "full")[0].num_heads == 2


def test_poison_is_seen_by_every_dtype():
    assert admission.poisoned((2,), dtype=torch.bfloat16, device=torch.device("cpu")).isnan().all()
    assert (admission.poisoned((2,), dtype=torch.int32, device=torch.device("cpu")) < 0).all()
    assert Config() == Config()


def test_plans_that_split_segments_meet_the_ends_of_groups():
    gpu = ARCHS["sm_90"]
    problem = Problem.preset("spikingbrain2-5b", num_heads=4)
    outer = default_plan(problem, gpu).outer
    whole, split = (chunk_size_of(default_plan(problem, gpu, "triton", outer.replace(split=n))) for n in (0, 16))
    assert (whole, split) == (64, 16 * 64)
    _, lengths = case_problem("lengths", problem, split, "full")
    assert {split - 1, split, split + 1, 2 * split - 1, 2 * split + 1} <= set(lengths)
