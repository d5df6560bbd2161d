"""Capture in a CUDA graph: the proof that a plan never waits for the host, and runs the same without it."""

from __future__ import annotations

import torch

from sse_tune.plan import Plan
from sse_tune.runtime.pipeline import Execution
from sse_tune.tuning.compare import Results
from sse_tune.tuning.inputs import Case


def differing_in_graph(plan: Plan, case: Case, expected: Results) -> list[str]:
    """Captures forward and backward, replays them, and names the results whose bits are not the expected ones."""

    def call() -> Results:
        execution = Execution(
            plan, case.problem, case.inputs, scale=case.scale, output_final_state=case.output_final_state
        )
        o, final_state = execution.forward()
        results = {"o": o} | ({} if final_state is None else {"final_state": final_state})
        if case.problem.trains:
            gradients = execution.backward(case.do, case.d_final_state)
            results |= {f"d_{name}": gradient for name, gradient in gradients.items()}
        return results

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for tensor in captured.values():
        tensor.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return [name for name, x in expected.items() if not torch.equal(x, captured[name])]
