"""Launches compiled programs through the CUDA driver: on the current device and stream, without synchronising.

The binary is loaded once for each device. Arguments are checked for being there, not for their shapes: those are the
contract's. A launch allocates nothing on the device, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import struct
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

from sse_tune.compilers.artifacts import WARP
from sse_tune.compilers.tilelang import Parameter, build
from sse_tune.errors import CompileError
from sse_tune.templates.registry import Program

_MAX_DYNAMIC_SMEM = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_thread = threading.local()
_FORMATS = {"pointer": "P", "int32": "i", "int64": "q", "float32": "f"}  # as `struct` writes them


class Loaded:
    """A program on one device.

    Args:
        program: built if it is not on the disk.
        arch: of the device, which must be current.
    """

    def __init__(self, program: Program, arch: str) -> None:
        built = build(program, arch)
        self.parameters = tuple(parameter.name for parameter in built.parameters)
        self._arguments = Arguments(built.parameters)
        self._function, self._smem_bytes = ctypes.c_void_p(), built.dynamic_smem_bytes
        module = ctypes.c_void_p()
        _call("cuModuleLoadData", ctypes.byref(module), built.cubin)
        _call("cuModuleGetFunction", ctypes.byref(self._function), module, built.name.encode())
        smem_bytes = ctypes.c_int(self._smem_bytes)
        _call("cuFuncSetAttribute", self._function, ctypes.c_int(_MAX_DYNAMIC_SMEM), smem_bytes)

    def launch(self, grid: tuple[int, ...], threads: int, values: Sequence[Any], stream: int) -> None:
        """Launches it on the current device; `values` in the order of `parameters`, tensors as addresses."""
        packed = self._arguments.pack(values)
        x, y, z = grid
        code = _launch_kernel()(
            self._function, x, y, z, threads, 1, 1, self._smem_bytes, stream, packed.pointers_address, None
        )
        self._arguments.take_back(packed)
        if code:
            _refuse("cuLaunchKernel", code)


@dataclasses.dataclass(frozen=True)
class Packed:
    """The arguments of one launch: a block of memory with their values, and the address of each in it."""

    values: ctypes.Array
    pointers: ctypes.Array
    pointers_address: int


class Arguments:
    """How the arguments of a kernel lie in memory for the driver, which copies them within the launch call.

    Blocks are used again: one is owned by a single launch at a time, so that threads can share a kernel."""

    def __init__(self, parameters: tuple[Parameter, ...]) -> None:
        formats = [_FORMATS[parameter.kind] for parameter in parameters]
        self._struct = struct.Struct("@" + "".join(formats))
        # each ends where the struct up to it does
        self._offsets = [
            struct.calcsize("@" + "".join(formats[: i + 1])) - struct.calcsize(formats[i]) for i in range(len(formats))
        ]
        self._free: list[Packed] = []

    def pack(self, values: Sequence[Any]) -> Packed:
        """To be given back by `take_back` after the launch call; not before."""
        try:
            packed = self._free.pop()
        except IndexError:
            packed = self._new()
        self._struct.pack_into(packed.values, 0, *values)
        return packed

    def take_back(self, packed: Packed) -> None:
        self._free.append(packed)

    def _new(self) -> Packed:
        block = (ctypes.c_char * self._struct.size)()
        start = ctypes.addressof(block)
        pointers = (ctypes.c_void_p * len(self._offsets))(*[start + offset for offset in self._offsets])
        return Packed(block, pointers, ctypes.addressof(pointers))


def launch(program: Program, grid: tuple[int, ...], args: dict[str, Any], num_warps: int) -> None:
    """Launches a program on the current device and stream; the first launch there loads it, or compiles it too.

    Raises:
        CompileError: it does not compile, or the driver refuses it.
        DeviceError: TileLang or nvcc is not there.
    """
    import torch

    device = torch.cuda.current_device()
    enter_context(device)
    found = loaded(program, device)
    arguments = (args[name] for name in found.parameters)
    values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
    found.launch((*grid, 1, 1)[:3], num_warps * WARP, values, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=4096)
def loaded(program: Program, device: int) -> Loaded:
    """A program on a device, which must be current and its context entered."""
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return Loaded(program, f"sm_{major}{minor}")


def enter_context(device: int) -> None:
    """The device's primary context, torch's own: a thread such as autograd's may not have entered it yet. One that has
    is not asked again: torch takes it from device to device."""
    if getattr(_thread, "has_context", False):
        return
    context = ctypes.c_void_p()
    _call("cuCtxGetCurrent", ctypes.byref(context))
    if not context:
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        _call("cuCtxSetCurrent", context)
    _thread.has_context = True


@functools.lru_cache(maxsize=None)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.lru_cache(maxsize=None)
def _launch_kernel() -> Any:
    function = _driver().cuLaunchKernel
    sizes, address = [ctypes.c_uint] * 7, ctypes.c_void_p
    function.argtypes = [address, *sizes, address, address, address]
    return function


def _call(function: str, *arguments: Any) -> None:
    code = getattr(_driver(), function)(*arguments)
    if code:
        _refuse(function, code)


def _refuse(function: str, code: int) -> NoReturn:
    text = ctypes.c_char_p()
    _driver().cuGetErrorName(code, ctypes.byref(text))
    name = text.value.decode() if text.value else str(code)
    raise CompileError("the CUDA driver must accept a compiled kernel", f"{name} from {function}", "see the cause")
