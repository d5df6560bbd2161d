"""A check in several processes tells what one process tells, in its order; a lost worker costs one case."""

import collections

import pytest

from sse_tune.cli_check import DEFAULT, Subject, subjects_of
from sse_tune.device import ARCHS
from sse_tune.problem import Problem
from sse_tune.templates.registry import default_plan
from sse_tune.tuning import check_shares
from sse_tune.tuning.check import CAPTURE, check_plan, names_of
from sse_tune.tuning.check_shares import Share, Task, check_in_shares
from sse_tune.tuning.lanes import Lanes
from sse_tune.tuning.worker import JobResult, Worker

HOPPER = ARCHS["sm_90"]


def task_of(device, rule="gdn", **changes):
    problem = Problem(rule=rule, seq_len=64, num_heads=2, head_dim=16, norm="after", dtype="fp32").replace(**changes)
    return Task(default_plan(problem, device, "torch"), problem, "torch")


@pytest.fixture
def lanes():
    workers = Lanes([Worker(threads=1) for _ in range(2)])
    yield workers
    workers.close()


def test_two_processes_find_what_one_finds_in_its_order(lanes, cpu):
    tasks = [task_of(cpu), task_of(cpu, "gla")]
    names = ("ordinary", "gates", "batch", "no_decay")
    told = []
    reports = check_in_shares(tasks, cpu, lanes, names=names, on_case=lambda *found: told.append(found))
    for number, task in enumerate(tasks):
        alone = check_plan(task.plan, task.problem, cpu, names=names, stop_early=False, plan_for=task.plan_for(cpu))
        assert alone.passed
        assert reports[number] == alone
    assert told == [(number, result) for number, report in enumerate(reports) for result in report.cases]


def test_a_lost_worker_costs_the_case_that_killed_it(lanes, cpu, planted):
    names = ("ordinary", "gates", "silu_keys", "no_decay", "full_decay", "batch")
    told = []
    (report,) = check_in_shares(
        [task_of(cpu)], cpu, lanes, names=names, job=planted.share,
        on_case=lambda number, result: told.append((result.name, result.outcome)),
    )  # fmt: skip
    assert told == [
        ("ordinary", "ok"), ("gates", "crash"), ("silu_keys", "ok"), ("no_decay", "crash"), ("full_decay", "ok"),
        ("batch", "ok"),
    ]  # fmt: skip
    assert [case.name for case in report.cases] == list(names)
    reasons = {case.name: case.reason for case in report.cases}
    assert "SIGSEGV" in reasons["gates"]
    assert reasons["no_decay"] == "planted"
    assert len({case.errors["pid"] for case in report.cases if case.outcome == "ok"}) > 1


def test_a_default_is_that_of_each_case_and_a_tuned_plan_is_itself(cpu):
    problem = Problem.preset("sse-gla-128")
    plan = default_plan(problem, HOPPER, "triton")
    default = Subject("triton", DEFAULT, problem, plan).task
    tuned = Subject("triton", "tuned h16", problem, plan, is_tuned=True).task
    forward = problem.replace(direction="fwd")
    assert default.plan_for(HOPPER)(forward) == default_plan(forward, HOPPER, "triton") != plan
    assert tuned.plan_for(HOPPER) is None


def test_a_template_that_is_no_default_is_checked_in_the_default_of_each_case():
    """Or it would be left out where the sizes ask for other stages, or for another template beside it."""
    subjects = list(subjects_of(("gdn",), ("bf16",), ("tilelang",), HOPPER, None))
    task = next(subject.task for subject in subjects if subject.plan_of == "gdn_scan_specialized")
    assert task.plan.stages["scan"].template == "gdn_scan_specialized"
    for sizes in ({"num_partitions": 0, "top_k": 0, "read_k": None}, {"num_sequences": 20000, "seq_len": 40000}):
        posed = task.problem.replace(**sizes)
        plan, default = task.plan_for(HOPPER)(posed), default_plan(posed, HOPPER, "tilelang")
        assert default.stages.get("routing") != task.plan.stages["routing"] or "combine" not in default.stages
        assert plan == default.replace_stage("scan", task.plan.stages["scan"])


def test_a_share_has_the_cases_of_one_plan_and_of_equal_sizes(cpu):
    plain, other = task_of(cpu, num_partitions=0, top_k=0, read_k=0), task_of(cpu)
    order = [(0, "gates"), (0, "batch"), (0, "no_decay"), (0, "equal_logits"), (1, "no_decay"), (0, CAPTURE)]
    found = check_shares._shares([plain, other], order, "full")
    # a hazard of the router gives a plain problem one, and so other sizes
    assert found == [
        Share(0, ("gates", "no_decay", CAPTURE)), Share(0, ("batch",)), Share(0, ("equal_logits",)),
        Share(1, ("no_decay",)),
    ]  # fmt: skip


def test_of_large_cases_one_runs_at_a_time_beside_small_ones():
    large, larger, small = Share(0, ("crowded",)), Share(1, ("far_offsets",)), Share(1, ("gates", CAPTURE))
    waiting = collections.deque([large, larger, small])
    assert check_shares._next(waiting, []) == large
    assert check_shares._next(waiting, [large]) == small
    assert check_shares._next(waiting, [large, small]) is None
    assert check_shares._next(waiting, [small]) == larger
    assert not waiting


def test_a_case_that_times_out_alone_is_reported_and_others_run_again_alone():
    late = JobResult("timeout", None, "no answer within 600 s", 600.0)
    assert check_shares._read(Share(3, ("gates", "batch")), late) == ([], [Share(3, ("gates",)), Share(3, ("batch",))])
    results, rest = check_shares._read(Share(3, ("gates",)), late)
    assert [(result.name, result.outcome, result.reason) for result in results] == [("gates", "timeout", late.reason)]
    assert rest == []


@pytest.mark.parametrize("quick", [False, True])
def test_staged_plans_on_a_gpu_are_replayed_from_a_graph_last(quick):
    problem = Problem.preset("sse-gla-128")
    names = names_of(default_plan(problem, HOPPER, "triton"), problem, HOPPER, quick=quick, scale="full")
    assert (names[-1] == CAPTURE) is not quick
    assert CAPTURE not in names[:-1]
    assert CAPTURE not in names_of(default_plan(problem, HOPPER, "torch"), problem, HOPPER, scale="full")
