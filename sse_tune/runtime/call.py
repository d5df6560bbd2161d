"""Checked arguments and a plan to results, whichever graph the plan is of."""

from __future__ import annotations

from torch import Tensor

from sse_tune.runtime.arguments import Arguments, flatten, offsets
from sse_tune.runtime.autograd import run, run_at_once, runs_at_once
from sse_tune.runtime.settings import Settings
from sse_tune.runtime.whole_graph import run_whole


def call(arguments: Arguments, graph: str, problem: str, plan: str) -> tuple[Tensor, Tensor | None]:
    """o `[B, T, H, V]` and, if asked for, the final state `[S, P, H, K, V]` fp32.

    Args:
        arguments: as `check` passed them.
        graph: of the plan.
        problem: what `pose` made of them, by `write_problem`.
        plan: one that `validate_plan` passed for the problem, as JSON.
    """
    settings = Settings(problem, plan, arguments.scale_value(), arguments.output_final_state)
    if graph != "whole":
        tensors = arguments.tensors()
        if runs_at_once(tensors.values()):
            return run_at_once({**tensors, "cu_seqlens": offsets(arguments)}, settings)
    inputs = flatten(arguments)
    o, final_state = run_whole(inputs, settings) if graph == "whole" else run(inputs, settings)
    return o.reshape(arguments.v.shape), final_state
