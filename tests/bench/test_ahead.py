"""What a benchmark compiles before it measures: whole plans, and each candidate of a peer's in one of the processes."""

import concurrent.futures

import pytest

from sse_tune.bench import ahead
from sse_tune.bench.plans import plans_of
from sse_tune.device import ARCHS, Device
from sse_tune.problem import Problem
from sse_tune.templates.registry import default_plan

HOPPER = Device("cuda", "NVIDIA H200", "sm_90", 132, 227 * 1024)
PROBLEM = Problem.preset("spikingbrain2-5b")


class Pool:
    """In place of compilers."""

    def __init__(self, device, size):
        self.device, self.size, self.asked = device, size, []
        Pool.last = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, choice, problem, outer):
        self.asked.append((choice, problem, outer))
        future = concurrent.futures.Future()
        future.set_exception(RuntimeError("no compiler")) if len(self.asked) == 1 else future.set_result(None)
        return future


def test_every_stage_of_every_plan_is_compiled_once_for_what_it_runs(monkeypatch):
    monkeypatch.setattr(ahead, "CompileAhead", Pool)
    plans = plans_of(PROBLEM, HOPPER, head_groups=(2,))
    assert [(posed.direction, posed.num_heads) for posed, _ in plans] == [
        ("fwd", 32), ("fwd", 32), ("fwd", 16), ("fwd+bwd", 32), ("fwd+bwd", 32), ("fwd+bwd", 16)
    ]  # fmt: skip
    assert plans[3][1] == default_plan(PROBLEM, HOPPER), "the default one, then the best"
    ahead.compile_plans([*plans, *plans], HOPPER)
    wanted = {(choice, posed, plan.outer) for posed, plan in plans for choice in plan.stages.values()}
    assert set(Pool.last.asked) == wanted and len(Pool.last.asked) == len(wanted)
    assert Pool.last.device == HOPPER and 1 <= Pool.last.size <= len(wanted)


def test_nothing_is_compiled_for_a_cpu(monkeypatch):
    monkeypatch.setattr(ahead, "CompileAhead", None)
    problem, cpu = PROBLEM.replace(dtype="fp32"), Device.detect("cpu")
    ahead.compile_plans([(problem, default_plan(problem, cpu))], cpu)


class Kernel:
    """In place of a Triton kernel: which candidates were run."""

    def __init__(self):
        self.fn, self.ran = (lambda: None), []

    def run(self, *arguments, x, **more):
        self.ran.append(x)
        if x == 3:
            from triton.runtime.errors import OutOfResources

            raise OutOfResources(300000, 232448, "shared memory")


@pytest.mark.parametrize("count", [1, 3, 16])
def test_each_candidate_is_run_in_one_of_the_processes(monkeypatch, count):
    from triton import Config
    from triton.runtime.autotuner import Autotuner

    measure, all_ran = Autotuner._bench, []
    for index in range(count):
        monkeypatch.setattr(Autotuner, "_bench", ahead.sharing(measure, index, count))
        shares = []
        for key in (1, 2):  # two kernels, or one with two keys
            kernel = Kernel()
            tuner = Autotuner(kernel, ["n", "x"], [Config({"x": x}) for x in range(7)], ["n"], None, None)
            tuner.run(key, grid=(1,))
            shares += [(key, x) for x in kernel.ran[:-1]]
            mine = [x for x in kernel.ran[:-1] if x != 3]
            assert kernel.ran[-1] in (mine or [0]), "it goes on with one that is compiled here, if there is one"
        all_ran += shares
    assert sorted(all_ran) == [(key, x) for key in (1, 2) for x in range(7)]


def test_a_process_that_does_not_end_in_time_is_stopped_and_counted():
    codes = ahead.compile_peers([PROBLEM.replace(seq_len=64)], ARCHS["sm_90"], limit_s=0.0)
    assert codes and all(codes)


def test_peers_that_do_not_tune_run_at_each_length_too(monkeypatch):
    """Which of their kernels they take may follow from it."""
    started = []

    class Process:
        exitcode = 0

        def __init__(self, target, args):
            self.target, self.args = target, args

        def start(self):
            started.append((self.target, self.args))

        def join(self, timeout=None):
            pass

        def is_alive(self):
            return False

    monkeypatch.setattr(ahead.multiprocessing, "get_context", lambda _: type("Spawned", (), {"Process": Process}))
    monkeypatch.setattr(ahead, "cannot", lambda peer, problem: None)
    small, *long = [PROBLEM.replace(seq_len=length) for length in (512, 8192, 32768)]
    ahead.compile_peers(long, HOPPER)
    assert [args[0] for target, args in started if target is ahead._run_whole] == [small, *long]
    assert {args[0] for target, args in started if target is ahead._run_share} == {small}
