"""Checked arguments and a plan to results, whichever graph the plan is of, the heads at once or in groups."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sse_tune.runtime.arguments import Arguments, flatten
from sse_tune.runtime.autograd import run, run_at_once, runs_at_once
from sse_tune.runtime.head_groups import AXIS, heads_of, run_groups_at_once
from sse_tune.runtime.offsets import offsets_of
from sse_tune.runtime.settings import Settings
from sse_tune.runtime.whole_graph import run_whole


def call(arguments: Arguments, graph: str, problem: str, plan: str) -> tuple[Tensor, Tensor | None]:
    """o `[B, T, H, V]` and, if asked for, the final state `[S, P, H, K, V]` fp32.

    Args:
        arguments: as `check` passed them.
        graph: of the plan.
        problem: what `pose` made of them, by `write_problem`: that of one group of heads.
        plan: one that `validate_plan` passed for the problem, as JSON.
    """
    settings = Settings(problem, plan, arguments.scale_value(), arguments.output_final_state)
    groups, tensors = arguments.head_groups, arguments.tensors
    if graph != "whole" and runs_at_once(tensors.values()):
        given = {**tensors, "cu_seqlens": offsets_of(arguments.q, arguments.cu_seqlens)}
        return run_at_once(given, settings) if groups == 1 else run_groups_at_once(given, settings, groups)
    if groups > 1:
        return _joined([call(_part(arguments, group), graph, problem, plan) for group in range(groups)])
    inputs = flatten(arguments)
    o, final_state = run_whole(inputs, settings) if graph == "whole" else run(inputs, settings)
    return o.reshape(arguments.v.shape), final_state


def _part(arguments: Arguments, group: int) -> Arguments:
    """The arguments of one group of heads; `scale` is that of all, for it depends on K alone."""
    groups, tensors = arguments.head_groups, arguments.tensors
    parts: dict[str, Any] = {name: heads_of(name, tensor, group, groups) for name, tensor in tensors.items()}
    return dataclasses.replace(arguments, head_groups=1, **parts)


def _joined(parts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    states = [state for _, state in parts if state is not None]
    return torch.cat([o for o, _ in parts], AXIS), torch.cat(states, AXIS) if states else None
