"""What a record stays true for: the device, the toolchain and the template sources. A record that no longer fits is
kept, but not used, and whoever asks learns why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sse_tune.database.records import Answer, digest
from sse_tune.device import Device, toolchain
from sse_tune.errors import DeviceError, PlanError
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.templates.registry import find_template, templates_of

NOT_INSTALLED = "none"


def study_key(
    problem: Problem, device: Device, backends: tuple[str, ...], workload: Mapping[str, Any] | None = None
) -> str:
    """Names the searches that may continue each other: the same problem, device, toolchain and template sources.

    The problem counts exactly, not by its bucket: times of two lengths cannot be compared. So does the workload that it
    is the heaviest entry of, as plain data; None: it is searched alone.

    Raises:
        PlanError: no such backend.
        DeviceError: a backend's package is not installed.
    """
    chosen = tuple(sorted(set(backends)))
    present = toolchain()
    versions = {backend: _version_for(backend, present) for backend in chosen}
    sources = {
        f"{backend}:{template.name}": template.source_hash
        for backend in chosen
        for template in templates_of(backend)
        if problem.rule in template.rules
    }
    shown = "+".join(f"{backend}-{version}" for backend, version in versions.items())
    counted = [problem.to_dict(), device.slug, device.arch, versions, sources]
    exact = digest(counted if workload is None else [*counted, dict(workload)])[:16]
    return f"{problem.bucket.name}@{device.slug}@{shown}@{exact}"


def toolchain_of(plan: Plan, toolchain: Mapping[str, str | None]) -> dict[str, str]:
    """The versions that decide what a plan compiles to, of the packages in `toolchain` (`device.toolchain()`).

    Triton and TileLang stages count the exact version of their compiler; torch stages count torch's major and minor.
    A package that is not installed reads "none".
    """
    backends = sorted({choice.backend for choice in plan.stages.values()})
    return {backend: _version_for(backend, toolchain) for backend in backends}


def _version_for(backend: str, present: Mapping[str, str | None]) -> str:
    version = present.get(backend)
    if version is None:
        return NOT_INSTALLED
    return ".".join(version.split(".")[:2]) if backend == "torch" else version


def sources_of(plan: Plan) -> dict[str, str]:
    """Source hash of every template of a plan, by "backend:template".

    Raises:
        PlanError: a backend or template is not known.
        DeviceError: a backend's package is not installed.
    """
    used = sorted({(choice.backend, choice.template) for choice in plan.stages.values()})
    return {f"{backend}:{template}": find_template(backend, template).source_hash for backend, template in used}


def fits(answer: Answer, device: Device, toolchain: Mapping[str, str | None]) -> str | None:
    """Why an answer must not be used on this device with this toolchain; None: it fits."""
    if (answer.device, answer.arch) != (device.slug, device.arch):
        return f"measured on {answer.device} ({answer.arch}), and this is {device.slug} ({device.arch})"
    present = toolchain_of(answer.plan, toolchain)
    if answer.toolchain != present:
        return f"measured with {_versions(answer.toolchain)}, and here is {_versions(present)}"
    try:
        sources = sources_of(answer.plan)
    except (PlanError, DeviceError) as error:
        return str(error)
    if answer.sources != sources:
        changed = sorted(
            name for name in {*answer.sources, *sources} if answer.sources.get(name) != sources.get(name)
        )
        return f"measured with another source of {', '.join(changed)}"
    return None


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in sorted(versions.items())) or "no toolchain"
