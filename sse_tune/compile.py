"""Template + config + architecture -> compiled kernels and what they ask of the GPU; needs no GPU.

The stage's own launch code runs on meta tensors with a launcher that records instead of launching, so that what is
compiled here is what the first launch would compile. Each compiler leaves it in a cache on disk, and the process that
later runs the config on a GPU finds it there.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sse_tune.compilers import cubin, tilelang, triton
from sse_tune.compilers.artifacts import WARP, KernelArtifact, Launch
from sse_tune.device import Device
from sse_tune.errors import CompileError
from sse_tune.problem import Problem
from sse_tune.space import Config
from sse_tune.templates.buffers import BUFFERS, Sizes
from sse_tune.templates.registry import Call, Program, Template, is_compiled
from sse_tune.templates.stages import ROWS_OF_TOKENS, Stage, stages_of

if TYPE_CHECKING:
    import torch

    Spec = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a tensor

# What one block may use on every architecture of `device.ARCHS`: CUDA C++ Programming Guide, table "Technical
# Specifications per Compute Capability".
MAX_REGISTERS = 255  # of a thread
REGISTERS_PER_BLOCK = 65536
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_TENSOR_MEMORY = 512  # columns, sm_100


class GpuLauncher:
    """Runs each kernel on the GPU its tensors lie on (or in Triton's interpreter)."""

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], args: dict[str, Any], *, num_warps: int, num_stages: int
    ) -> None:
        if isinstance(kernel, Program):
            cubin.launch(kernel, grid, args, num_warps)
        else:
            kernel[grid](**args, num_warps=num_warps, num_stages=num_stages)


class RecordingLauncher:
    """Runs nothing and keeps the launches in order: works on meta tensors."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], args: dict[str, Any], *, num_warps: int, num_stages: int
    ) -> None:
        self.launches.append(Launch(kernel, tuple(int(extent) for extent in grid), dict(args), num_warps, num_stages))


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A compiled template: its kernels in launch order. Pickles, so that it can come from another process."""

    template: str
    config: Config
    arch: str
    kernels: tuple[KernelArtifact, ...]

    @property
    def registers(self) -> int:
        """Of a thread; as below, in the kernel that takes most."""
        return max(kernel.registers for kernel in self.kernels)

    @property
    def spill_bytes(self) -> int:
        return max(kernel.spill_bytes for kernel in self.kernels)

    @property
    def smem_bytes(self) -> int:
        """Of a block."""
        return max(kernel.smem_bytes for kernel in self.kernels)

    @property
    def cubin_bytes(self) -> int:
        return sum(len(kernel.cubin) for kernel in self.kernels)

    @property
    def races(self) -> tuple[str, ...]:
        """Of all kernels: "<kernel>: <race>"."""
        return tuple(f"{kernel.name}: {race}" for kernel in self.kernels for race in kernel.races)


def compile_stage(
    template: Template, problem: Problem, outer: Config, config: Config, arch: str, *, with_states: bool = True
) -> Artifact:
    """Compiles every kernel a stage launches, for a GPU architecture that need not be here.

    Args:
        template: of a stage of the staged graph.
        problem: decides the constants the kernels are specialised for.
        outer: the plan's outer choices.
        config: the template's config.
        arch: "sm_90".
        with_states: compile the variant that reads an initial and writes a final state and their gradients, the
            largest; False: the one without.

    Returns:
        The kernels with their registers, spills, shared memory and races; `limits_reason` says whether they can run.

    Raises:
        CompileError: the compiler refused it, or there is nothing to compile.
        DeviceError: no such architecture, or no compiler on this machine.
    """
    device = Device.from_arch(arch)
    stage = next((stage for stage in stages_of(problem, outer) if stage.name == template.stage), None)
    if not is_compiled(template.backend) or stage is None:
        raise CompileError(
            "only a template of a stage of the problem's graph can be compiled ahead of its run",
            f"template {template.name!r} of {template.backend}, stage {template.stage!r}, with nothing to compile",
            "run it instead",
        )
    launches = record_launches(template, problem, outer, config, with_states=with_states)
    shown = ", ".join(f"{name}={value}" for name, value in {**outer, **config}.items())
    what = f"{template.name} for {arch} with {shown}"
    if not launches:
        raise CompileError("a template must launch a kernel to be compiled", f"none from {what}", "run it instead")
    return Artifact(template.name, config, arch, tuple(_compile(launch, device, what) for launch in launches))


def record_launches(
    template: Template, problem: Problem, outer: Config, config: Config, *, with_states: bool = True
) -> list[Launch]:
    """The launches a stage would make, on meta tensors."""
    sizes, launcher = Sizes.of(problem, outer), RecordingLauncher()
    stage = next(stage for stage in stages_of(problem, outer) if stage.name == template.stage)
    tensors = meta_tensors(stage, sizes, outer, with_states=with_states)
    template.run(Call(sizes, Config({**outer, **config}), launcher, problem.key_dim**-0.5), tensors)
    return launcher.launches


def meta_tensors(stage: Stage, sizes: Sizes, outer: Config, *, with_states: bool = True) -> dict[str, torch.Tensor]:
    """The tensors a template of `stage` is handed, without memory: the call's own, and the stage's buffers.

    Gates are of `Problem.gate_dtype`, beta and logits fp32, as the layers hand them over.
    """
    import torch

    dtypes = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32, fp64=torch.float64, int32=torch.int32)
    problem = sizes.problem
    io = dtypes[problem.dtype]
    key = (sizes.tokens, problem.num_heads, problem.key_dim)
    value = (sizes.tokens, problem.num_heads, problem.value_dim)
    state = (problem.sequences, problem.partitions, problem.num_heads, problem.key_dim, problem.value_dim)
    inputs: dict[str, Spec] = {"q": (key, io), "k": (key, io), "v": (value, io)}
    inputs["g"] = (key if problem.rule == "gla" else key[:2], dtypes[problem.gate_dtype])
    if problem.rule == "gdn":
        inputs["beta"] = (key[:2], torch.float32)
    inputs |= {f"shared_{name}": spec for name, spec in inputs.items() if name != "v"}
    if problem.num_partitions:
        inputs["router_logits"] = ((sizes.tokens, problem.num_partitions), torch.float32)
    results: dict[str, Spec] = {"o": (value, io), "do": (value, io)}
    if with_states:
        inputs["initial_state"] = results["final_state"] = results["d_final_state"] = (state, torch.float32)
    results |= {f"d_{name}": spec for name, spec in inputs.items()}
    specs = {**inputs, "cu_seqlens": ((problem.sequences + 1,), torch.int32)}
    for name in (*stage.reads, *stage.writes):
        if name in BUFFERS:
            buffer = BUFFERS[name]
            specs[name] = (buffer.shape(sizes), dtypes[buffer.dtype_in(problem, outer)])
        elif name in results:
            specs[name] = results[name]
            if name in ROWS_OF_TOKENS and not problem.num_partitions:
                specs[ROWS_OF_TOKENS[name]] = results[name]
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in specs.items()}


def limits_reason(artifact: Artifact, device: Device) -> str | None:
    """Why an artifact cannot run on a device, or must not since it is racy; None if it can."""
    if artifact.races:
        return artifact.races[0]
    for kernel in artifact.kernels:
        for what, used, limit in (
            ("shared memory of a block, bytes", kernel.smem_bytes, device.smem_per_block_bytes),
            ("registers of a thread", kernel.registers, MAX_REGISTERS),
            ("registers of a block", kernel.registers * kernel.num_warps * WARP, REGISTERS_PER_BLOCK),
            ("tensor memory of a block, columns", kernel.tensor_memory, MAX_TENSOR_MEMORY),
            *((f"grid along {axis}", used, limit) for axis, used, limit in zip("xyz", kernel.grid, MAX_GRID)),
        ):
            if used > limit:
                return f"{kernel.name}: {what}: {used} > {limit} of {device.name}"
    return None


def _compile(launch: Launch, device: Device, what: str) -> KernelArtifact:
    if isinstance(launch.kernel, Program):
        return tilelang.compile_launch(launch, device, what)
    return triton.compile_launch(launch, device, what)
