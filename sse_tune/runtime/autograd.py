"""The staged pipeline under autograd: as a function where PyTorch runs it at once, as two custom operators where
something looks on (torch.compile, functorch, dispatch modes, subclasses of tensors).

Operators take tensors and plain values only: the problem and the plan go in as JSON, the inputs as a list of those
that are there with their names beside it. What the backward pass needs (`pipeline.saved_names`: routing, row scales,
gate sums, A) leaves the forward operator as further outputs that nobody else sees. An operator costs the host some
hundred microseconds a training step, which the function does not. The one-stage graph is in `whole_graph.py`.

On a GPU both run passes that were prepared (`prepared.py`); elsewhere `pipeline.Execution` runs the stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sse_tune.runtime.arguments import are_plain, flatten_tokens
from sse_tune.runtime.pipeline import Execution, Inputs, buffer_spec, gradient_names, saved_names, state_shape
from sse_tune.runtime.prepared import backward_pass, forward_pass
from sse_tune.runtime.recording import Spec, saved_blocks
from sse_tune.runtime.settings import Settings, read_plan, read_problem


def run(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor | None]:
    """o `[R, H, V]` and the final state of a staged plan by the operators, differentiable if the problem trains."""
    present = inputs.present()
    results = forward_op(
        list(present.values()), ",".join(present), settings.problem, settings.plan, settings.scale,
        settings.output_final_state,
    )
    return results[0], results[1] if settings.output_final_state else None


def runs_at_once(tensors: Iterable[Tensor]) -> bool:
    """Whether nobody but autograd follows what happens to these tensors."""
    return nothing_follows() and are_plain(tensors)


def nothing_follows() -> bool:
    """Whether nobody but autograd follows what happens to plain tensors."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def run_at_once(tensors: dict[str, Tensor], settings: Settings) -> tuple[Tensor, Tensor | None]:
    """o `[B, T, H, V]` and the final state of a staged plan without an operator, differentiable if the problem trains.

    Args:
        tensors: checked arguments of the operation by name, as they came, with `cu_seqlens` as in `Inputs`.
        settings: of the call.
    """
    names = ",".join(tensors)
    return into_graph(names, settings, list(tensors.values()), lambda given: run_forward(given, names, settings))


def into_graph(
    names: str, settings: Settings, given: list[Tensor], forward: Callable[[list[Tensor]], tuple[list[Tensor], ...]]
) -> tuple[Tensor, Tensor | None]:
    """o and the final state of a forward pass, which enters the graph of autograd if the problem trains. It is launched
    before: what autograd does around a function takes the host tens of microseconds, in which the GPU can run already.

    Args:
        names: of the tensors, with commas between.
        settings: of the call.
        given: the tensors.
        forward: from contiguous ones to results and what the backward pass needs, as `run_forward`.
    """
    contiguous = [tensor if tensor.is_contiguous() else tensor.detach().contiguous() for tensor in given]
    results: Sequence[Tensor]
    results, saved = forward(contiguous)
    if read_problem(settings.problem).trains:
        results = _Function.apply(names, settings, contiguous, results, saved, *given)
    return results[0], results[1] if settings.output_final_state else None


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, names: str, settings: Settings, contiguous: list[Tensor], results: list[Tensor], saved: list[Tensor],
        *given: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        # o and the final state are not needed again
        ctx.set_materialize_grads(False)
        ctx.names, ctx.settings = names, settings
        ctx.save_for_backward(*contiguous, *saved)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        settings, names, held = ctx.settings, ctx.names.split(","), list(ctx.saved_tensors)
        tensors, saved = held[: len(names)], held[len(names) :]
        del held
        ctx.maybe_clear_saved_tensors()  # unless the graph is kept, they are let go as the pass has read them
        do, d_final_state = result_gradients(grads, tensors[names.index("v")], settings.output_final_state)
        found = gradients(tensors, ctx.names, saved, do, d_final_state, settings)
        by_name = dict(zip(gradient_names(names), found))
        return None, None, None, None, None, *[by_name.get(name) for name in names]


def result_gradients(
    grads: Sequence[Tensor | None], v: Tensor, has_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    """Contiguous gradients of o, whose shape is that of v, and of the final state if it was used."""
    do = grads[0]
    if do is None:  # only the final state was used
        do = torch.zeros_like(v)
    d_final_state = grads[1] if has_final_state else None
    return do.contiguous(), None if d_final_state is None else d_final_state.contiguous()


def run_forward(tensors: Sequence[Tensor], names: str, settings: Settings) -> tuple[list[Tensor], list[Tensor]]:
    """o and the final state if asked for, and what the backward pass needs if the problem trains. Tokens may be `[R]`
    or `[B, T]`, in the results as in what is given."""
    if is_prepared(tensors[0]):
        prepared = forward_pass(
            names, _specs(tensors), settings.problem, settings.plan, settings.scale, settings.output_final_state
        )
        done = prepared.run(tensors)
        return done.tensors, done.saved
    present = dict(zip(names.split(","), tensors))
    posed = read_problem(settings.problem)
    execution = Execution(
        read_plan(settings.plan), posed, _inputs(present), scale=settings.scale,
        output_final_state=settings.output_final_state,
    )
    with torch.no_grad():
        o, final_state = execution.forward()
    o = o.reshape(present["v"].shape)
    return [o] if final_state is None else [o, final_state], execution.saved() if posed.trains else []


def run_backward(
    tensors: Sequence[Tensor], names: str, saved: list[Tensor], do: Tensor, d_final_state: Tensor | None,
    settings: Settings,
) -> list[Tensor]:
    """The gradients of the inputs that have one, in the order of `gradient_names` and of the inputs' shapes. May empty
    `saved`."""
    if is_prepared(tensors[0]):
        given, names = [*tensors, do], f"{names},do"
        if d_final_state is not None:
            given, names = [*given, d_final_state], f"{names},d_final_state"
        prepared = backward_pass(names, _specs(given), settings.problem, settings.plan, settings.scale)
        return prepared.run(given, saved).tensors
    present, posed = dict(zip(names.split(","), tensors)), read_problem(settings.problem)
    execution = Execution.restore(read_plan(settings.plan), posed, _inputs(present), saved, scale=settings.scale)
    found = execution.backward(do.reshape(execution.tensors["v"].shape), d_final_state)
    return [gradient.reshape(present[name].shape) for name, gradient in found.items()]


def gradients(
    tensors: list[Tensor], names: str, saved: list[Tensor], do: Tensor, d_final_state: Tensor | None,
    settings: Settings,
) -> list[Tensor]:
    """`run_backward` in an autograd function: where a graph of the gradients is asked for (create_graph) the operator
    runs it, which refuses to be differentiated, and does not forget it."""
    if torch.is_grad_enabled():
        return backward_op(
            tensors, names, saved, do, d_final_state, settings.problem, settings.plan, settings.scale
        )
    return run_backward(tensors, names, saved, do, d_final_state, settings)


def _inputs(present: dict[str, Tensor]) -> Inputs:
    is_flat = present["q"].dim() == 3
    return Inputs(**{name: t if is_flat else flatten_tokens(name, t) for name, t in present.items()})


def is_prepared(tensor: Tensor) -> bool:
    """Whether its device runs prepared passes."""
    return tensor.is_cuda


def _specs(tensors: Sequence[Tensor]) -> tuple[Spec, ...]:
    return tuple([(tensor.shape, tensor.dtype) for tensor in tensors])


def _saved_specs(problem: str, plan: str, tensor: Tensor) -> list[Spec]:
    """Of what `run_forward` saves where this tensor is."""
    chosen, posed = read_plan(plan), read_problem(problem)
    if is_prepared(tensor):
        return [((nbytes,), torch.uint8) for nbytes, _ in saved_blocks(chosen, posed)] if posed.trains else []
    return [buffer_spec(name, posed, chosen) for name in saved_names(chosen, posed)]


@torch.library.custom_op(
    "sse_tune::forward",
    mutates_args=(),
    schema="(Tensor[] tensors, str names, str problem, str plan, float scale, bool output_final_state) -> Tensor[]",
)
def forward_op(
    tensors: list[Tensor], names: str, problem: str, plan: str, scale: float, output_final_state: bool
) -> list[Tensor]:
    """o, the final state if asked for, and what the backward pass needs if the problem trains."""
    given = [tensor.contiguous() for tensor in tensors]  # a compiler may have laid them out its own way
    results, saved = run_forward(given, names, Settings(problem, plan, scale, output_final_state))
    return results + saved


@forward_op.register_fake
def _(
    tensors: list[Tensor], names: str, problem: str, plan: str, scale: float, output_final_state: bool
) -> list[Tensor]:
    v = tensors[names.split(",").index("v")]
    results = [v.new_empty(v.shape)]
    if output_final_state:
        results.append(v.new_empty(state_shape(read_problem(problem)), dtype=torch.float32))
    return results + [v.new_empty(shape, dtype=dtype) for shape, dtype in _saved_specs(problem, plan, v)]


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
    settings, given = Settings(problem, plan, scale, d_final_state is not None), [t.contiguous() for t in tensors]
    d_state = None if d_final_state is None else d_final_state.contiguous()
    return run_backward(given, names, saved, do.contiguous(), d_state, settings)


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
    ctx.save_for_backward(*tensors, *output[1 + ctx.has_final_state :])


def _op_backward(ctx: Any, grads: list[Tensor | None]) -> tuple:
    names = ctx.names.split(",")
    held = ctx.saved_tensors  # asked for once: checkpointing computes it each time
    tensors, saved = list(held[: len(names)]), list(held[len(names) :])
    do, d_final_state = result_gradients(grads, tensors[names.index("v")], ctx.has_final_state)
    found = backward_op(tensors, ctx.names, saved, do, d_final_state, ctx.problem, ctx.plan, ctx.scale)
    by_name = dict(zip(gradient_names(names), found))
    return [by_name.get(name) for name in names], None, None, None, None, None


forward_op.register_autograd(_op_backward, setup_context=_setup_context)
