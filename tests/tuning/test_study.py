"""Proposals over a space: default first, nothing twice, nothing invalid, told from stored results."""

import pytest
from optuna.trial import TrialState

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.tuning.study import SpaceStudy

PROBLEM = Problem(rule="gdn", seq_len=64, num_heads=2, head_dim=16)
SPACE = Space(
    params=(
        Param("block", (16, 32, 64, 128, 256), 64, "rows"),
        Param("warps", (1, 2, 4, 8), 4, "warps"),
        Param("method", ("a", "b"), "a", "how"),
    ),
    constraints=(Constraint("block * warps <= 1024", lambda p, c, d: c["block"] * c["warps"] <= 1024),),
)


def time_of(config):
    return 100 + abs(config["block"] - 128) + 10 * abs(config["warps"] - 2) + (5 if config["method"] == "a" else 0)


def run_study(study, most=1000):
    asked = []
    while len(asked) < most and (config := study.ask()) is not None:
        asked.append(config)
        study.tell(config, time_of(config))
    return asked


def test_every_valid_config_once_and_the_default_first(cpu):
    rejected = []
    study = SpaceStudy(SPACE, PROBLEM, cpu, on_rejected=lambda config, reason: rejected.append((config, reason)))
    asked = run_study(study)
    assert asked[0] == Config(block=64, warps=4, method="a")
    assert len(asked) == len(set(asked))
    assert set(asked) == set(SPACE.configs(PROBLEM, cpu))
    assert study.ask() is None
    assert study.best[0] == Config(block=128, warps=2, method="b")
    assert rejected
    assert len(rejected) == len({config for config, _ in rejected})
    assert all("block * warps <= 1024" in reason for _, reason in rejected)


def test_same_seed_same_proposals(cpu):
    first, second = (run_study(SpaceStudy(SPACE, PROBLEM, cpu, seed=3), most=15) for _ in range(2))
    assert first == second


def test_replayed_results_are_not_asked_again(cpu):
    done = run_study(SpaceStudy(SPACE, PROBLEM, cpu), most=12)
    resumed = SpaceStudy(SPACE, PROBLEM, cpu)
    for number, config in enumerate(done):
        resumed.tell(config, None if number % 4 == 3 else time_of(config))
    rest = run_study(resumed)
    assert not set(done) & set(rest)
    assert set(done) | set(rest) == set(SPACE.configs(PROBLEM, cpu))


def test_failed_configs_never_rank(cpu):
    study = SpaceStudy(SPACE, PROBLEM, cpu)
    config = study.ask()
    study.tell(config, None)
    assert study.best is None
    assert study.told == {config: None}


def test_enqueued_comes_next(cpu):
    study = SpaceStudy(SPACE, PROBLEM, cpu)
    wanted = Config(block=16, warps=1, method="b")
    study.enqueue(wanted)
    assert study.ask() == wanted


def test_known_good_configs_come_after_the_default(cpu):
    good, broken = Config(block=16, warps=1, method="b"), Config(block=256, warps=8, method="a")
    study = SpaceStudy(SPACE, PROBLEM, cpu, first=(good, broken))
    assert [study.ask() for _ in range(2)] == [Config(block=64, warps=4, method="a"), good]
    assert broken not in run_study(study)


def test_exhaustive_goes_outward_from_the_default(cpu):
    asked = run_study(SpaceStudy(SPACE, PROBLEM, cpu, sampler="exhaustive"))
    assert tuple(asked) == SPACE.by_nearness(PROBLEM, cpu)


def test_broken_rules_are_told_as_such(cpu):
    study = SpaceStudy(SPACE, PROBLEM, cpu)
    run_study(study)
    for trial in study._study.get_trials(states=(TrialState.COMPLETE,)):
        broken = 2 ** trial.params["block"] * 2 ** trial.params["warps"] > 1024
        assert trial.constraints == {"constraints": float(broken)}


def test_proposals_that_are_out_at_once_differ(cpu):
    study = SpaceStudy(SPACE, PROBLEM, cpu)
    asked = [study.ask() for _ in range(20)]
    assert len(set(asked)) == 20
    for config in asked:
        study.tell(config, time_of(config))
    assert study.best[1] == min(map(time_of, asked))


@pytest.mark.parametrize("seed", range(5))
def test_finds_good_configs_early(cpu, seed):
    study = SpaceStudy(SPACE, PROBLEM, cpu, seed=seed)
    run_study(study, most=16)
    assert study.best[1] <= 130
