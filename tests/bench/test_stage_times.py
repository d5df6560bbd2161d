"""Stages timed alone: in Triton's interpreter, and how they are shown."""

import pytest

from sse_tune.bench.stages import StageTime, time_stages
from sse_tune.cli_bench import _print_stages
from sse_tune.device import ARCHS, Device
from sse_tune.problem import Problem
from sse_tune.templates.registry import default_plan
from sse_tune.tuning.inputs import workload
from sse_tune.tuning.measure import Timing
from tests.bench.test_command import made


@pytest.mark.interpret
def test_each_stage_of_a_plan_has_a_time():
    problem = Problem(rule="gdn", seq_len=20, num_heads=1, head_dim=64, num_partitions=2, top_k=1, dtype="fp32",
                      norm="after", direction="fwd")  # fmt: skip
    plan = default_plan(problem, ARCHS["sm_90"], "triton")
    whole = default_plan(problem, Device.detect("cpu"), "torch")
    found = time_stages({"default": plan, "whole": whole}, workload(problem, "cpu"), Device.detect("cpu"), 0.01)
    assert found.keys() == {"default"}
    assert list(found["default"]) == list(plan.stages) == ["routing", "prepare", "scan", "combine"]
    assert found["default"]["scan"].template == "triton.gdn_scan"
    assert all(stage.timing.median_us > 0 for stage in found["default"].values())


def test_times_stand_beside_the_floor(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    bench = made(Problem.preset("demo"))
    bench.stages["best"] = {
        "prepare": StageTime("triton.gdn_prepare", Timing((2 * bench.floor.stages[0].time_us,))),
        "elsewhere": StageTime("tilelang.gdn_other", Timing((5.0,))),
    }
    _print_stages(bench)
    prepare, elsewhere = capsys.readouterr().out.splitlines()[-3:-1]
    assert "2.00" in prepare
    assert "triton.gdn_prepare" in prepare
    assert [cell.strip() for cell in elsewhere.strip("│").split("│")][1:] == [
        "-", "-", "-", "-", "5.0 us", "-", "tilelang.gdn_other",
    ]  # fmt: skip
    assert bench.to_dict()["stage_timings"]["best"]["elsewhere"]["median_us"] == 5.0
