"""How fast a device copies and multiplies, measured: the rates that `templates/roofline.py` makes a floor of."""

from __future__ import annotations

import torch

from sse_tune.device import Device
from sse_tune.runtime.pipeline import DTYPES
from sse_tune.templates.roofline import Ceilings
from sse_tune.tuning.measure import measure

_GPU_COPY_BYTES, _CPU_COPY_BYTES = 2 * 2**30, 256 * 2**20
_GPU_MATRIX, _CPU_MATRIX = 8192, 1024


def measure_ceilings(device: Device, dtype: str, time_limit_s: float = 1.0) -> Ceilings:
    """Copies memory and multiplies square matrices of random numbers on the device.

    Args:
        device: the one this process runs on.
        dtype: of the matrices: "bf16", "fp16" or "fp32" (with TF32 off, torch's default).
        time_limit_s: of each of the two.
    """
    gpu = device.kind == "cuda"
    where = "cuda" if gpu else "cpu"
    return Ceilings(
        _copy_rate(_GPU_COPY_BYTES if gpu else _CPU_COPY_BYTES, where, time_limit_s),
        _matmul_rate(_GPU_MATRIX if gpu else _CPU_MATRIX, DTYPES[dtype], where, time_limit_s),
    )


def _copy_rate(size_bytes: int, where: str, time_limit_s: float) -> float:
    source = torch.ones(size_bytes // 4, dtype=torch.float32, device=where)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), where, time_limit_s=time_limit_s)
    return 2 * source.numel() * source.element_size() / (timing.median_us * 1e-6)


def _matmul_rate(size: int, dtype: torch.dtype, where: str, time_limit_s: float) -> float:
    a, b = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))  # zeros would run faster
    timing = measure(lambda: a @ b, where, time_limit_s=time_limit_s)
    return 2 * size**3 / (timing.median_us * 1e-6)
