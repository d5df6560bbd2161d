"""The machine a search finds: its devices, a worker for each, and the backends that run there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sse_tune.device import Device
from sse_tune.errors import SearchError
from sse_tune.templates.registry import BACKENDS, default_backend, graph_of, is_compiled
from sse_tune.tuning.ahead import CompileAhead
from sse_tune.tuning.evaluate import Job
from sse_tune.tuning.lanes import Lanes
from sse_tune.tuning.worker import Worker

_DETECTION_S = 120.0
Named = Device | torch.device | str | Sequence[str] | None


def workers_for(device: Named, *, threads: int | None = None) -> list[Worker]:
    """A worker for each device that is named; one that is named by its number sees no other GPU.

    Args:
        device: one or several.
        threads: the CPU threads of each; None: torch's choice.

    Raises:
        SearchError: the names are of different kinds, or a GPU is named twice.
    """
    names = _names(device)
    numbers = [int(name.split(":")[1]) if name.startswith("cuda:") else None for name in names]
    gpus = [number for number in numbers if number is not None]
    if len({name.split(":")[0] for name in names}) > 1 or len(set(gpus)) < len(gpus) or (
        len(names) > 1 and len(gpus) < len(names) and names[0].startswith("cuda")
    ):  # fmt: skip
        raise SearchError("the devices must be different ones of a kind", ", ".join(names), "name cuda:0,cuda:1")
    return [Worker(gpu=number, threads=threads) for number in numbers]


def detect(lanes: Lanes, device: Named) -> Device:
    """What the workers run on, asked in each: this process never touches a GPU.

    Raises:
        SearchError: a device is not there, or they differ.
    """
    if isinstance(device, Device):
        return device
    # a worker that sees one GPU has it as its first
    name = _names(device)[0].split(":")[0] or None
    found: list[Device] = []
    for done in lanes.run_in_each(Job(Device.detect, (name,), _DETECTION_S)):
        if done.outcome != "ok":
            raise SearchError("the device must be there", str(done.reason), "run `sse-tune doctor`")
        found.append(done.value)
    if len({(one.slug, one.arch) for one in found}) > 1:
        raise SearchError("devices that share a search must be equal", ", ".join(one.name for one in found),
                          "search on each kind apart")  # fmt: skip
    return found[0]


def backends_for(backends: Sequence[str] | None, device: Device) -> tuple[str, ...]:
    """The backends to search, what an untuned call would use first.

    Raises:
        SearchError: one is not known, or needs a GPU that is not there.
    """
    if backends is None:
        return (default_backend(device),)
    unknown = [backend for backend in backends if backend not in BACKENDS]
    if unknown or not backends:
        known = ", ".join(BACKENDS)
        raise SearchError("the backends must be known", ", ".join(unknown) or "none", f"choose of {known}")
    staged = [backend for backend in backends if graph_of(backend) == "staged"]
    if device.kind == "cpu" and staged:
        raise SearchError(f"{', '.join(staged)} kernels need a GPU", device.name, "use --backends torch here")
    usual = default_backend(device)
    return tuple(sorted(dict.fromkeys(backends), key=lambda backend: backend != usual))


def compilers_for(backends: Sequence[str], device: Device) -> CompileAhead | None:
    """What compiles candidates while others run; None: there is nothing to compile."""
    is_needed = device.kind == "cuda" and any(is_compiled(backend) for backend in backends)
    return CompileAhead(device) if is_needed else None


def _names(device: Named) -> list[str]:
    if device is None or isinstance(device, Device):
        return [""]
    if isinstance(device, (str, torch.device)):
        return [str(device)]
    names = [str(name) for name in device]
    if not names:
        raise SearchError("a device must be named", "none", "name cuda:0,cuda:1, or leave it out")
    return names
