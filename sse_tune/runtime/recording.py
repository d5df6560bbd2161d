"""A pass of a plan, recorded: the launches it makes and the memory it takes, without any tensor of a call.

A pass runs once on meta tensors, as `compile.py` runs a stage: what a template launches follows from sizes and dtypes
alone, so every later call of the same sizes and dtypes makes the same launches on other addresses. A template that did
anything beside launching and taking scratch would not be repeated faithfully: recording it is an error.

Words: a *slot* is a place in the table of a call's addresses and numbers; a *block* is one allocation for all buffers
that are born before one stage and die after one stage, so that no buffer lives longer than it would by itself. Buffers
of at most SMALL_BYTES do: they share one block from the first to the last of them, since an allocation costs the host
more than they cost the GPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sse_tune.compilers.artifacts import Launch
from sse_tune.compilers.bound import ADDRESS_ALIGNMENT, Pointer
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.runtime.pipeline import Execution, Inputs, buffer_spec, gradient_names, saved_names
from sse_tune.templates.stages import Stage, stages_of

BLOCK_ALIGNMENT = 512  # bytes, of each buffer in a block: as the CUDA allocator's own
SMALL_BYTES = 2 * 2**20

Spec = tuple[tuple[int, ...], torch.dtype]  # shape and dtype
_ALLOCATES = (
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Block:
    """One allocation: `members` are (slot, byte offset)."""

    nbytes: int
    members: tuple[tuple[int, int], ...]

    def place(self, table: list[Any], address: int) -> None:
        """Enters where its buffers lie."""
        assert address % ADDRESS_ALIGNMENT == 0, "an allocator aligns what it hands out"
        for slot, offset in self.members:
            table[slot] = address + offset


@dataclasses.dataclass(frozen=True)
class Step:
    """One stage: what is allocated before it, what it launches, and which of the pass's blocks end with it.

    Args:
        results: slot and dtype of the tensors that a caller gets.
        blocks: number and block, numbers counted through the pass.
        launches: each with the slot of every argument by its name.
        ends: numbers of blocks.
        saved_ends: places in `saved_in` of blocks that the pass before left and no later stage reads.
    """

    results: tuple[tuple[int, torch.dtype], ...]
    blocks: tuple[tuple[int, Block], ...]
    launches: tuple[tuple[Launch, Mapping[str, int]], ...]
    ends: tuple[int, ...]
    saved_ends: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Recording:
    """A pass.

    Args:
        table: of slots: numbers where the launches have numbers, 0 where addresses go. The first ones are of the
            tensors that a call hands in, in their order.
        saved_in: blocks that the pass before left, in the order of `saved_blocks`.
        steps: the stages.
        results: slots of the results, in their order.
        saved_out: numbers of the blocks that the next pass needs, in the order of `saved_blocks`.
    """

    table: tuple[Any, ...]
    saved_in: tuple[Block, ...]
    steps: tuple[Step, ...]
    results: tuple[int, ...]
    saved_out: tuple[int, ...]


def saved_blocks(plan: Plan, problem: Problem) -> tuple[tuple[int, tuple[tuple[str, int], ...]], ...]:
    """What a forward pass leaves for the backward pass, a block for all that one stage writes and one stage reads last,
    and one for what is small: its bytes, and names and offsets of the buffers in it."""
    stages = stages_of(problem, plan.outer)
    writer = {name: stage.name for stage in stages for name in stage.writes}
    last_reader = {name: stage.name for stage in stages for name in stage.reads}
    sizes = {name: _nbytes(buffer_spec(name, problem, plan)) for name in saved_names(plan, problem)}
    groups: dict[tuple[str, str] | None, list[str]] = {}
    for name, size in sizes.items():
        groups.setdefault((writer[name], last_reader[name]) if size > SMALL_BYTES else None, []).append(name)
    blocks = []
    for names in groups.values():
        nbytes, offsets = _carve([sizes[name] for name in names])
        blocks.append((nbytes, tuple(zip(names, offsets))))
    return tuple(blocks)


def record_forward(
    plan: Plan, problem: Problem, given: Mapping[str, Spec], scale: float, output_final_state: bool
) -> Recording:
    """The forward pass: results o and, if asked for, the final state; blocks to save if the problem trains."""
    recorder = _Recorder(given)
    execution = recorder.execution(plan, problem, scale, output_final_state=output_final_state)
    with torch.no_grad(), _OnlyScratch():
        o, final_state = execution.forward()
    saved = saved_blocks(plan, problem) if problem.trains else ()
    buffers = [[execution.tensors[name] for name, _ in members] for _, members in saved]
    return recorder.recording([o] if final_state is None else [o, final_state], buffers, [])


def record_backward(plan: Plan, problem: Problem, given: Mapping[str, Spec], scale: float) -> Recording:
    """The backward pass: results are the gradients, in the order of `gradient_names`. `given` are the inputs, `do`
    and, where the final state has a gradient, `d_final_state`."""
    recorder = _Recorder(given)
    execution = recorder.execution(plan, problem, scale)
    saved_in = []
    for nbytes, members in saved_blocks(plan, problem):
        slots = []
        for name, offset in members:
            shape, dtype = buffer_spec(name, problem, plan)
            execution.tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
            slots.append((recorder.slot(execution.tensors[name]), offset))
        saved_in.append(Block(nbytes, tuple(slots)))
    with torch.no_grad(), _OnlyScratch():
        found = execution.backward(recorder.tensors["do"], recorder.tensors.get("d_final_state"))
    names = gradient_names(name for name in given if name not in ("do", "d_final_state"))
    return recorder.recording([found[name] for name in names], [], saved_in)


class _OnlyScratch(TorchDispatchMode):
    """Lets a template allocate without writing, and nothing else."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func in _ALLOCATES, f"a template may launch kernels and allocate scratch, but it called {func}"
        return func(*args, **(kwargs or {}))


class _Execution(Execution):
    """Tells which stage runs."""

    before: Callable[[], None]

    def _run(self, stage: Stage) -> None:
        self.before()
        super()._run(stage)


class _Recorder:
    """Hands a pass its tensors and gets its launches; everything it hands out stays alive, so that a storage is told
    from another one by its identity."""

    def __init__(self, given: Mapping[str, Spec]) -> None:
        self.tensors = {
            name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in given.items()
        }
        self._table: list[Any] = []
        self._slots: dict[int, int] = {}  # storage to slot
        self._numbers: dict[tuple[type, Any], int] = {}
        self._kept: list[torch.Tensor] = []
        self._stage = -1
        self._born: dict[int, int] = {}  # slot to stage; none of what was handed in
        self._last: dict[int, int] = {}  # slot of a tensor to the last stage that launches with it
        self._launches: list[list[tuple[Launch, dict[str, int]]]] = []
        for tensor in self.tensors.values():
            self.slot(tensor)

    def execution(self, plan: Plan, problem: Problem, scale: float, *, output_final_state: bool = False) -> Execution:
        inputs = {name: tensor for name, tensor in self.tensors.items() if name not in ("do", "d_final_state")}
        execution = _Execution(
            plan, problem, Inputs(**inputs), scale=scale, output_final_state=output_final_state,
            allocate=self._allocate, launcher=self._launch,
        )
        execution.before = self._next
        return execution

    def slot(self, tensor: torch.Tensor) -> int:
        """Of the tensor whose memory this is, a new one if it is not known."""
        assert tensor.storage_offset() == 0, "a launch takes whole tensors"
        storage = tensor.untyped_storage()._cdata
        if storage not in self._slots:
            self._slots[storage] = self._add(0)
            self._kept.append(tensor)
            if self._stage >= 0:  # a buffer, a result or a template's scratch
                self._born[self._slots[storage]] = self._stage
        return self._slots[storage]

    def recording(
        self, results: Sequence[torch.Tensor], saved: Sequence[Sequence[torch.Tensor]], saved_in: Sequence[Block]
    ) -> Recording:
        result_slots = [self.slot(tensor) for tensor in results]
        dtypes = {slot: tensor.dtype for slot, tensor in zip(result_slots, results)}
        nbytes = {self.slot(tensor): tensor.untyped_storage().nbytes() for tensor in self._kept}
        groups: list[tuple[int, int, list[int]]] = []  # birth, death, members; saved ones first and without a death
        for buffers in saved:
            slots = [self.slot(buffer) for buffer in buffers]
            groups.append((min(self._born[slot] for slot in slots), -1, slots))
        outliving = set(dtypes).union(*(slots for _, _, slots in groups))
        passing: dict[tuple[int, int] | None, list[int]] = {}
        for slot, born in self._born.items():
            # what no launch takes is not allocated at all
            if slot not in outliving and slot in self._last:
                passing.setdefault((born, self._last[slot]) if nbytes[slot] > SMALL_BYTES else None, []).append(slot)
        groups += [
            (min(self._born[slot] for slot in slots), max(self._last[slot] for slot in slots), slots)
            for slots in passing.values()
        ]
        blocks = [self._block([(slot, nbytes[slot]) for slot in slots]) for _, _, slots in groups]
        numbered = list(enumerate(groups))
        # one that no launch reads is held to the end
        last_of = [max(self._last.get(slot, self._stage) for slot, _ in block.members) for block in saved_in]
        steps = tuple(
            Step(
                results=tuple((slot, dtype) for slot, dtype in dtypes.items() if self._born[slot] == stage),
                blocks=tuple((number, blocks[number]) for number, (born, _, _) in numbered if born == stage),
                launches=tuple(self._launches[stage]),
                ends=tuple(number for number, (_, death, _) in numbered if death == stage),
                saved_ends=tuple(place for place, last in enumerate(last_of) if last == stage),
            )
            for stage in range(self._stage + 1)
        )
        return Recording(
            tuple(self._table), tuple(saved_in), steps, tuple(result_slots), tuple(range(len(saved)))
        )

    @staticmethod
    def _block(sizes: Sequence[tuple[int, int]]) -> Block:
        nbytes, offsets = _carve([size for _, size in sizes])
        return Block(nbytes, tuple((slot, offset) for (slot, _), offset in zip(sizes, offsets)))

    def _next(self) -> None:
        self._stage += 1
        self._launches.append([])

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        self.slot(tensor)
        return tensor

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], args: dict[str, Any], *, num_warps: int, num_stages: int
    ) -> None:
        slots, shown = {}, {}
        for name, value in args.items():
            is_tensor = isinstance(value, torch.Tensor)
            slots[name] = self.slot(value) if is_tensor else self._number(value)
            shown[name] = Pointer(value.dtype) if is_tensor else value
            if is_tensor:
                self._last[slots[name]] = self._stage
        launch = Launch(kernel, tuple(int(extent) for extent in grid), shown, num_warps, num_stages)
        self._launches[-1].append((launch, slots))

    def _number(self, value: Any) -> int:
        key = (type(value), value)
        if key not in self._numbers:
            self._numbers[key] = self._add(value)
        return self._numbers[key]

    def _add(self, value: Any) -> int:
        self._table.append(value)
        return len(self._table) - 1


def _nbytes(spec: Spec) -> int:
    shape, dtype = spec
    return math.prod(shape) * dtype.itemsize


def _carve(sizes: Sequence[int]) -> tuple[int, list[int]]:
    """Bytes of a block that holds buffers of these sizes, and where each lies."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
    return end, offsets
