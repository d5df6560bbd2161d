"""The staged pipeline as two custom operators, forward and backward, so that autograd and torch.compile know it.

Operators take tensors and plain values only: the problem and the plan go in as JSON, the inputs as a list of those
that are there with their names beside it. What the backward pass needs (`pipeline.saved_names`: routing, row scales,
gate sums, A) leaves the forward operator as further outputs that nobody else sees. The one-stage graph is in
`whole_graph.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sse_tune.runtime.pipeline import Execution, Inputs, buffer_spec, gradient_names, saved_names, state_shape
from sse_tune.runtime.settings import Settings, read_plan, read_problem


def run(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor | None]:
    """o `[R, H, V]` and the final state of a staged plan, differentiable if the problem trains."""
    present = inputs.present()
    results = forward_op(
        list(present.values()), ",".join(present), settings.problem, settings.plan, settings.scale,
        settings.output_final_state,
    )
    return results[0], results[1] if settings.output_final_state else None


@torch.library.custom_op(
    "sse_tune::forward",
    mutates_args=(),
    schema="(Tensor[] tensors, str names, str problem, str plan, float scale, bool output_final_state) -> Tensor[]",
)
def forward_op(
    tensors: list[Tensor], names: str, problem: str, plan: str, scale: float, output_final_state: bool
) -> list[Tensor]:
    """o, the final state if asked for, and what the backward pass needs if the problem trains."""
    inputs, posed = Inputs(**dict(zip(names.split(","), tensors))), read_problem(problem)
    execution = Execution(read_plan(plan), posed, inputs, scale=scale, output_final_state=output_final_state)
    o, final_state = execution.forward()
    results = [o] if final_state is None else [o, final_state]
    return results + (execution.saved() if posed.trains else [])


@forward_op.register_fake
def _(
    tensors: list[Tensor], names: str, problem: str, plan: str, scale: float, output_final_state: bool
) -> list[Tensor]:
    posed, v = read_problem(problem), tensors[names.split(",").index("v")]
    results = [v.new_empty(v.shape)]
    if output_final_state:
        results.append(v.new_empty(state_shape(posed), dtype=torch.float32))
    chosen = read_plan(plan)
    for name in saved_names(chosen, posed):
        shape, dtype = buffer_spec(name, posed, chosen)
        results.append(v.new_empty(shape, dtype=dtype))
    return results


@torch.library.custom_op(
    "sse_tune::backward",
    mutates_args=(),
    schema="(Tensor[] tensors, str names, Tensor[] saved, Tensor do, Tensor? d_final_state, str problem, str plan, "
    "float scale) -> Tensor[]",
)
def backward_op(
    tensors: list[Tensor], names: str, saved: list[Tensor], do: Tensor, d_final_state: Tensor | None,
    problem: str, plan: str, scale: float,
) -> list[Tensor]:
    """The gradients of the inputs that have one, in the order of `gradient_names`."""
    inputs = Inputs(**dict(zip(names.split(","), tensors)))
    execution = Execution.restore(read_plan(plan), read_problem(problem), inputs, saved, scale=scale)
    return list(execution.backward(do, d_final_state).values())


@backward_op.register_fake
def _(
    tensors: list[Tensor], names: str, saved: list[Tensor], do: Tensor, d_final_state: Tensor | None,
    problem: str, plan: str, scale: float,
) -> list[Tensor]:
    present = dict(zip(names.split(","), tensors))
    return [tensor.new_empty(tensor.shape) for tensor in (present[name] for name in gradient_names(present))]


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    tensors, ctx.names, ctx.problem, ctx.plan, ctx.scale, ctx.has_final_state = inputs
    # o and the final state are not needed again; without this, autograd would make zeros the size of A
    ctx.set_materialize_grads(False)
    ctx.o_shape, ctx.num_results = output[0].shape, len(output)
    ctx.save_for_backward(*tensors, *output[1 + ctx.has_final_state :])


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple:
    names = ctx.names.split(",")
    tensors, saved = list(ctx.saved_tensors[: len(names)]), list(ctx.saved_tensors[len(names) :])
    do = grads[0]
    if do is None:  # only the final state was used
        do = tensors[names.index("v")].new_zeros(ctx.o_shape)
    d_final_state = grads[1] if ctx.has_final_state else None
    found = backward_op(
        tensors, ctx.names, saved, do.contiguous(), None if d_final_state is None else d_final_state.contiguous(),
        ctx.problem, ctx.plan, ctx.scale,
    )
    by_name = dict(zip(gradient_names(names), found))
    return [by_name.get(name) for name in names], None, None, None, None, None


forward_op.register_autograd(_backward, setup_context=_setup_context)
