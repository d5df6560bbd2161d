"""The decomposed search on declared times: what it asks for, shares, gives up and puts together."""

import collections

import pytest

from sse_tune.device import ARCHS
from sse_tune.errors import ConstraintError
from sse_tune.problem import Problem
from sse_tune.tuning.candidates import Candidate, Known, Settings
from sse_tune.tuning.estimate import estimated_best_us
from sse_tune.tuning.landscape import Templates, other_defaults
from sse_tune.tuning.recorded import Recorded
from sse_tune.tuning.search import compiled_first
from sse_tune.tuning.strategy import Decomposed, WholePlans
from sse_tune.tuning.study import SpaceStudy
from sse_tune.tuning.workload import Workload
from tests.tuning.synthetic import DEVICE, OUTERS, PROBLEM, sweep, time_us


@pytest.fixture
def recorded():
    return Recorded(sweep())


def drive(strategy, answer, most=10_000):
    asked = []
    while len(asked) < most and (candidate := strategy.ask()) is not None:
        asked.append(candidate)
        strategy.tell(candidate, answer(candidate))
    return asked


def test_finds_the_best_plan_in_a_sum_of_trials(recorded):
    strategy = Decomposed(recorded, Settings(sampler="exhaustive"))
    asked = drive(strategy, recorded.answer_us)
    assert strategy.finished
    best = strategy.plans()[0]
    assert recorded.exact_us(best) == pytest.approx(recorded.best_us())
    assert asked[0] == Candidate("plan", recorded.base(None)), "the default is first"
    assert len(asked) < 450
    assert recorded.plans == 4 * 48**3
    assert len({(c.plan, c.stage) for c in asked}) == len(asked), "nothing twice"


def test_a_stage_is_tuned_once_for_all_outer_points_of_a_contract(recorded):
    asked = drive(Decomposed(recorded, Settings(sampler="exhaustive")), recorded.answer_us)
    counts = collections.Counter((c.stage, c.plan.outer["chunk_size"]) for c in asked if c.stage is not None)
    # a state's dtype is seen by gradients alone: two contracts a chunk size there, one elsewhere
    assert {counts["prepare", c] for c in (32, 64)} == {counts["scan", c] for c in (32, 64)} == {48}
    assert {counts["gradients", c] for c in (32, 64)} == {96}


def test_a_failed_base_closes_its_outer_point(recorded):
    def answer(candidate):
        return None if candidate.plan.outer["chunk_size"] == 64 else recorded.answer_us(candidate)

    strategy = Decomposed(recorded, Settings())
    asked = drive(strategy, answer)
    assert all(c.stage is None for c in asked if c.plan.outer["chunk_size"] == 64)
    assert strategy.plans()[0].outer == OUTERS[0]


def test_a_base_far_behind_is_not_tuned(recorded):
    def answer(candidate):
        time = recorded.answer_us(candidate)
        return 5 * time if time and candidate.plan.outer["chunk_size"] == 32 else time

    asked = drive(Decomposed(recorded, Settings()), answer)
    assert sum(c.plan.outer["chunk_size"] == 32 for c in asked) == 2, "the bases"


def test_stages_that_still_compile_are_asked_for_beside_one_that_is_timed(recorded):
    """A compiler may take long over the first config of a stage: others of it are to be compiled meanwhile."""
    strategy = Decomposed(recorded, Settings(sampler="random"))
    base = strategy.ask()
    strategy.tell(base, recorded.answer_us(base))
    counts = collections.Counter()
    for _ in range(15):
        candidate = strategy.ask()
        counts[candidate.stage] += 1
        if candidate.stage == "scan":
            strategy.tell(candidate, recorded.answer_us(candidate))
    assert set(counts) == {"prepare", "scan", "gradients"}
    assert min(counts.values()) >= 4


def test_what_is_not_admitted_together_grows_stage_by_stage(recorded):
    strategy = Decomposed(recorded, Settings(sampler="exhaustive", max_points=1))
    base = recorded.base(None)
    best_scan = min((c for c in recorded.slots("scan")[0].space.configs(recorded.problem, recorded.device, base.outer)
                     if recorded.exact_us(base.replace_stage("scan", recorded.slots("scan")[0].choice(c)), "scan")),
                    key=lambda c: time_us("scan", base.outer, c))  # fmt: skip

    def answer(candidate):
        if candidate.stage is None and candidate.plan.stages["scan"].config == best_scan:
            return None  # right alone, wrong in the whole
        return recorded.answer_us(candidate)

    drive(strategy, answer)
    best = strategy.plans()[0]
    assert best.stages["scan"] == base.stages["scan"]
    assert best.stages["prepare"] != base.stages["prepare"]
    assert best.stages["gradients"] != base.stages["gradients"]


def test_the_budget_used_puts_together_what_there_is(recorded):
    strategy = Decomposed(recorded, Settings(sampler="tpe"))
    drive(strategy, recorded.answer_us, most=40)
    pending = strategy.ask()
    assert pending.stage is not None
    strategy.stop()
    assert strategy.withdraw(pending)
    (last,) = drive(strategy, recorded.answer_us)
    assert last.stage is None
    assert strategy.finished
    assert recorded.exact_us(strategy.plans()[0]) < recorded.exact_us(recorded.base(None))


def test_a_better_measurement_decides_what_is_put_together(recorded):
    strategy = Decomposed(recorded, Settings(sampler="exhaustive", max_points=1))
    best = None

    def answer(candidate):
        nonlocal best
        time_us = recorded.answer_us(candidate)
        if candidate.stage == "scan" and time_us and (best is None or time_us < best[1]):
            best = candidate, time_us
        return time_us

    while (candidate := strategy.ask()) is not None and (candidate.stage is not None or best is None):
        strategy.tell(candidate, answer(candidate))
        if best is not None and best[0] == candidate:
            strategy.correct(candidate, 100 * best[1])
    assert candidate.plan.stages["scan"] != best[0].plan.stages["scan"]
    assert candidate.plan.stages["gradients"] != recorded.base(None).stages["gradients"]


def test_earlier_results_are_not_asked_for(recorded):
    first = drive(Decomposed(recorded, Settings(sampler="exhaustive")), recorded.answer_us)
    memory = {c.key(recorded.problem): recorded.answer_us(c) for c in first[:100]}

    def known(candidate):
        key = candidate.key(recorded.problem)
        return Known(memory[key]) if key in memory else None

    resumed = drive(Decomposed(recorded, Settings(sampler="exhaustive", known=known)), recorded.answer_us)
    stages = {c.key(recorded.problem) for c in resumed if c.stage is not None}
    assert not stages & set(memory)
    assert stages | set(memory) >= {c.key(recorded.problem) for c in first if c.stage is not None}


def test_known_answers_of_others_come_right_after_the_default(recorded):
    donor = Decomposed(recorded, Settings(sampler="exhaustive"))
    drive(donor, recorded.answer_us)
    best = donor.plans()[0]
    strategy = Decomposed(recorded, Settings(sampler="tpe"), [best])
    asked = drive(strategy, recorded.answer_us, most=12)
    assert [c.plan for c in asked[:2]] == [recorded.base(None), best]
    tried = {c.stage: [] for c in asked if c.stage}
    for c in asked:
        if c.stage:
            tried[c.stage].append(c.plan.stages[c.stage])
    assert all(best.stages[stage] in choices[:2] for stage, choices in tried.items())


def test_target_ends_the_tuning_early_and_keeps_its_word(recorded):
    everything = drive(Decomposed(recorded, Settings(sampler="tpe", max_points=1)), recorded.answer_us)
    strategy = Decomposed(recorded, Settings(sampler="tpe", max_points=1, target=1.03))
    asked = drive(strategy, recorded.answer_us)
    assert len(asked) < 0.6 * len(everything)
    assert recorded.exact_us(strategy.plans()[0]) <= 1.03 * recorded.best_us()


def test_auto_is_exhaustive_where_the_space_fits():
    assert Settings(room=lambda: 100).sampler_for(100) == "exhaustive"
    assert Settings(room=lambda: 99).sampler_for(100) == "tpe"
    assert Settings(sampler="gp", room=lambda: 99).sampler_for(10) == "gp"


def test_estimate_is_unknown_at_first_low_then_exact(recorded):
    outer, slot = recorded.base(None).outer, recorded.slots("scan")[0]
    study = SpaceStudy(slot.space, recorded.problem, recorded.device, outer, seed=1)
    best = min(row.time_us for space in recorded._at("scan", outer) for row in space.rows.values() if row.time_us)
    seen = []
    while (config := study.ask()) is not None:
        plan = recorded.base(None).replace_stage("scan", slot.choice(config))
        study.tell(config, recorded.exact_us(plan, "scan"))
        seen.append(estimated_best_us(study))
    assert seen[0] is None
    assert seen[-1] == best
    assert all(estimate <= study.ranking()[-1][1] for estimate in seen if estimate is not None)
    first = next(estimate for estimate in seen if estimate is not None)
    assert first == pytest.approx(best, rel=0.05), "these effects add up"


def test_outer_points_end_with_their_share_of_the_budget(recorded):
    used = [0.0]

    def answer(candidate):
        used[0] += 1 / 200
        return recorded.answer_us(candidate)

    strategy = Decomposed(recorded, Settings(sampler="exhaustive", max_points=4, used=lambda: used[0]))
    asked = drive(strategy, answer)
    assert {c.plan.outer for c in asked} == set(OUTERS)
    assert sum(c.plan.outer == asked[0].plan.outer for c in asked) <= 53


def test_whole_plans_withdraw(small, cpu):
    from sse_tune.tuning.landscape import Templates

    strategy = WholePlans(Templates(small, cpu, ("torch",)), Settings())
    asked = strategy.ask()
    strategy.stop()
    assert strategy.withdraw(asked)
    assert strategy.ask() is None
    assert strategy.plans() == []


def test_what_the_tuning_of_stages_begins_with_is_known_beforehand():
    problem, device = Problem.preset("spikingbrain2-5b"), ARCHS["sm_90"]
    landscape = Templates(problem, device, ("triton", "tilelang"))
    base = landscape.base(None)
    found = other_defaults(landscape, base)
    of_triton = [stage for stage, choice in found if choice.backend == "triton"]
    assert of_triton == ["routing"] and len(found) > 1
    assert {stage for stage, _ in found} == {stage for stage in base.stages if len(landscape.slots(stage)) > 1}
    strategy = Decomposed(landscape, Settings())
    strategy.tell(strategy.ask(), 1000.0)
    count = sum(len(landscape.slots(stage)) for stage in base.stages)
    asked = [candidate for _ in range(count + 1) if (candidate := strategy.ask()).stage is not None]
    assert len(asked) == count, "all but the base of the point beside it"
    begins = {(candidate.stage, candidate.plan.stages[candidate.stage]) for candidate in asked}
    assert begins == {*found, *base.stages.items()}


def test_other_templates_are_compiled_beside_the_nearest_known_plan_first():
    """Its outer point is tuned first. What is new would come to it late, if at all, for waiting for compilers."""
    problem, device, backends = Problem.preset("spikingbrain2-5b"), ARCHS["sm_90"], ("triton", "tilelang")
    landscape = Templates(problem, device, backends)
    default = landscape.base(None)
    near = landscape.base(default.outer.replace(states="store"))
    far = landscape.base(default.outer.replace(state_dtype="fp32"))
    found = compiled_first(Workload.of(problem), device, default, [near, far], backends)
    assert found[:3] == [Candidate("plan", plan) for plan in (default, near, far)]
    bases = [candidate.base for candidate in found[3:]]
    assert bases == sorted(bases, key=[near, default].index), "and none beside the plan further off"
    scans = {candidate.plan.stages["scan"].template for candidate in found if candidate.base == near}
    assert scans >= {"gdn_scan", "gdn_scan_specialized", "gdn_scan_transposed"}
    assert {candidate.plan.outer for candidate in found if candidate.base == near} == {near.outer}
    alone = compiled_first(Workload.of(problem), device, default, [], backends)
    assert alone == [found[0], *(candidate for candidate in found[3:] if candidate.base == default)]


@pytest.mark.parametrize("seed", range(3))
def test_kept_states_are_tried_right_after_the_default(seed):
    """GDN's default walks twice. That one walk falls away is a choice among many, of which four are tried."""
    landscape = Templates(PROBLEM, DEVICE, ("triton",))
    default = landscape.base(None).outer
    strategy = Decomposed(landscape, Settings(sampler="random", seed=seed))
    asked = drive(strategy, lambda candidate: None)  # nothing is admitted, so that every point ends with its base
    assert [candidate.plan.outer for candidate in asked[:2]] == [default, default.replace(states="store")]
    assert "recompute" in asked[0].plan.stages and "recompute" not in asked[1].plan.stages
    assert len({candidate.plan.outer for candidate in asked}) == 4


@pytest.mark.parametrize(
    ("changes", "promising"),
    [
        (dict(), dict(states="store")),
        (dict(direction="fwd"), None),  # C = 16 is predicted to be faster, by a model that knows no tensor cores
        (dict(seq_len=131072, num_heads=4), dict(states="store", split=128)),
        (dict(rule="gla", norm="none"), dict(states="joint")),
    ],
    ids=str,
)
def test_what_the_roofline_puts_first_has_other_stages(changes, promising):
    landscape = Templates(PROBLEM.replace(**changes), DEVICE, ("triton",))
    default = landscape.base(None).outer
    assert landscape.promising() == (default.replace(**promising) if promising else None)


def test_two_points_are_tuned_side_by_side_each_stage_that_they_share_once():
    landscape = Templates(PROBLEM, DEVICE, ("triton",))
    times = {}

    def answer(candidate):
        return times.setdefault((candidate.stage, candidate.plan), 1000.0 - len(times) / 1e3)

    settings = Settings(sampler="random", max_points=2, max_stage_trials=2)
    asked = drive(Decomposed(landscape, settings), answer)
    tuned = collections.Counter((c.stage, c.plan.outer["states"]) for c in asked if c.stage is not None)
    assert tuned["scan", "recompute"] == tuned["scan", "store"] == tuned["recompute", "recompute"] == 2
    for stage in ("prepare", "state_gradient", "score_gradients", "gradients", "combine"):
        assert tuned[stage, "recompute"] + tuned[stage, "store"] == 2
    turns = [c.plan.outer["states"] for c in asked if c.stage is not None]
    assert "recompute" in turns[turns.index("store") :], "they take turns"


def test_what_was_rehearsed_fastest_is_put_together(recorded):
    """Two configs of a stage that its own times hardly tell apart: the whole decides."""
    by_stages = drive(Decomposed(recorded, Settings(sampler="exhaustive", max_points=1)), recorded.answer_us)[-1].plan
    strategy = Decomposed(recorded, Settings(sampler="exhaustive", max_points=1))
    assert strategy.rehearse() is None, "no stage was timed"
    rehearsed = []
    while (asked := strategy.ask()).stage is not None or not strategy.plan_times:
        strategy.tell(asked, recorded.answer_us(asked))
        while (plan := strategy.rehearse()) is not None:
            rehearsed.append(plan)
            strategy.rehearsed(plan, 1000.0 - len(rehearsed))  # the last one is the fastest
    assert len(rehearsed) > 3 and len(set(rehearsed)) == len(rehearsed)
    assert asked.plan == rehearsed[-1] != by_stages
    strategy.stop()
    assert strategy.rehearse() is None


def test_a_faster_plan_rehearsed_while_another_is_compiled_is_asked_for_too(recorded):
    strategy = Decomposed(recorded, Settings(sampler="exhaustive", max_points=1))
    while (asked := strategy.ask()).stage is not None or not strategy.plan_times:
        strategy.tell(asked, recorded.answer_us(asked))
    strategy.rehearsed(asked.plan, 100.0)
    other = strategy.rehearse()
    assert not strategy.finished and strategy.ask() is None
    strategy.rehearsed(other, 90.0)
    strategy.tell(asked, 101.0)
    assert strategy.ask() == Candidate("plan", other)
    strategy.tell(Candidate("plan", other), None)  # not admitted: the first stands
    assert strategy.ask() is None and strategy.finished
    assert strategy.plans()[0] == asked.plan


@pytest.mark.parametrize(("direction", "points"), [("fwd+bwd", 2), ("fwd", 1)])
def test_the_most_promising_point_is_opened_however_little_time_is_left(direction, points):
    landscape = Templates(PROBLEM.replace(direction=direction), DEVICE, ("triton",))
    assert (landscape.promising() is None) == (points == 1)
    settings = Settings(sampler="random", max_points=1, max_stage_trials=1)
    asked = drive(Decomposed(landscape, settings), lambda candidate: 1000.0)
    assert len({candidate.plan.outer for candidate in asked}) == points


def test_where_the_most_promising_point_is_refused_the_next_one_takes_its_place():
    """A plain stream's: segments split, which rounds once more, then states kept and segments whole."""
    plain = PROBLEM.replace(seq_len=32768, num_heads=32, num_partitions=0, top_k=0, read_k=0)
    landscape = Templates(plain, DEVICE, ("triton",))
    first = landscape.promising()
    second = landscape.promising([first])
    third = landscape.promising([first, second])
    assert first["split"] and second["split"] and not third["split"] and third["states"] == "store"
    settings = Settings(sampler="random", max_points=1, max_stage_trials=1)
    asked = drive(
        Decomposed(landscape, settings), lambda candidate: None if candidate.plan.outer["split"] else 1000.0
    )
    opened = [landscape.base(None).outer, first, second, third]
    assert list(dict.fromkeys(candidate.plan.outer for candidate in asked)) == opened
    refused = drive(Decomposed(landscape, settings), lambda candidate: None)
    assert len({candidate.plan.outer for candidate in refused}) < 10, "not all there are"


def test_the_next_point_is_begun_while_a_plan_that_was_put_together_is_compiled(recorded):
    strategy = Decomposed(recorded, Settings(sampler="exhaustive", max_points=2))
    while (asked := strategy.ask()).stage is not None or not strategy.plan_times:
        strategy.tell(asked, recorded.answer_us(asked))
    base = strategy.ask()
    assert base.stage is None and base.plan == recorded.base(base.plan.outer) and base.plan.outer != asked.plan.outer
    strategy.tell(base, recorded.answer_us(base))
    stage = strategy.ask()
    assert stage.base == base.plan
    strategy.tell(asked, None)  # not admitted: it grows from its own base, beside what is tuned now
    grown = strategy.ask()
    assert grown.stage is None and grown.plan.outer == asked.plan.outer
    strategy.tell(stage, recorded.answer_us(stage))
    strategy.stop()
    rest = drive(strategy, recorded.answer_us)
    assert strategy.tell(grown, recorded.answer_us(grown)) is None and not strategy.finished
    rest += drive(strategy, recorded.answer_us)
    assert strategy.finished
    assert {candidate.plan.outer for candidate in rest} == {asked.plan.outer, base.plan.outer}
    assert all(candidate.stage is None for candidate in rest)


def test_a_known_plan_that_was_admitted_is_the_base_of_its_point():
    """The default plan there may not be admitted, or be far from it."""
    landscape = Templates(PROBLEM, DEVICE, ("triton",))
    outer = landscape.promising()
    known = landscape.base(outer).replace_stage(*tuned_stage(landscape, outer))

    def answer(candidate):
        if candidate.kind == "plan" and candidate.plan.outer == outer and candidate.plan != known:
            return None
        return 500.0 if candidate.plan == known else 1000.0

    settings = Settings(sampler="random", max_points=2, max_stage_trials=2)
    strategy = Decomposed(landscape, settings, [known])
    asked = drive(strategy, answer)
    there = [candidate for candidate in asked if candidate.plan.outer == outer]
    assert there[0] == Candidate("plan", known) and there.count(there[0]) == 1, "it is not asked for again"
    assert {candidate.base for candidate in there if candidate.stage is not None} == {known}
    assert strategy.best_base_us == 1000.0, "what is tuned says nothing of how far a default may be behind"


def tuned_stage(landscape, outer):
    """Another config than the default of some stage."""
    slot = landscape.slots("scan")[0]
    default = slot.space.default(landscape.problem, landscape.device, outer)
    configs = slot.space.configs(landscape.problem, landscape.device, outer)
    return "scan", slot.choice(next(config for config in configs if config != default))


def test_the_point_of_a_known_plan_comes_before_what_the_roofline_promises():
    """However little time is left: of the points that are tuned side by side it is the second."""
    landscape = Templates(PROBLEM, DEVICE, ("triton",))
    default, promising = landscape.base(None).outer, landscape.promising()
    configs = landscape.outer.configs(landscape.problem, landscape.device)
    other = next(outer for outer in configs if outer not in (default, promising) and runs_at(landscape, outer))
    known = landscape.base(other)
    settings = Settings(sampler="random", max_points=1, max_stage_trials=1)
    asked = drive(Decomposed(landscape, settings, [known]), lambda candidate: 1000.0)
    assert {candidate.plan.outer for candidate in asked} == {default, other}
    alone = drive(Decomposed(landscape, settings), lambda candidate: 1000.0)
    assert {candidate.plan.outer for candidate in alone} == {default, promising}


def runs_at(landscape, outer):
    try:
        return bool(landscape.base(outer))
    except ConstraintError:
        return False
