"""Bound launches: the arguments a kernel gets are those of this launch, whatever was launched before and beside it."""

import ctypes
import struct
import types

import pytest
import torch
import triton

from sse_tune.compilers import bound, cubin
from sse_tune.compilers.artifacts import Launch
from sse_tune.compilers.bound import Pointer
from sse_tune.compilers.tilelang import Parameter
from sse_tune.compilers.triton import specialise
from sse_tune.errors import CompileError
from sse_tune.templates.registry import Program
from sse_tune.templates.triton.combine import sum_rows_kernel

PARAMETERS = tuple(
    Parameter(name, kind)
    for name, kind in (
        ("n", "int32"), ("x", "pointer"), ("scale", "float32"), ("m", "int32"), ("big", "int64"), ("y", "pointer"),
        ("last", "int32"),
    )
)  # fmt: skip
VALUES = (-3, 2**63 + 16, 0.5, 7, -(2**40), 48, 9)
ARGS = dict(
    rows=Pointer(torch.bfloat16), inv=Pointer(torch.int32), out=Pointer(torch.bfloat16), R=64, D=128, first_row=0, L=3,
    FIRST=0, LAST=3, BT=16, BD=64,
)  # fmt: skip
LAUNCH = Launch(sum_rows_kernel, (4, 2), ARGS, 8, 1)
needs_compiled_kernels = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="kernels are the interpreter's")


def read(packed, parameters=PARAMETERS):
    """The values as the driver would find them."""
    kinds = {"pointer": ctypes.c_uint64, "int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float}
    addresses = (ctypes.c_uint64 * len(parameters)).from_address(packed.pointers_address)
    return tuple(kinds[p.kind].from_address(address).value for p, address in zip(parameters, addresses))


def test_packed_arguments_are_the_values():
    arguments = cubin.Arguments(PARAMETERS)
    assert read(arguments.pack(VALUES)) == VALUES


def test_a_block_belongs_to_one_launch_at_a_time():
    arguments = cubin.Arguments(PARAMETERS)
    first, other = arguments.pack(VALUES), (1, 2, 3.0, 4, 5, 6, 7)
    second = arguments.pack(other)
    assert (read(first), read(second)) == (VALUES, other)
    arguments.take_back(first)
    again = arguments.pack(other)
    assert again is first and read(again) == other
    assert arguments.pack(VALUES) is not again and read(again) == other


def test_an_argument_that_does_not_fit_is_refused():
    with pytest.raises(struct.error):
        cubin.Arguments(PARAMETERS[:1]).pack((2**31,))


def test_a_program_is_launched_with_what_it_is_handed(monkeypatch):
    seen = []

    class Loaded:
        parameters = ("x", "n")

        def launch(self, *arguments):
            seen.append(arguments)

    devices = []
    monkeypatch.setattr(cubin, "loaded", lambda program, device: devices.append(device) or Loaded())
    program = Program("module", "factory", (), ())
    names, run = bound.bind(Launch(program, (5,), {"n": 3, "x": Pointer(torch.float32)}, 4, 1), 1)
    run((32, 3), 77)
    assert names == ("x", "n") and devices == [1] and seen == [((5, 1, 1), 128, (32, 3), 77)]


class Compiled:
    """In place of a kernel that Triton compiled."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.runs = []

    def run(self, *arguments):
        self.runs.append(arguments)

    def launch_metadata(self, *arguments):
        return ("seen by hooks", arguments)


@pytest.fixture
def by_triton(monkeypatch):
    """What Triton's own launcher was asked for, and the kernel that it compiled."""
    asked, compiled = [], Compiled()
    monkeypatch.setattr(sum_rows_kernel, "run", lambda **given: asked.append(given) or compiled)
    return asked, compiled


def values_of(names, **changes):
    numbers = {name: value for name, value in ARGS.items() if not isinstance(value, Pointer)}
    return tuple({**numbers, "rows": 16, "inv": 32, "out": 48, **changes}[name] for name in names)


@needs_compiled_kernels
def test_triton_makes_the_first_launch_and_its_kernel_the_next_ones(by_triton):
    asked, compiled = by_triton
    names, run = bound.bind(LAUNCH, 0)
    run(values_of(names), 7)
    (given,) = asked
    assert given["grid"] == (4, 2) and given["num_warps"] == 8 and given["num_stages"] == 1 and given["R"] == 64
    assert (given["rows"].dtype, given["rows"].data_ptr()) == (torch.bfloat16, 16) and not compiled.runs
    later = values_of(names, rows=160)
    run(later, 8)
    assert len(asked) == 1
    assert compiled.runs == [(4, 2, 1, 8, "function", "metadata", None, None, None, *later)]


@needs_compiled_kernels
def test_hooks_of_a_profiler_see_every_launch(by_triton, monkeypatch):
    _, compiled = by_triton
    names, run = bound.bind(LAUNCH, 0)
    values = values_of(names)
    run(values, 7)
    chain = types.SimpleNamespace(calls=["a profiler's"])
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", chain)
    run(values, 7)
    metadata, enter = compiled.runs[0][6:8]
    assert metadata == ("seen by hooks", ((4, 2, 1), 7, *values)) and enter is chain


@needs_compiled_kernels
def test_an_address_is_specialised_as_a_tensor_is():
    from triton.backends.compiler import GPUTarget

    def specialised(args):
        return specialise(Launch(sum_rows_kernel, (1,), args, 8, 1), GPUTarget("cuda", 90, 32))

    dtypes = {name: value.dtype for name, value in ARGS.items() if isinstance(value, Pointer)}
    tensors = ARGS | {name: torch.empty(4, dtype=dtype, device="meta") for name, dtype in dtypes.items()}
    aligned = ARGS | {name: bound._Address(dtype, 4096) for name, dtype in dtypes.items()}
    odd = {**aligned, "rows": bound._Address(torch.bfloat16, 4098)}
    assert specialised(aligned) == specialised(tensors) != specialised(odd)


def test_kernels_of_the_interpreter_are_not_for_a_gpu():
    with pytest.raises(CompileError, match="unset TRITON_INTERPRET"):
        bound.bind(Launch(object(), (1,), {}, 1, 1), 0)
