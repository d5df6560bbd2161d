"""Launches compiled programs through the CUDA driver: on the current device and stream, without synchronising.

The binary is loaded once for each device. Arguments are checked for being there, not for their shapes: those are the
contract's. A launch allocates nothing on the device, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from sse_tune.compilers.artifacts import WARP
from sse_tune.compilers.tilelang import Parameter, build
from sse_tune.errors import CompileError
from sse_tune.templates.registry import Program

_MAX_DYNAMIC_SMEM = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_C_TYPES: dict[str, Any] = {
    "pointer": ctypes.c_void_p, "int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float
}  # fmt: skip


class Loaded:
    """A program on one device."""

    def __init__(self, program: Program, arch: str) -> None:
        self._built = build(program, arch)
        self._function = ctypes.c_void_p()
        module = ctypes.c_void_p()
        _call("cuModuleLoadData", ctypes.byref(module), self._built.cubin)
        _call("cuModuleGetFunction", ctypes.byref(self._function), module, self._built.name.encode())
        smem_bytes = self._built.dynamic_smem_bytes
        _call("cuFuncSetAttribute", self._function, ctypes.c_int(_MAX_DYNAMIC_SMEM), ctypes.c_int(smem_bytes))

    def __call__(self, grid: tuple[int, ...], args: dict[str, Any], num_warps: int, stream: int) -> None:
        values = [_value(parameter, args) for parameter in self._built.parameters]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        x, y, z = (*grid, 1, 1)[:3]
        _call(
            "cuLaunchKernel", self._function, x, y, z, num_warps * WARP, 1, 1, self._built.dynamic_smem_bytes,
            ctypes.c_void_p(stream), pointers, None,
        )  # fmt: skip


def launch(program: Program, grid: tuple[int, ...], args: dict[str, Any], num_warps: int) -> None:
    """Launches a program on the current device and stream; the first launch there loads it, or compiles it too.

    Raises:
        CompileError: it does not compile, or the driver refuses it.
        DeviceError: TileLang or nvcc is not there.
    """
    import torch

    device = torch.cuda.current_device()
    _enter_context(device)
    _loaded(program, device)(grid, args, num_warps, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=4096)
def _loaded(program: Program, device: int) -> Loaded:
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return Loaded(program, f"sm_{major}{minor}")


def _enter_context(device: int) -> None:
    """The device's primary context, torch's own: a thread such as autograd's may not have entered it yet."""
    context = ctypes.c_void_p()
    _call("cuCtxGetCurrent", ctypes.byref(context))
    if not context:
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        _call("cuCtxSetCurrent", context)


def _value(parameter: Parameter, args: dict[str, Any]) -> Any:
    value = args[parameter.name]
    return _C_TYPES[parameter.kind](value.data_ptr() if parameter.kind == "pointer" else value)


@functools.lru_cache(maxsize=None)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(function: str, *arguments: Any) -> None:
    code = getattr(_driver(), function)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(text))
        name = text.value.decode() if text.value else str(code)
        raise CompileError("the CUDA driver must accept a compiled kernel", f"{name} from {function}", "see the cause")
