"""Launches bound to a device: recorded once, then made again with other addresses and nothing else to work out.

A bound launch takes the kernel's arguments in the kernel's own order, tensors as addresses. What a compiler specialised
the kernel for must hold at every launch: numbers are those that were recorded, and every address is a multiple of
ADDRESS_ALIGNMENT, which callers see to. Triton's own launcher makes the first launch, which compiles or loads the
kernel; the next ones go to that kernel at once, with the hooks that profilers set.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sse_tune.compilers import cubin
from sse_tune.compilers.artifacts import WARP, Launch
from sse_tune.errors import CompileError
from sse_tune.templates.registry import Program

if TYPE_CHECKING:
    import torch

ADDRESS_ALIGNMENT = 16  # bytes: what Triton specialises pointers for, and one copy of the TileLang kernels

BoundLaunch = Callable[[tuple[Any, ...], int], None]  # (arguments by position, stream)


@dataclasses.dataclass(frozen=True)
class Pointer:
    """Stands for a tensor among the arguments of a recorded launch."""

    dtype: torch.dtype


def bind(launch: Launch, device: int) -> tuple[tuple[str, ...], BoundLaunch]:
    """The parameters whose arguments the bound launch takes, in their order, and the launch itself.

    Args:
        launch: as recorded, with a `Pointer` for each tensor.
        device: index of the GPU, the current one at every launch.

    Raises:
        CompileError: a program does not compile, or the kernel is not one for a GPU.
        DeviceError: a compiler is not there.
    """
    if isinstance(launch.kernel, Program):
        return _bind_program(launch, device)
    return _bind_triton(launch)


def compiler_state() -> tuple[Any, ...]:
    """What Triton's kernels depend on beside their arguments and can change within a process."""
    knobs = _knobs()
    return knobs.runtime.debug, knobs.compilation.instrumentation_mode


@functools.lru_cache(maxsize=None)
def _knobs() -> Any:
    from triton import knobs

    return knobs


def _bind_program(launch: Launch, device: int) -> tuple[tuple[str, ...], BoundLaunch]:
    loaded, grid, threads = cubin.loaded(launch.kernel, device), (*launch.grid, 1, 1)[:3], launch.num_warps * WARP

    def run(values: tuple[Any, ...], stream: int) -> None:
        loaded.launch(grid, threads, values, stream)

    return loaded.parameters, run


def _bind_triton(launch: Launch) -> tuple[tuple[str, ...], BoundLaunch]:
    from triton.runtime.jit import JITFunction

    if not isinstance(launch.kernel, JITFunction):
        raise CompileError(
            "a GPU runs compiled kernels only", f"{launch.kernel!r}", "unset TRITON_INTERPRET, or pass CPU tensors"
        )
    names = tuple(launch.kernel.arg_names)
    return names, _TritonLaunch(launch, names)


class _Address:
    """Stands for a tensor in a launch by Triton itself, which asks for no more than this."""

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        self.dtype, self._address = dtype, address

    def data_ptr(self) -> int:
        return self._address


class _TritonLaunch:
    def __init__(self, launch: Launch, names: tuple[str, ...]) -> None:
        from triton import knobs

        self._launch, self._names, self._runtime = launch, names, knobs.runtime
        self._grid = (*launch.grid, 1, 1)[:3]
        self._compiled: Any = None

    def __call__(self, values: tuple[Any, ...], stream: int) -> None:
        compiled = self._compiled
        if compiled is None:
            self._compiled = self._first(values)
            return
        enter, leave, metadata = self._runtime.launch_enter_hook, self._runtime.launch_exit_hook, None
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            metadata = compiled.launch_metadata(self._grid, stream, *values)
        else:
            enter = leave = None  # a chain without hooks would be called all the same, twice a launch
        compiled.run(
            *self._grid, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave, *values
        )

    def _first(self, values: tuple[Any, ...]) -> Any:
        """By Triton's own launcher, on the current device and stream: the compiled kernel."""
        launch = self._launch
        arguments = {
            name: _Address(launch.args[name].dtype, value) if isinstance(launch.args[name], Pointer) else value
            for name, value in zip(self._names, values)
        }
        return launch.kernel[launch.grid](**arguments, num_warps=launch.num_warps, num_stages=launch.num_stages)
