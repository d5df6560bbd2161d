"""Passes ready to be launched again: what a call costs the host is its allocations and its launches.

A pass is recorded once for all that it depends on (names, shapes and dtypes of its tensors, problem, plan, scale) and
bound once for each GPU. It holds no tensors and nothing of the last call, so threads share it.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sse_tune.compilers import bound, cubin
from sse_tune.compilers.artifacts import Launch
from sse_tune.compilers.bound import ADDRESS_ALIGNMENT, BoundLaunch
from sse_tune.runtime.pipeline import WITHOUT_TOKENS, gradient_names, state_shape
from sse_tune.runtime.recording import Recording, Spec, record_backward, record_forward
from sse_tune.runtime.settings import read_plan, read_problem

# (picks a launch's arguments from the table of a call, the launch), by stage
Launches = list[list[tuple[Callable[[list[Any]], tuple[Any, ...]], BoundLaunch]]]
_MAX_BOUND = 64  # GPUs times states of the compiler that a pass keeps launches for


@dataclasses.dataclass(frozen=True)
class Results:
    """What a pass returns: tensors, and the blocks for the pass after it."""

    tensors: list[Tensor]
    saved: list[Tensor]


class Pass:
    """A recorded pass.

    Args:
        recording: the pass.
        shapes: of the results, as many elements as they were recorded with.
        bind: makes its launches, given each with the index of the device (None: a CPU).
    """

    def __init__(self, recording: Recording, shapes: Sequence[Sequence[int]], bind: Callable = bound.bind) -> None:
        self._recording, self._bind = recording, bind
        self._shapes = dict(zip(recording.results, map(tuple, shapes), strict=True))
        self._bound: dict[tuple[Any, ...], Launches] = {}

    def run(self, tensors: Sequence[Tensor], saved: list[Tensor] | None = None) -> Results:
        """Launches it on the current stream of the tensors' GPU, without waiting for it.

        Args:
            tensors: contiguous, of the specs it was recorded for, in their order. One that does not start at a multiple
                of ADDRESS_ALIGNMENT bytes is copied: kernels read several values at once.
            saved: the blocks of the pass before. The list is emptied, and each let go by the last stage that reads it.
        """
        saved = [] if saved is None else saved
        device = tensors[0].device
        if device.type != "cuda":
            return self._run(tensors, saved, device, self._launches(None, ()), 0)
        if device.index == torch.cuda.current_device():
            return self._run_on_gpu(tensors, saved, device)
        with torch.cuda.device(device):
            return self._run_on_gpu(tensors, saved, device)

    def _run_on_gpu(self, tensors: Sequence[Tensor], saved: list[Tensor], device: torch.device) -> Results:
        cubin.enter_context(device.index)
        launches = self._launches(device.index, bound.compiler_state())
        # what `torch.cuda.current_stream` asks, without an object made of it
        return self._run(tensors, saved, device, launches, torch._C._cuda_getCurrentRawStream(device.index))

    def _run(
        self, tensors: Sequence[Tensor], saved: list[Tensor], device: torch.device, launches: Launches, stream: int
    ) -> Results:
        recording = self._recording
        table, copies = list(recording.table), []  # copies live until the launches that read them are made
        for slot, tensor in enumerate(tensors):
            assert tensor.is_contiguous(), (slot, tensor.shape, tensor.stride())
            table[slot] = tensor.data_ptr()
            if table[slot] % ADDRESS_ALIGNMENT:
                copies.append(tensor.detach().clone())
                table[slot] = copies[-1].data_ptr()
        assert [block.nbytes for block in recording.saved_in] == [block.nbytes for block in saved]
        held = dict(enumerate(saved))
        saved.clear()
        for place, block in enumerate(recording.saved_in):
            block.place(table, held[place].data_ptr())
        results: dict[int, Tensor] = {}
        blocks: dict[int, Tensor] = {}
        for step, bound_launches in zip(recording.steps, launches):
            for slot, dtype in step.results:
                results[slot] = torch.empty(self._shapes[slot], dtype=dtype, device=device)
                table[slot] = results[slot].data_ptr()
                assert table[slot] % ADDRESS_ALIGNMENT == 0, "an allocator aligns what it hands out"
            for number, block in step.blocks:
                blocks[number] = torch.empty(block.nbytes, dtype=torch.uint8, device=device)
                block.place(table, blocks[number].data_ptr())
            for pick, launch in bound_launches:
                launch(pick(table), stream)
            for number in step.ends:
                del blocks[number]
            for place in step.saved_ends:
                del held[place]
        return Results([results[slot] for slot in recording.results], [blocks[n] for n in recording.saved_out])

    def _launches(self, index: int | None, state: tuple[Any, ...]) -> Launches:
        """Bound to a device; a thread that finds none makes its own, as good as any other's."""
        key = (index, *state)
        found = self._bound.get(key)
        if found is None:
            found = [[self._bound_launch(*item, index) for item in step.launches] for step in self._recording.steps]
            if len(self._bound) >= _MAX_BOUND:
                self._bound = {}
            self._bound[key] = found
        return found

    def _bound_launch(self, launch: Launch, slots: Mapping[str, int], index: int | None) -> tuple[Any, BoundLaunch]:
        names, run = self._bind(launch, index)
        assert len(names) > 1, "with one argument `itemgetter` would give no tuple"
        return operator.itemgetter(*(slots[name] for name in names)), run


@functools.lru_cache(maxsize=256)
def forward_pass(
    names: str, specs: tuple[Spec, ...], problem: str, plan: str, scale: float, output_final_state: bool
) -> Pass:
    """For inputs of these names (with commas between) and specs, tokens `[R]` or `[B, T]`; the rest is as in
    `Settings`. Results are o, shaped as v, and, if asked for, the final state."""
    given, posed = dict(zip(names.split(","), specs, strict=True)), read_problem(problem)
    recording = record_forward(read_plan(plan), posed, _flat(given), scale, output_final_state)
    return Pass(recording, [given["v"][0], state_shape(posed)][: len(recording.results)])


@functools.lru_cache(maxsize=256)
def backward_pass(names: str, specs: tuple[Spec, ...], problem: str, plan: str, scale: float) -> Pass:
    """For inputs, then `do` and, if it is there, `d_final_state`; results are the gradients in the order of
    `gradient_names`, shaped as the inputs."""
    given = dict(zip(names.split(","), specs, strict=True))
    recording = record_backward(read_plan(plan), read_problem(problem), _flat(given), scale)
    inputs = [name for name in given if name not in ("do", "d_final_state")]
    return Pass(recording, [given[name][0] for name in gradient_names(inputs)])


def _flat(given: dict[str, Spec]) -> dict[str, Spec]:
    """The same with tokens `[R]`."""
    if len(given["q"][0]) == 3:
        return given
    return {
        name: (shape if name in WITHOUT_TOKENS else (shape[0] * shape[1], *shape[2:]), dtype)
        for name, (shape, dtype) in given.items()
    }
