"""The floor: sums of bytes and FLOPs at given rates, and rates that a machine can have."""

import dataclasses

import pytest

from sse_tune.bench.roofline import measure_ceilings
from sse_tune.device import Device
from sse_tune.problem import Problem
from sse_tune.space import Config
from sse_tune.templates.roofline import DATA_CENTRE, Ceilings, call_bytes, floor_of
from sse_tune.templates.stages import stages_of

H200 = Ceilings(copy_bytes_per_s=4.26e12, matmul_flops_per_s=680e12)


OUTER = Config(chunk_size=64, state_dtype="io", states="recompute", split=0)


def floor(problem, ceilings=H200, **outer):
    return floor_of(problem, Device.from_arch("sm_90"), ceilings, OUTER.replace(**outer))


def test_each_stage_takes_the_longer_of_memory_and_compute():
    problem = Problem.preset("spikingbrain2-5b")
    found = floor(problem)
    assert [stage.name for stage in found.stages] == [stage.name for stage in stages_of(problem, OUTER)]
    for stage in found.stages:
        assert stage.time_us == max(stage.memory_us, stage.compute_us, stage.walk_us)
        assert stage.memory_us == pytest.approx(1e6 * stage.bytes / 4.26e12)
    assert found.time_us == pytest.approx(sum(stage.time_us for stage in found.stages))


def test_the_staged_floor_lies_above_the_fused_one():
    for preset in ("spikingbrain2-5b", "sse-gla", "sse-gdn", "sse-gla-128"):
        for direction in ("fwd", "fwd+bwd"):
            found = floor(Problem.preset(preset, direction=direction, seq_len=32768))
            assert 0 < found.fused_us < found.time_us


def test_the_floor_grows_with_the_length_and_hardly_with_the_partitions():
    base = Problem.preset("spikingbrain2-5b", seq_len=32768, direction="fwd")
    assert floor(base.replace(seq_len=65536)).time_us == pytest.approx(2 * floor(base).time_us, rel=0.05)
    assert floor(base.replace(num_partitions=32)).time_us == pytest.approx(floor(base).time_us, rel=0.1)


def test_a_walk_takes_its_dependent_steps():
    problem = Problem.preset("spikingbrain2-5b", seq_len=131072, num_heads=4)
    timed = dataclasses.replace(H200, step_us=1.0)
    whole, split = ({stage.name: stage.walk_us for stage in floor(problem, timed, split=n).stages} for n in (0, 32))
    assert whole["scan"] == 2048
    assert whole["prepare"] == whole["gradients"] == 0
    # three rows a token, of four heads and two tiles of V, over two blocks on each of 132 multiprocessors
    assert split["scan"] == split["group_states"] == pytest.approx(3 * 2048 * 4 * 2 / (2 * 132))
    assert all(stage.walk_us == 0 for stage in floor(problem).stages), "what was not measured is no part of a floor"


@pytest.mark.parametrize(("heads", "seq_len", "splits"), [(32, 8192, False), (32, 131072, False), (4, 131072, True)])
@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
def test_segments_are_split_where_few_heads_wait_for_long_sequences(heads, seq_len, splits, direction):
    problem = Problem.preset("spikingbrain2-5b", seq_len=seq_len, num_heads=heads, direction=direction)
    times = {split: floor(problem, DATA_CENTRE, split=split).time_us for split in (0, 16, 32, 64, 128)}
    assert (min(times, key=times.get) != 0) == splits, times


def test_call_bytes_counts_each_tensor_once():
    plain = Problem(rule="gla", seq_len=10, num_heads=2, head_dim=4, num_partitions=0, top_k=0, direction="fwd")
    # q, k, v, g and o of [10, 2, 4], two bytes a number
    assert call_bytes(plain, OUTER) == 5 * 10 * 2 * 4 * 2
    sparse = plain.replace(num_partitions=3, top_k=1, read_k=1)
    # beside them the always-on q, k, g, and the logits
    assert call_bytes(sparse, OUTER) == (5 + 3) * 10 * 2 * 4 * 2 + 10 * 3 * 4


def test_ceilings_are_measured():
    found = measure_ceilings(Device.detect("cpu"), "fp32", time_limit_s=0.05)
    assert 1e8 < found.copy_bytes_per_s < 1e13
    assert 1e8 < found.matmul_flops_per_s < 1e15
