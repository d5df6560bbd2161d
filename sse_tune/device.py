"""The processor kernels are tuned for and run on: what its limits are, and which toolchain builds for it."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

from sse_tune.errors import DeviceError

if TYPE_CHECKING:
    import torch

TOOLCHAIN_PACKAGES = ("torch", "triton", "tilelang")


@dataclasses.dataclass(frozen=True)
class Device:
    """One processor model.

    Args:
        kind: "cuda" or "cpu".
        name: as the driver or the operating system gives it, "NVIDIA H200".
        arch: "sm_90" for a GPU, "x86_64" and the like for a CPU.
        multiprocessors: SMs of a GPU, cores of a CPU.
        smem_per_block_bytes: shared memory one block may use; 0 on a CPU.
        l2_bytes: last-level cache; 0 where unknown.
        memory_bytes: device memory; 0 where unknown.
    """

    kind: str
    name: str
    arch: str
    multiprocessors: int
    smem_per_block_bytes: int = 0
    l2_bytes: int = 0
    memory_bytes: int = 0

    @property
    def slug(self) -> str:
        """A file-system name: `nvidia-h200`."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def capability(self) -> int:
        """90 for sm_90; 0 for a CPU."""
        return int(self.arch.removeprefix("sm_")) if self.kind == "cuda" else 0

    @classmethod
    def from_arch(cls, arch: str) -> Device:
        """A GPU known by its architecture alone, for compiling without one.

        Raises:
            DeviceError: the architecture is not one of `ARCHS`.
        """
        if arch not in ARCHS:
            raise DeviceError("the architecture must be known", f"{arch!r}", f"choose one of {', '.join(ARCHS)}")
        return ARCHS[arch]

    @classmethod
    def detect(cls, device: torch.device | str | None = None) -> Device:
        """The processor of a torch device; None: the current GPU if there is one, else the CPU.

        Raises:
            DeviceError: a GPU is asked for and there is none.
        """
        import torch

        chosen = torch.device(device) if device is not None else None
        if chosen is None:
            chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if chosen.type == "cpu":
            return _cpu()
        if chosen.type != "cuda" or not torch.cuda.is_available():
            raise DeviceError("the device must be a CPU or an available CUDA GPU", f"{chosen}", "use device='cpu'")
        return _gpu(chosen.index if chosen.index is not None else torch.cuda.current_device())


@functools.lru_cache(maxsize=None)
def _cpu() -> Device:
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return Device("cpu", name or "cpu", platform.machine(), os.cpu_count() or 1)


@functools.lru_cache(maxsize=None)
def _gpu(index: int) -> Device:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return Device(
        kind="cuda",
        name=properties.name,
        arch=f"sm_{properties.major}{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        smem_per_block_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        l2_bytes=properties.L2_cache_size,
        memory_bytes=properties.total_memory,
    )


# Shared memory a block may opt in to: CUDA C++ Programming Guide, table "Technical Specifications per Compute
# Capability". The multiprocessor counts are those of the architecture's data-centre card.
ARCHS: dict[str, Device] = {
    "sm_80": Device("cuda", "sm_80", "sm_80", 108, 163 * 1024),
    "sm_90": Device("cuda", "sm_90", "sm_90", 132, 227 * 1024),
    "sm_100": Device("cuda", "sm_100", "sm_100", 148, 227 * 1024),
}


def usable_cores() -> int:
    """The processor cores that this process may run on: less than there are under taskset or a batch system."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def program_output(*command: str) -> str | None:
    """What a program prints; None: it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def driver_version() -> str | None:
    """The NVIDIA driver, as nvidia-smi tells it; None where that is not to be had."""
    said = program_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0].strip() if said else None


def toolchain() -> dict[str, str | None]:
    """Installed versions of the packages that decide what machine code a template becomes; imports none of them."""
    versions: dict[str, str | None] = {}
    for package in TOOLCHAIN_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions
