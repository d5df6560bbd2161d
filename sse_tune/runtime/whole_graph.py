"""The one-stage graph: plain PyTorch under autograd, and as operators where torch.compile must not look inside.

Its shapes depend on the data (rows of a partition), so the compiler cannot trace it. As an operator the forward pass
keeps its inputs only, and the backward pass computes it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sse_tune.runtime.pipeline import Execution, Inputs, gradient_names, state_shape, whole
from sse_tune.runtime.settings import Settings, read_plan, read_problem


def run_whole(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor | None]:
    """o `[R, H, V]` and the final state of a plan of the graph "whole", differentiable."""
    if not torch.compiler.is_compiling():
        o, final_state = whole(read_plan(settings.plan), read_problem(settings.problem), inputs, settings.scale)
    else:
        present = inputs.present()
        o, final_state = whole_op(
            list(present.values()), ",".join(present), settings.problem, settings.plan, settings.scale
        )
    return o, final_state if settings.output_final_state else None


def _execution(tensors: list[Tensor], names: str, problem: str, plan: str, scale: float) -> Execution:
    inputs = Inputs(**dict(zip(names.split(","), tensors)))
    return Execution(read_plan(plan), read_problem(problem), inputs, scale=scale, output_final_state=True)


@torch.library.custom_op(
    "sse_tune::whole",
    mutates_args=(),
    schema="(Tensor[] tensors, str names, str problem, str plan, float scale) -> Tensor[]",
)
def whole_op(tensors: list[Tensor], names: str, problem: str, plan: str, scale: float) -> list[Tensor]:
    """o and the final state."""
    inputs = Inputs(**dict(zip(names.split(","), tensors)))
    with torch.no_grad():
        return list(whole(read_plan(plan), read_problem(problem), inputs, scale))


@whole_op.register_fake
def _(tensors: list[Tensor], names: str, problem: str, plan: str, scale: float) -> list[Tensor]:
    v = tensors[names.split(",").index("v")]
    return [v.new_empty(v.shape), v.new_empty(state_shape(read_problem(problem)), dtype=torch.float32)]


# Defined without `custom_op`: that keeps autograd out of an operator, and this one differentiates inside.
torch.library.define(
    "sse_tune::whole_backward",
    "(Tensor[] tensors, str names, Tensor? do, Tensor? d_final_state, str problem, str plan, float scale) -> Tensor[]",
)


@torch.library.impl("sse_tune::whole_backward", ("cpu", "cuda"))
def _whole_backward(
    tensors: list[Tensor], names: str, do: Tensor | None, d_final_state: Tensor | None,
    problem: str, plan: str, scale: float,
) -> list[Tensor]:
    execution = _execution(tensors, names, problem, plan, scale)
    o, _ = execution.forward()
    return list(execution.backward(torch.zeros_like(o) if do is None else do, d_final_state).values())


@torch.library.register_fake("sse_tune::whole_backward")
def _(
    tensors: list[Tensor], names: str, do: Tensor | None, d_final_state: Tensor | None,
    problem: str, plan: str, scale: float,
) -> list[Tensor]:
    present = dict(zip(names.split(","), tensors))
    return [present[name].new_empty(present[name].shape) for name in gradient_names(present)]


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    tensors, ctx.names, ctx.problem, ctx.plan, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple:
    found = torch.ops.sse_tune.whole_backward(
        list(ctx.saved_tensors), ctx.names, grads[0], grads[1], ctx.problem, ctx.plan, ctx.scale
    )
    names = ctx.names.split(",")
    by_name = dict(zip(gradient_names(names), found))
    return [by_name.get(name) for name in names], None, None, None, None


whole_op.register_autograd(_backward, setup_context=_setup_context)
