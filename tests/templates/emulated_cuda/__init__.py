"""Runs the CUDA source that TileLang generates for sm_80 or sm_90 on a CPU: what a kernel computes, and the waits it
lacks.

The source is compiled by g++ against stand-ins for the device functions it calls (emulated_cuda.h), each thread of a
block being a fiber, one block after another. It shows wrong indices, masks and arithmetic; reads and writes past the
end of a tensor, which lies against a page that faults (before its start: writes, as far as the page before); products
of shared memory that no fence of the async proxy followed; and waits and barriers that are missing, since copies and
products happen as late as their waits allow and each thread runs as far as it can before the next one does: run a
kernel in all MODES. Shared memory, registers and the targets of what is under way hold NaN.

It cannot show: what nvcc makes of the source, speed, the rounding inside tensor cores and of approximate functions,
races between blocks or of lanes within an instruction, arrays of shared memory overrun into the next one, a fence that
another thread's later one stands in for. The copy engine, its barriers and clusters are not emulated.

    template.run(Call(sizes, config, Launcher(Mode("late", "forward")), scale), tensors)

A function that the source calls and that is not there is an error of g++'s: give it a stand-in.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import mmap
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sse_tune.compilers import tilelang
from sse_tune.compilers.artifacts import WARP
from sse_tune.templates.registry import Program

_FLAGS = ("-O2", "-std=c++20", "-w", "-fPIC", "-shared", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE")
_TYPES = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float}
_ORDERS = ("forward", "backward", "scattered")
_POISON = b"\xff\x7f"  # as in the header
_ALIGNMENT = 16  # of a tensor's start, as a copy needs it


class EmulationError(RuntimeError):
    """A kernel did what it must not do."""


@dataclasses.dataclass(frozen=True)
class Mode:
    """When what is asynchronous happens, "late" or "at once"; and in which order threads run, one of _ORDERS."""

    timing: str = "late"
    order: str = "forward"

    def __str__(self) -> str:
        return f"{self.timing}, {self.order}"


MODES = tuple(Mode(timing, order) for timing in ("late", "at once") for order in _ORDERS)


@dataclasses.dataclass(frozen=True)
class Source:
    """What TileLang makes of a program."""

    text: str
    name: str
    parameters: tuple[tilelang.Parameter, ...]
    shared_bytes: int


def missing() -> str | None:
    """What this machine lacks; None: nothing."""
    if importlib.util.find_spec("tilelang") is None:
        return "the package tilelang is not installed"
    return None if shutil.which("g++") else "g++ is not on the PATH"


@functools.lru_cache(maxsize=None)
def generate(program: Program, arch: str) -> Source:
    """`arch`: "sm_80" or "sm_90"."""
    return Source(*tilelang._generate(program, arch))


class Launcher:
    """Runs each program a template launches, as generated for an architecture, on tensors of the CPU; `edit` changes
    its source before. A kernel of Triton's is run by Triton's interpreter, which must be on."""

    def __init__(self, mode: Mode, edit: Callable[[str], str] | None = None, arch: str = "sm_90") -> None:
        self._mode, self._edit, self._arch = mode, edit, arch

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], args: dict[str, Any], *, num_warps: int, num_stages: int
    ) -> None:
        if not isinstance(kernel, Program):
            kernel[grid](**args, num_warps=num_warps, num_stages=num_stages)
            return
        source = generate(kernel, self._arch)
        if self._edit is not None:
            source = dataclasses.replace(source, text=self._edit(source.text))
        run(source, grid, args, threads=num_warps * WARP, mode=self._mode)


def run(source: Source, grid: Sequence[int], args: Mapping[str, Any], *, threads: int, mode: Mode) -> None:
    """Runs a kernel on contiguous tensors, which it may write.

    Raises:
        EmulationError: it did what it must not do.
    """
    library = _compiled(source.text, source.name)
    values: list[Any] = []
    guarded: dict[str, _Guarded] = {}
    for parameter in source.parameters:
        value = args[parameter.name]
        if parameter.kind == "pointer":
            guarded[parameter.name] = _Guarded(value)
            values.append(ctypes.c_void_p(guarded[parameter.name].start))
        else:
            values.append(_TYPES[parameter.kind](value))
    addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    extents = (ctypes.c_int * 3)(*(*grid, 1, 1)[:3])
    library.emulated_launch.restype = ctypes.c_char_p
    said = library.emulated_launch(
        addresses, extents, threads, source.shared_bytes, int(mode.timing == "late"), _ORDERS.index(mode.order)
    )
    if said is not None:
        fault = ctypes.c_void_p.in_dll(library, "emulated_fault").value
        where = "" if fault is None else "".join(each.place_of(name, fault) for name, each in guarded.items())
        raise EmulationError(f"{source.name}: {said.decode()}{where}")
    for name, each in guarded.items():
        if not each.is_intact():
            raise EmulationError(f"{source.name}: something is written beside {name}")
        each.copy_back()


@functools.lru_cache(maxsize=64)
def _compiled(text: str, name: str) -> ctypes.CDLL:
    text = re.sub(r"^\s*#include.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"extern __shared__ [^;]*;", "", text)  # the header has it
    text = re.sub(
        r'asm\("([\w.]+) %0, %1;" : "=\w"\((\w+)\) : "\w"\((\w+)\)\);',
        lambda found: f"{found[2]} = {found[1].replace('.', '_')}({found[3]});",
        text,
    )
    here = pathlib.Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        file, binary = pathlib.Path(folder, "kernel.cpp"), pathlib.Path(folder, "kernel.so")
        file.write_text(f'#include "emulated_cuda.h"\n{text}\nEMULATE({name})\n', encoding="utf-8")
        done = subprocess.run(
            ["g++", *_FLAGS, f"-I{here}", "-o", str(binary), str(file)], capture_output=True, text=True
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise EmulationError(f"{name}: g++ refuses it: {errors[:3] or done.stderr[-500:]}")
        return ctypes.CDLL(str(binary))


class _Guarded:
    """A copy of a tensor whose end lies against a page that must not be touched, and whose first page follows one."""

    def __init__(self, tensor: torch.Tensor) -> None:
        assert tensor.device.type == "cpu" and tensor.is_contiguous()
        self._tensor, self._bytes = tensor, tensor.numel() * tensor.element_size()
        padded = -(-self._bytes // _ALIGNMENT) * _ALIGNMENT
        room = -(-max(1, padded) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, room + 2 * mmap.PAGESIZE)
        self._first = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + mmap.PAGESIZE
        self._end = self._first + room
        self.start = self._end - padded
        ctypes.memmove(self._first, _POISON * (room // 2), room)
        ctypes.memmove(self.start, tensor.data_ptr(), self._bytes)
        self._beside_before = self._beside()
        for page in (self._first - mmap.PAGESIZE, self._end):
            if ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, 0):
                raise OSError("mprotect failed")

    def copy_back(self) -> None:
        ctypes.memmove(self._tensor.data_ptr(), self.start, self._bytes)

    def is_intact(self) -> bool:
        """Whether nothing was written beside it."""
        return self._beside() == self._beside_before

    def _beside(self) -> tuple[bytes, bytes]:
        before = ctypes.string_at(self._first, self.start - self._first)
        return before, ctypes.string_at(self.start + self._bytes, self._end - self.start - self._bytes)

    def place_of(self, name: str, address: int) -> str:
        """Words for an address within a page of the tensor's ends, else none."""
        if self._end <= address < self._end + mmap.PAGESIZE:
            return f", {address - self.start - self._bytes} bytes past the end of {name}"
        if self._first - mmap.PAGESIZE <= address < self._first:
            return f", {self.start - address} bytes before {name}"
        return ""
