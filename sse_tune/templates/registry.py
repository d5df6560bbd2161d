"""Templates by backend, stage and rule; the default plan; and the check that a plan from a file is one of ours."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from sse_tune.device import Device
from sse_tune.errors import ConstraintError, DeviceError, PlanError
from sse_tune.plan import Plan, StageChoice
from sse_tune.problem import Problem
from sse_tune.space import Config, Space
from sse_tune.templates.buffers import Sizes
from sse_tune.templates.stages import GRAPHS, stage_names

if TYPE_CHECKING:
    import torch


class Launcher(Protocol):
    """Runs, compiles or counts a kernel: what a template hands its launches to (`compile.py` has the kinds)."""

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], args: dict[str, Any], *, num_warps: int, num_stages: int
    ) -> None: ...


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel that its compiler builds whole from constants, named rather than held so that it costs no import.

    Args:
        module: where the factory is.
        factory: `factory(**constants, CAPABILITY=90)` gives the compiler's own object.
        constants: name and value, all that the code depends on.
        sources: the modules whose code it is.
        own_barriers: every barrier it needs is written out, and its compiler adds none.
    """

    module: str
    factory: str
    constants: tuple[tuple[str, int | float | str | bool], ...]
    sources: tuple[str, ...]
    own_barriers: bool = False


@dataclasses.dataclass(frozen=True)
class Call:
    """What a template's launch gets besides its tensors.

    Args:
        sizes: host-known sizes of this call.
        config: the template's config and the plan's outer choices together.
        launch: the launcher.
        scale: what multiplies q·k, K^-1/2 unless the user says otherwise.
    """

    sizes: Sizes
    config: Config
    launch: Launcher
    scale: float


@dataclasses.dataclass(frozen=True)
class Template:
    """One stage written once in one backend.

    `run(call, tensors)` reads and writes the tensors named in its stage; it allocates only scratch of its own.
    """

    backend: str
    name: str
    stage: str
    rules: tuple[str, ...]
    space: Space
    run: Callable[[Call, Mapping[str, torch.Tensor]], None]
    sources: tuple[str, ...]

    @property
    def source_hash(self) -> str:
        """Sixteen hex digits over the code of the template's modules; comments and docstrings do not count."""
        return source_hash(self.sources)

    def __reduce__(self) -> tuple:
        # constraints are lambdas, which do not pickle: a template travels to a worker process by its name
        return find_template, (self.backend, self.name)


@functools.lru_cache(maxsize=None)
def source_hash(modules: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for module in modules:
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None, f"template module {module} is not there"
        digest.update(code_text(pathlib.Path(spec.origin).read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:16]


def code_text(source: str) -> str:
    """The syntax tree of a module as text that is the same under every version of Python, without comments and
    docstrings: `ast.dump` adds fields, and leaves empty ones out, from one version to the next."""
    return _node_text(ast.parse(source))


def _node_text(node: object) -> str:
    if isinstance(node, list):
        return "[" + ",".join(map(_node_text, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = []
    for name in sorted(node._fields):
        value = getattr(node, name, None)
        if name == "body" and isinstance(value, list):
            value = value[_has_docstring(value) :]
        # fields that say nothing or that some versions have not got
        if value not in (None, []) and name not in ("ctx", "kind", "type_comment", "type_params"):
            parts.append(f"{name}={_node_text(value)}")
    return f"{type(node).__name__}({','.join(parts)})"


def _has_docstring(body: list) -> bool:
    first = body[0] if body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


# backend -> the package it needs, the graph its templates belong to, and its modules; imported on first use, so that
# `import sse_tune` loads no compiler
_BACKENDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "triton": (
        "triton",
        "staged",
        tuple(
            f"sse_tune.templates.triton.{name}"
            for name in (
                "routing_recount", "routing", "gdn_prepare", "gdn_scan", "gdn_recompute", "gdn_state_gradient",
                "gdn_score_gradients", "gdn_gradients",
                "gdn_group_states", "gdn_group_gradients",
                "gla_prepare", "gla_scan", "gla_recompute", "gla_state_gradient",
                "gla_decay_rows", "gla_states", "gla_states_split", "gla_output", "gla_states_backward",
                "gla_states_backward_split", "gla_value_gradients", "gla_states_output", "gla_states_value_gradients",
                "gla_gradients_sliced",
                "combine", "combine_gradients",
            )
        ),
    ),
    "tilelang": (
        "tilelang",
        "staged",
        tuple(
            f"sse_tune.templates.tilelang.{name}"
            for name in (
                "gdn_prepare", "gdn_scan", "gdn_scan_specialized", "gdn_scan_transposed", "gdn_recompute",
                "gdn_state_gradient", "gdn_state_gradient_specialized", "gdn_score_gradients", "gdn_gradients",
                "gla_decay_rows", "gla_states", "gla_output", "gla_states_backward", "gla_value_gradients",
                "gla_states_output", "gla_states_value_gradients", "gla_gradients",
            )
        ),
    ),
    "torch": ("torch", "whole", ("sse_tune.templates.torch.whole",)),
}
BACKENDS = tuple(_BACKENDS)
# backend -> those whose templates run the stages that it has none for, in its default plan
_BESIDE: dict[str, tuple[str, ...]] = {"triton": (), "tilelang": ("triton",), "torch": ()}


@functools.lru_cache(maxsize=None)
def templates_of(backend: str) -> tuple[Template, ...]:
    """All templates of a backend; loads its compiler.

    Raises:
        PlanError: no such backend.
        DeviceError: its package is not installed.
    """
    if backend not in _BACKENDS:
        raise PlanError("the backend must be known", f"{backend!r}", f"choose one of {', '.join(_BACKENDS)}")
    package, _, modules = _BACKENDS[backend]
    if importlib.util.find_spec(package) is None:
        needs = f"the backend {backend!r} needs the package {package!r}"
        raise DeviceError(needs, "none installed", f"pip install {package}")
    return tuple(importlib.import_module(module).TEMPLATE for module in modules)


def find_template(backend: str, name: str) -> Template:
    """Raises PlanError when the backend has no template of that name."""
    for template in templates_of(backend):
        if template.name == name:
            return template
    known = ", ".join(template.name for template in templates_of(backend))
    raise PlanError(f"the template must be one of {backend}'s", f"{name!r}", f"choose one of {known}")


def templates_for(stage: str, problem: Problem, backends: tuple[str, ...]) -> tuple[Template, ...]:
    """The templates that can run a stage of a problem."""
    return tuple(
        template
        for backend in backends
        for template in templates_of(backend)
        if template.stage == stage and problem.rule in template.rules
    )


def graph_of(backend: str) -> str:
    return _BACKENDS[backend][1]


def is_compiled(backend: str) -> bool:
    """Whether a backend's templates become machine code ahead of their run: those of the staged graph do."""
    return graph_of(backend) == "staged"


def default_backend(device: Device) -> str:
    """The backend that runs when nothing is tuned: Triton on a GPU, torch on a CPU."""
    return "triton" if device.kind == "cuda" else "torch"


@functools.lru_cache(maxsize=1024)
def default_plan(problem: Problem, device: Device, backend: str | None = None, outer: Config | None = None) -> Plan:
    """The declared defaults, moved to the nearest config that passes the constraints of this problem and device: of
    each stage's first template, of a later one where it has none.

    TileLang has templates for some stages; the plan's other stages are Triton's.

    With `outer` None the outer choices move too, when a stage has no config beside the declared ones.

    Raises:
        ConstraintError: a stage has no config that passes.
    """
    backend = backend or default_backend(device)
    graph = graph_of(backend)
    outers = (outer,) if outer is not None else GRAPHS[graph].by_nearness(problem, device)
    refused: ConstraintError | None = None
    for candidate in outers:
        try:
            return Plan(graph, candidate, _default_stages(problem, device, backend, candidate))
        except ConstraintError as error:
            refused = refused or error  # of the outer choices declared as default: what a user would want to know
    raise refused or ConstraintError(
        "some outer choices must pass the constraints", f"{problem}", "use a smaller head size or another backend"
    )


def _default_stages(problem: Problem, device: Device, backend: str, outer: Config) -> dict[str, StageChoice]:
    stages = {}
    for stage in stage_names(graph_of(backend), problem, outer):
        candidates = templates_for(stage, problem, (backend,)) or templates_for(stage, problem, _BESIDE[backend])
        if not candidates:
            raise PlanError("every stage needs a template", f"{stage!r} of {backend}", "use another backend")
        stages[stage] = _default_choice(candidates, problem, device, outer)
    return stages


def _default_choice(
    candidates: tuple[Template, ...], problem: Problem, device: Device, outer: Config
) -> StageChoice:  # fmt: skip
    refused: ConstraintError | None = None
    for template in candidates:
        try:
            return StageChoice(template.backend, template.name, template.space.default(problem, device, outer))
        except ConstraintError as error:
            refused = refused or error
    assert refused is not None, "a stage has candidates"
    raise refused


def validate_plan(plan: Plan, problem: Problem, device: Device) -> None:
    """Raises PlanError or ConstraintError when a plan cannot run this problem on this device."""
    if plan.graph not in GRAPHS:
        raise PlanError("the stage graph must be known", f"{plan.graph!r}", f"use one of {', '.join(GRAPHS)}")
    GRAPHS[plan.graph].validate(problem, plan.outer, device)
    needed = stage_names(plan.graph, problem, plan.outer)
    if set(plan.stages) != set(needed):
        raise PlanError(
            f"a plan of graph {plan.graph!r} chooses exactly the stages {list(needed)}", str(sorted(plan.stages)),
            "search again for this problem",
        )
    for stage, choice in plan.stages.items():
        template = find_template(choice.backend, choice.template)
        if template.stage != stage or problem.rule not in template.rules:
            raise PlanError(
                "a stage's template must be one written for it",
                f"{choice.template!r} for stage {stage!r} and rule {problem.rule!r}",
                "search again for this problem",
            )
        template.space.validate(problem, choice.config, device, plan.outer)


__all__ = [
    "BACKENDS", "Call", "ConstraintError", "Launcher", "Program", "Template", "default_backend", "default_plan",
    "find_template", "graph_of", "is_compiled", "templates_for", "templates_of", "validate_plan",
]
