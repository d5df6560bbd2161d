"""Triton: a launch to machine code, specialised exactly as the first launch on a GPU would be.

`triton.compile` leaves it in Triton's cache, and the process that later runs the config on a GPU finds it there.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

from sse_tune.compilers.artifacts import WARP, KernelArtifact, Launch, one_line
from sse_tune.device import Device
from sse_tune.errors import CompileError
from sse_tune.races import pipeline_races

ByPosition = dict[tuple[int, ...], Any]  # keyed as Triton does: (position of the parameter,)


def compile_launch(launch: Launch, device: Device, what: str) -> KernelArtifact:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("cuda", device.capability, WARP)
    try:
        signature, constants, attributes = specialise(launch, target)
        source = ASTSource(launch.kernel, signature, constants, attributes)
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:  # a compiler's failure may be of any type: Triton's, LLVM's, ptxas's, its own bug's
        got = f"{what}: {one_line(error)}"
        raise CompileError("the compiler must accept a template", got, "choose another config") from error
    cubin, made = compiled.asm["cubin"], compiled.metadata
    registers, stack = _resource_usage(cubin, what)
    return KernelArtifact(
        name=made.name, registers=registers, spill_bytes=stack, smem_bytes=made.shared, num_warps=made.num_warps,
        tensor_memory=getattr(made, "tmem_size", None) or 0, grid=launch.grid, cubin=cubin,
        races=pipeline_races(compiled.asm["ttgir"]),
    )  # fmt: skip


def specialise(launch: Launch, target: Any) -> tuple[dict[str, str], ByPosition, ByPosition]:
    """Signature, constants and attributes of a launch by the code that Triton runs at a launch.

    Tensors' addresses count as divisible by 16, as those of the allocator are: a meta tensor's address is 0.
    """
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"{kernel!r} is no compiled function; kernels under TRITON_INTERPRET=1 have no machine code")
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, unknown = binder(**launch.args)
    if unknown:
        raise TypeError(f"{kernel.__name__} has no parameters {sorted(unknown)}")
    signature = {param.name: kind for param, (kind, _) in zip(kernel.params, specialization)}
    values, found = list(bound.values()), list(enumerate(specialization))
    constants: ByPosition = {(i,): values[i] for i, (kind, _) in found if kind == "constexpr"}
    attributes: ByPosition = {(i,): backend.parse_attr(text) for i, (_, text) in found if isinstance(text, str)}
    return signature, constants, attributes


def _resource_usage(cubin: bytes, what: str) -> tuple[int, int]:
    """Registers and stack bytes of a thread, from the cuobjdump that Triton ships."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", done.stdout)}
    if done.returncode or set(usage) != {"REG", "STACK"}:
        said = (done.stderr or done.stdout).strip()
        raise CompileError("cuobjdump must tell what a kernel uses", f"{said!r} for {what}", "reinstall triton")
    return usage["REG"], usage["STACK"]
