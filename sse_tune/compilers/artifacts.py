"""A launch as a template asked for it, and the kernel that a compiler made of it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

WARP = 32


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch as a template asked for it; `args` by parameter name."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class KernelArtifact:
    """One compiled kernel.

    Args:
        name: of the kernel function.
        registers: of a thread.
        spill_bytes: stack frame of a thread; what does not fit in registers lives there.
        smem_bytes: shared memory of a block.
        tensor_memory: columns of tensor memory of a block, sm_100 and later.
        num_warps: of a block.
        grid: of the launch that was recorded.
        races: what its software pipeline overwrites too early, a reason each; such a kernel's results may vary.
        cubin: the binary.
    """

    name: str
    registers: int
    spill_bytes: int
    smem_bytes: int
    tensor_memory: int
    num_warps: int
    grid: tuple[int, ...]
    races: tuple[str, ...]
    cubin: bytes = dataclasses.field(repr=False)


def one_line(error: BaseException) -> str:
    """The cause of a compiler's failure: the innermost message, without the source excerpt and the listing."""
    while error.__cause__ is not None and str(error.__cause__).strip():
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^\t")] or ["no message"]
    # ptxas lists its command line and the PTX after the message; Triton's own errors end with theirs
    wanted = [line for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)]
    return f"{type(error).__name__}: {(wanted[:1] or lines[-1:])[0][:300]}"
