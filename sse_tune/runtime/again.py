"""Calls like one before: what was checked, posed and looked up for a call holds for every other one of the same sizes,
dtypes, devices and numbers, which finds it by one key. On a GPU that waits, the time until the first launch is lost.

Only what runs at once, in a prepared pass, with heads all at once, is remembered; and nothing on a device where checks
look at what tensors hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sse_tune.runtime.arguments import PLAIN_TYPES, Arguments, reads_values
from sse_tune.runtime.autograd import into_graph, is_prepared, nothing_follows
from sse_tune.runtime.offsets import offsets_of
from sse_tune.runtime.prepared import Pass, forward_pass
from sse_tune.runtime.settings import Settings

Given = tuple[Tensor | None, ...]  # of a call, in the order of `arguments.TENSORS`: cu_seqlens last
Numbers = tuple[int | float | None, ...]
Key = tuple[Any, ...]
_TENSOR_TYPES = PLAIN_TYPES | {type(None)}
_NUMBER_TYPES = frozenset((int, float, bool, type(None)))  # others may change, or hold memory
_MAX_KNOWN = 1024


class Again:
    """What is known of a call.

    Args:
        settings: of the call.
        names: of its tensors, `cu_seqlens` last.
        forward: the pass for its tensors.
    """

    def __init__(self, settings: Settings, names: str, forward: Pass) -> None:
        self._settings, self._names, self._forward = settings, names, forward

    def run(self, given: Given) -> tuple[Tensor, Tensor | None]:
        """o `[B, T, H, V]` and the final state if asked for, as `call`."""
        present = [tensor for tensor in given[:-1] if tensor is not None]
        present.append(offsets_of(present[0], given[-1]))
        return into_graph(self._names, self._settings, present, self._run)

    def _run(self, contiguous: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        done = self._forward.run(contiguous)
        return done.tensors, done.saved


class Calls:
    """The calls that are known to one who decides about plans.

    `key_of` a call, `find` it by that, and where it is not known `remember` it."""

    def __init__(self) -> None:
        self._known: dict[Key, tuple[Again, Any]] = {}

    def find(self, key: Key) -> tuple[Again | None, Any]:
        """What is known of a call, and the token that it was remembered with."""
        return self._known.get(key, (None, None))

    def remember(self, key: Key, arguments: Arguments, resolved: tuple[str, str, str], token: object = None) -> None:
        """A call that ran: its arguments as `check` passed them; graph, problem and plan as `call` took them."""
        tensors, (graph, problem, plan) = arguments.tensors, resolved
        q = tensors["q"]
        if graph == "whole" or arguments.head_groups > 1 or reads_values(q.device) or not is_prepared(q):
            return
        settings = Settings(problem, plan, arguments.scale_value(), arguments.output_final_state)
        given = {**tensors, "cu_seqlens": offsets_of(q, arguments.cu_seqlens)}
        names, specs = ",".join(given), tuple([(tensor.shape, tensor.dtype) for tensor in given.values()])
        forward = forward_pass(names, specs, problem, plan, settings.scale, settings.output_final_state)
        if len(self._known) >= _MAX_KNOWN:
            self._known = {}
        self._known[key] = Again(settings, names, forward), token


def key_of(given: Given, numbers: Numbers) -> Key | None:
    """All that decides how a call runs, but for plans; None where it is not one to remember. Types are in it since
    1 == True == 1.0."""
    if not nothing_follows():  # first: what follows a call need not look at the rest
        return None
    types = tuple(map(type, numbers))
    if not (_TENSOR_TYPES.issuperset(map(type, given)) and _NUMBER_TYPES.issuperset(types)):
        return None
    return (
        tuple([t if t is None else (t.shape, t.dtype, t.device, t.requires_grad) for t in given]),
        numbers, types, torch.is_grad_enabled(),
    )  # fmt: skip
