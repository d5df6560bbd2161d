"""Compiles what a benchmark is going to run, in processes side by side, so that it does not wait for one kernel after
another: this project's plans, and the candidates that a peer's own tuning tries.

Triton's autotuner compiles each candidate when it comes to it: minutes for a chunk op. What the processes compile lies
in the compilers' caches on disk, so that the peer's tuning, which is left as it is, only measures.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sse_tune.bench.peers import Peer, cannot, checked_problem, peers_of, run_of
from sse_tune.bench.sides import calls_of
from sse_tune.device import Device, usable_cores
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.templates.registry import is_compiled
from sse_tune.tuning.ahead import CompileAhead
from sse_tune.tuning.jobs import torch_device, workload

PEERS_LIMIT_S = 300.0  # of all processes together; what is not compiled then is compiled when the peer runs
_MOST_PROCESSES = 16  # that run peers: each has a context of its own on the GPU, half a GiB
_SKIPPED_MS, _MINE_MS = 1.0, 0.0  # what a process claims of a candidate: it goes on with one that it has compiled


def compile_plans(plans: Iterable[tuple[Problem, Plan]], device: Device) -> None:
    """Compiles plans for their problems. What a compiler refuses is left for the run to meet, and to say."""
    pieces = {
        (choice, problem, plan.outer): None
        for problem, plan in plans
        for choice in plan.stages.values()
        if is_compiled(choice.backend)
    }
    if pieces:
        with CompileAhead(device, min(len(pieces), usable_cores())) as pool:
            concurrent.futures.wait([pool.submit(*piece) for piece in pieces])


def compile_peers(problems: Sequence[Problem], device: Device, limit_s: float = PEERS_LIMIT_S) -> tuple[int, ...]:
    """Runs all peers of problems that differ in their length alone: those that tune by Triton on a small one, in
    processes that each compile a share of the candidates; the others on each problem, which may take other kernels of
    theirs, and on the small one, in a process each.

    Args:
        problems: the ones to be measured.
        device: a GPU.
        limit_s: after which processes are stopped.

    Returns:
        The processes' exit codes, 0 where all went well. One that failed has said why on stderr; nothing is lost by it
        but time, since whatever it would have compiled is compiled when the peer runs.
    """
    count, small = min(_MOST_PROCESSES, usable_cores()), checked_problem(problems[0])
    spawned = multiprocessing.get_context("spawn")
    processes = [spawned.Process(target=_run_share, args=(small, device, i, count)) for i in range(count)]
    if any(not peer.tunes_by_triton and cannot(peer, small) is None for peer in peers_of(small)):
        wholes = dict.fromkeys((small, *problems))
        processes += [spawned.Process(target=_run_whole, args=(problem, device)) for problem in wholes]
    for process in processes:
        process.start()
    ends = time.monotonic() + limit_s
    for process in processes:
        process.join(max(0.0, ends - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return tuple(process.exitcode or 0 for process in processes)


def _run_share(problem: Problem, device: Device, index: int, count: int) -> None:
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = sharing(Autotuner._bench, index, count)
    _run([peer for peer in peers_of(problem) if peer.tunes_by_triton], problem, device)


def _run_whole(problem: Problem, device: Device) -> None:
    _run([peer for peer in peers_of(problem) if not peer.tunes_by_triton], problem, device)


def _run(peers: list[Peer], problem: Problem, device: Device) -> None:
    case = workload(problem, torch_device(device))
    for peer in peers:
        if cannot(peer, problem) is None:
            run = run_of(peer, problem, peer.load(problem), case.scale)
            for call in calls_of(run, problem, case.inputs, case.do).values():
                call()


def sharing(measure: Callable[..., list[float]], index: int, count: int) -> Callable[..., list[float]]:
    """In place of `Autotuner._bench`: of all candidates that this process comes by, every count-th one, from the
    index-th on, runs once, which compiles it; the others are passed over."""
    turns = itertools.cycle(range(count))

    def once(call: Callable[[], object], quantiles: object) -> list[float]:
        call()
        return [_MINE_MS] * 3

    def share(tuner: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        if next(turns) != index:
            return [_SKIPPED_MS] * 3
        tuner._do_bench = once
        return measure(tuner, *args, config=config, **meta)

    return share
