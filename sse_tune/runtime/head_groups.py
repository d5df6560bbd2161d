"""The heads of a call in groups, one after the other: less memory, for copies of each group's tensors.

Heads share nothing but the router's choice, so a call of H heads is `groups` calls of H / groups heads each. What lies
between two stages is that of one group at a time, and so is what the forward pass leaves for the backward pass: it is
kept of the last group, with which the backward pass begins; that of the others is made by their forward pass again.
Kernels take whole tensors: a group's inputs are copied out, for the backward pass once more rather than kept. The
gradient of the router's logits is the sum over the groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sse_tune.runtime.autograd import gradients, result_gradients, run_forward
from sse_tune.runtime.pipeline import gradient_names
from sse_tune.runtime.settings import Settings, read_problem

AXIS = 2  # of the heads, in `[B, T, H, ...]` as in `[S, P, H, K, V]`
_OF_ALL_HEADS = ("router_logits", "cu_seqlens")


def heads_of(name: str, tensor: Tensor, group: int, groups: int) -> Tensor:
    """A view of a tensor of the operation with one group's heads alone; all of it if it has no heads."""
    if name in _OF_ALL_HEADS:
        return tensor
    size = tensor.shape[AXIS] // groups
    return tensor.narrow(AXIS, group * size, size)


def run_groups_at_once(
    tensors: dict[str, Tensor], settings: Settings, groups: int
) -> tuple[Tensor, Tensor | None]:
    """As `autograd.run_at_once`, in groups of heads.

    Args:
        tensors: checked arguments of the operation by name, all heads, with `cu_seqlens` as in `Inputs`.
        settings: of one group's call.
        groups: how many; divides H.
    """
    names, given = ",".join(tensors), tuple(tensors.values())
    results: Sequence[Tensor]
    if read_problem(settings.problem).trains:
        results = _Function.apply(names, settings, groups, *given)
    else:
        results, _ = _forward(given, names, settings, groups)
    return results[0], results[1] if settings.output_final_state else None


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, names: str, settings: Settings, groups: int, *given: Tensor) -> tuple[Tensor, ...]:
        results, saved = _forward(given, names, settings, groups)
        ctx.set_materialize_grads(False)
        ctx.names, ctx.settings, ctx.groups = names, settings, groups
        ctx.save_for_backward(*given, *saved)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        settings, names, groups, held = ctx.settings, ctx.names.split(","), ctx.groups, list(ctx.saved_tensors)
        tensors, saved = dict(zip(names, held)), held[len(names) :]
        del held
        ctx.maybe_clear_saved_tensors()  # unless the graph is kept, a group's are let go as its pass has read them
        do, d_final_state = result_gradients(grads, tensors["v"], settings.output_final_state)
        parts: list[list[Tensor]] = []
        for group in reversed(range(groups)):
            part = _part(tensors, group, groups)
            if group < groups - 1:
                with torch.no_grad():
                    saved = run_forward(part, ctx.names, settings)[1]
            parts.append(
                gradients(
                    part, ctx.names, saved, heads_of("o", do, group, groups).contiguous(),
                    None if d_final_state is None else heads_of("", d_final_state, group, groups).contiguous(),
                    settings,
                )
            )  # fmt: skip
            del part, saved
        parts.reverse()
        by_name = {}
        for name in reversed(gradient_names(names)):
            by_name[name] = _joined(name, [part.pop() for part in parts])
        return None, None, None, *[by_name.get(name) for name in names]


def _forward(
    given: Sequence[Tensor], names: str, settings: Settings, groups: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The results of all heads, and what the last group leaves for the backward pass."""
    tensors, results = dict(zip(names.split(","), given)), []
    saved: list[Tensor] = []
    for group in range(groups):
        saved = []  # of the group before: let go before this one's is made
        found, saved = run_forward(_part(tensors, group, groups), names, settings)
        if group == 0:
            shapes = [(*x.shape[:AXIS], x.shape[AXIS] * groups, *x.shape[AXIS + 1 :]) for x in found]
            results = [x.new_empty(shape) for x, shape in zip(found, shapes)]
        for whole, piece in zip(results, found):
            heads_of("", whole, group, groups).copy_(piece)
    return results, saved


def _part(tensors: dict[str, Tensor], group: int, groups: int) -> list[Tensor]:
    return [heads_of(name, tensor, group, groups).contiguous() for name, tensor in tensors.items()]


def _joined(name: str, pieces: list[Tensor]) -> Tensor:
    """One gradient from those of the groups."""
    if name in _OF_ALL_HEADS:
        return torch.stack(pieces).sum(0, dtype=torch.float32).to(pieces[0].dtype)
    return torch.cat(pieces, AXIS)
