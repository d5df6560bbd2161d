"""Proposals over a space: default first, nothing twice, nothing invalid, told from stored results."""

import pytest

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
    return abs(config["block"] - 128) + 10 * abs(config["warps"] - 2) + (5 if config["method"] == "a" else 0)


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
    assert study.knows(config)


def test_enqueued_comes_next(cpu):
    study = SpaceStudy(SPACE, PROBLEM, cpu)
    wanted = Config(block=16, warps=1, method="b")
    study.enqueue(wanted)
    assert [study.ask(), study.ask()][1] == wanted


@pytest.mark.parametrize("seed", range(5))
def test_finds_good_configs_early(cpu, seed):
    study = SpaceStudy(SPACE, PROBLEM, cpu, seed=seed)
    run_study(study, most=16)
    assert study.best[1] <= 30
