"""TileLang: a program to a cubin, by TileLang's code generator and the machine's nvcc; kept on disk.

A program is built from constants alone, so it is compiled once for each set of them and found again by a key over its
sources, the constants, the architecture and the versions of both compilers. What the launcher needs besides the
binary (the order of the parameters, shared memory) stands beside it. Nothing here needs a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from typing import Any

from sse_tune.compilers.artifacts import KernelArtifact, Launch, one_line
from sse_tune.device import Device, program_output, toolchain
from sse_tune.errors import CompileError, DeviceError
from sse_tune.templates.registry import Program, source_hash

# Architectures whose own instructions (wgmma, tcgen05) are in a variant of their name.
_OWN_INSTRUCTIONS = ("sm_90", "sm_100")
# Copies go by cp.async and the loop's own waits: no pass may move them, or make them the copy engine's.
_PASSES = {
    "tl.disable_tma_lower": True,
    "tl.disable_warp_specialized": True,
    "tl.disable_safe_memory_legalize": True,  # the kernels mask by rows; no other index can be out of range
}
_OWN_BARRIERS = {"tl.disable_thread_storage_sync": True}
_FLAGS = ("-O3", "-std=c++20", "-w", "-Xptxas", "-v")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a compiled kernel: "pointer", "int32", "int64" or "float32"."""

    name: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled program.

    Args:
        name: of the kernel function.
        parameters: in the order of the binary.
        registers: of a thread.
        stack_bytes: of a thread; what does not fit in registers lives there.
        dynamic_smem_bytes: shared memory to ask for at the launch.
        static_smem_bytes: shared memory beside it.
        cubin: the binary.
    """

    name: str
    parameters: tuple[Parameter, ...]
    registers: int
    stack_bytes: int
    dynamic_smem_bytes: int
    static_smem_bytes: int
    cubin: bytes = dataclasses.field(repr=False)


def cache_folder() -> pathlib.Path:
    """Where compiled programs are kept, a folder each: `~/.cache/sse_tune/tilelang`."""
    return pathlib.Path.home() / ".cache" / "sse_tune" / "tilelang"


def missing() -> str | None:
    """What TileLang programs lack on this machine to be compiled; None: nothing."""
    if importlib.util.find_spec("tilelang") is None:
        return "the package tilelang is not installed: pip install tilelang"
    if nvcc() is None:
        return "nvcc is neither on the PATH nor in /usr/local/cuda/bin: install the CUDA toolkit"
    return None


@functools.lru_cache(maxsize=None)
def nvcc() -> str | None:
    """The CUDA compiler's path."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@functools.lru_cache(maxsize=None)
def _versions() -> tuple[str, str]:
    """Of TileLang and nvcc, which together decide what a program becomes.

    Raises:
        DeviceError: one of them is not there.
    """
    lacks = missing()
    if lacks is not None:
        rule, remedy = lacks.split(": ", 1)
        raise DeviceError("TileLang templates need the package tilelang and nvcc", rule, remedy)
    release = re.findall(r"release [^,]+, (V\S+)", program_output(str(nvcc()), "--version") or "")
    return str(toolchain()["tilelang"]), release[0] if release else "unknown"


def compile_launch(launch: Launch, device: Device, what: str) -> KernelArtifact:
    """Raises CompileError when a compiler refuses the program, DeviceError when one is not there."""
    try:
        built = build(launch.kernel, device.arch)
    except (CompileError, DeviceError):
        raise
    except Exception as error:  # a compiler's failure may be of any type
        got = f"{what}: {one_line(error)}"
        raise CompileError("the compiler must accept a template", got, "choose another config") from error
    return KernelArtifact(
        name=built.name, registers=built.registers, spill_bytes=built.stack_bytes, num_warps=launch.num_warps,
        smem_bytes=built.dynamic_smem_bytes + built.static_smem_bytes, tensor_memory=0, grid=launch.grid, races=(),
        cubin=built.cubin,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def build(program: Program, arch: str) -> Built:
    """A program for an architecture, from the disk if it is there."""
    folder = cache_folder() / cache_key(program, arch)
    if not (folder / "kernel.json").exists():
        _store(folder, _compile(program, arch))
    found = json.loads((folder / "kernel.json").read_text(encoding="utf-8"))
    parameters = tuple(Parameter(name, kind) for name, kind in found.pop("parameters"))
    return Built(**found, parameters=parameters, cubin=(folder / "kernel.cubin").read_bytes())


def cache_key(program: Program, arch: str) -> str:
    parts = [
        program.module, program.factory, source_hash(program.sources), list(program.constants), arch, _versions(),
        sorted(_passes(program).items()), _FLAGS,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _passes(program: Program) -> dict[str, bool]:
    return _PASSES | (_OWN_BARRIERS if program.own_barriers else {})


def _store(folder: pathlib.Path, built: Built) -> None:
    """Puts the files in place at once: another process sees all of them or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix="."))
    fields = {field.name: getattr(built, field.name) for field in dataclasses.fields(built) if field.name != "cubin"}
    fields["parameters"] = [[parameter.name, parameter.kind] for parameter in built.parameters]
    (staging / "kernel.cubin").write_bytes(built.cubin)
    (staging / "kernel.json").write_text(json.dumps(fields), encoding="utf-8")
    try:
        os.rename(staging, folder)
    except OSError:  # another process was first
        shutil.rmtree(staging)
        if not (folder / "kernel.json").exists():
            raise


def _compile(program: Program, arch: str) -> Built:
    source, name, parameters, smem_bytes = _generate(program, arch)
    cubin, said = _assemble(source, _full_name(arch))
    found = re.search(r"(\d+) bytes stack frame.*?Used (\d+) registers(?:.*?(\d+) bytes smem)?", said, re.DOTALL)
    if found is None:
        raise CompileError("ptxas must tell what a kernel uses", f"{said.strip()[-200:]!r}", "check nvcc")
    return Built(
        name=name, parameters=parameters, registers=int(found[2]), stack_bytes=int(found[1]),
        dynamic_smem_bytes=smem_bytes, static_smem_bytes=int(found[3] or 0), cubin=cubin,
    )  # fmt: skip


def _full_name(arch: str) -> str:
    return f"{arch}a" if arch in _OWN_INSTRUCTIONS else arch


def _generate(program: Program, arch: str) -> tuple[str, str, tuple[Parameter, ...], int]:
    """CUDA C++ of a program, the name and parameters of its kernel, and its dynamic shared memory."""
    from tilelang import tvm
    from tilelang.engine.lower import lower

    target = tvm.target.Target({"kind": "cuda", "arch": _full_name(arch)})
    capability = int(arch.removeprefix("sm_"))
    factory = getattr(importlib.import_module(program.module), program.factory)
    with tvm.transform.PassContext(opt_level=3, config=_passes(program)), target:
        lowered = lower(factory(**dict(program.constants), CAPABILITY=capability), target=target)
    ((variable, function),) = lowered.device_mod.functions_items()
    attributes: Any = function.attrs
    smem_bytes = int(attributes["dyn_shared_memory_buf"]) if "dyn_shared_memory_buf" in attributes else 0
    return lowered.kernel_source, str(variable.name_hint), _parameters(function), smem_bytes


def _assemble(source: str, arch: str) -> tuple[bytes, str]:
    """The cubin, and what ptxas says of it."""
    from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

    with tempfile.TemporaryDirectory() as folder:
        text, binary = pathlib.Path(folder, "kernel.cu"), pathlib.Path(folder, "kernel.cubin")
        text.write_text(source, encoding="utf-8")
        command = [
            str(nvcc()), "--cubin", *_FLAGS, _gencode(arch), f"-I{TILELANG_TEMPLATE_PATH}", f"-I{CUTLASS_INCLUDE_DIR}",
            "-o", str(binary), str(text),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        said = done.stdout + done.stderr
        if done.returncode:
            raise CompileError("nvcc must accept a kernel", one_line(RuntimeError(said)), "choose another config")
        return binary.read_bytes(), said


def _gencode(arch: str) -> str:
    """Whose instructions nvcc uses, and what runs them."""
    return f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}"


def _parameters(function: Any) -> tuple[Parameter, ...]:
    """Of a lowered kernel; the source has them in this order, by names of its own where C++ has a use for them."""
    kinds = [str(variable.dtype) for variable in function.params]
    return tuple(
        Parameter(variable.name, "pointer" if kind == "handle" else kind)
        for variable, kind in zip(function.params, kinds)
    )
