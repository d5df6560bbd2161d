"""Sparse state expansion attention (SSE over GLA and GDN) by kernels that are tuned for the GPU at hand.

The public names are loaded on first use: `import sse_tune` loads no compiler, no database and touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    import sse_tune.layers as layers
    from sse_tune.database.store import TuningDatabase
    from sse_tune.device import Device
    from sse_tune.errors import (
        AdmissionError,
        CompileError,
        ConstraintError,
        DatabaseError,
        DeviceError,
        ExchangeError,
        PlanError,
        ProblemError,
        SearchError,
        SSETuneError,
        WorkerError,
        WorkloadError,
    )
    from sse_tune.plan import Plan
    from sse_tune.problem import Problem
    from sse_tune.runtime.kernel import Kernel, load_best
    from sse_tune.runtime.ops import load_balance_loss, sse_attention
    from sse_tune.tuning.search import search
    from sse_tune.tuning.workload import Workload

__all__ = [
    "AdmissionError", "CompileError", "ConstraintError", "DatabaseError", "Device", "DeviceError", "ExchangeError",
    "Kernel", "Plan", "PlanError", "Problem", "ProblemError", "SSETuneError", "SearchError", "TuningDatabase",
    "WorkerError", "Workload", "WorkloadError", "__version__", "layers", "load_balance_loss", "load_best", "search",
    "sse_attention",
]  # fmt: skip

# public name -> the module it is in
_HOMES = {
    "Device": "sse_tune.device",
    "Kernel": "sse_tune.runtime.kernel",
    "Plan": "sse_tune.plan",
    "Problem": "sse_tune.problem",
    "TuningDatabase": "sse_tune.database.store",
    "Workload": "sse_tune.tuning.workload",
    "load_balance_loss": "sse_tune.runtime.ops",
    "load_best": "sse_tune.runtime.kernel",
    "search": "sse_tune.tuning.search",
    "sse_attention": "sse_tune.runtime.ops",
}


def __getattr__(name: str) -> object:
    if name == "layers":
        return importlib.import_module("sse_tune.layers")
    if name not in __all__:
        raise AttributeError(f"module 'sse_tune' has no attribute {name!r}; it has {', '.join(__all__)}")
    found = getattr(importlib.import_module(_HOMES.get(name, "sse_tune.errors")), name)
    globals()[name] = found  # the next look-up does not come here
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
