"""Plan to launches: allocates what each stage writes, runs its template, and drops what no later stage reads.

Generic over the stage graph: no stage, buffer or gradient is named here but those that a call brings with it. Nothing
is zeroed and nothing asks the device anything, so a forward and a backward pass can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch

from sse_tune.compile import GpuLauncher
from sse_tune.plan import Plan, StageChoice
from sse_tune.problem import Problem
from sse_tune.space import Config
from sse_tune.templates.buffers import BUFFERS, Sizes
from sse_tune.templates.registry import Call, Launcher, find_template
from sse_tune.templates.stages import ROWS_OF_TOKENS, Stage, stages_of
from sse_tune.templates.torch.whole import compute

DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64, "int32": torch.int32
}  # fmt: skip
STREAM = ("q", "k", "g", "beta")  # what the always-on partition has of its own
WITHOUT_TOKENS = ("cu_seqlens", "initial_state", "d_final_state")  # of what a call brings; the rest is by token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The tensors of one call, contiguous, tokens flattened to R = B·T.

    Args:
        q: `[R, H, K]`, the problem's dtype; so are k and v.
        k: `[R, H, K]`.
        v: `[R, H, V]`.
        g: GLA `[R, H, K]`, GDN `[R, H]`, any float dtype.
        cu_seqlens: `[S + 1]` int32, the first token of each sequence; there for plain batches too.
        beta: `[R, H]`, any float dtype; None: GLA.
        shared_q: the always-on partition's own q, and so on; None when there is none and when N = 0, where the one
            stream is the always-on one.
        router_logits: `[R, N]`, any float dtype; None: N = 0.
        initial_state: `[S, P, H, K, V]` fp32; None: zeros.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    cu_seqlens: torch.Tensor
    beta: torch.Tensor | None = None
    shared_q: torch.Tensor | None = None
    shared_k: torch.Tensor | None = None
    shared_g: torch.Tensor | None = None
    shared_beta: torch.Tensor | None = None
    router_logits: torch.Tensor | None = None
    initial_state: torch.Tensor | None = None

    def present(self) -> dict[str, torch.Tensor]:
        """Field name to tensor, absent ones left out."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}


def sizes_of(plan: Plan, problem: Problem) -> Sizes:
    return Sizes.of(problem, plan.outer)


def buffer_spec(name: str, problem: Problem, plan: Plan) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a buffer between stages."""
    buffer = BUFFERS[name]
    return buffer.shape(sizes_of(plan, problem)), DTYPES[buffer.dtype_in(problem, plan.outer)]


def state_shape(problem: Problem) -> tuple[int, ...]:
    return (problem.sequences, problem.partitions, problem.num_heads, problem.key_dim, problem.value_dim)


def saved_names(plan: Plan, problem: Problem) -> tuple[str, ...]:
    """The buffers a forward pass leaves for the backward pass; the inputs are needed there too."""
    stages = stages_of(problem, plan.outer)
    read = {name for stage in stages if stage.backward for name in stage.reads}
    return tuple(n for stage in stages if not stage.backward for n in stage.writes if n in BUFFERS and n in read)


def gradient_names(inputs: Iterable[str]) -> tuple[str, ...]:
    """The names of those inputs that have a gradient, in their order."""
    return tuple(name for name in inputs if name != "cu_seqlens")


def whole(plan: Plan, problem: Problem, inputs: Inputs, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a plan of the one-stage graph: o and the final state, differentiable in the inputs."""
    fields = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    return compute(problem, plan.stages["whole"].config, scale, **fields)


class Execution:
    """One call of one plan.

    Args:
        plan: what to run; checked by `validate_plan` before.
        problem: with direction "fwd+bwd" the forward pass leaves what `backward` needs.
        inputs: the tensors of the call.
        scale: what multiplies q·k.
        output_final_state: whether `forward` returns the states after the last token.
        allocate: `allocate(shape, dtype=, device=)` of every buffer and result; tests pass one that poisons.
        launcher: what runs a kernel; None: `GpuLauncher`.
        keep: keep every buffer, for `run_stage`.
    """

    def __init__(
        self,
        plan: Plan,
        problem: Problem,
        inputs: Inputs,
        *,
        scale: float,
        output_final_state: bool = False,
        allocate: Callable[..., torch.Tensor] = torch.empty,
        launcher: Launcher | None = None,
        keep: bool = False,
    ) -> None:
        assert DTYPES[problem.dtype] == inputs.q.dtype, (problem.dtype, inputs.q.dtype)
        self.plan, self.problem, self.scale, self.keep = plan, problem, scale, keep
        self.output_final_state = output_final_state
        self.device = inputs.q.device
        self._allocate, self._launch = allocate, launcher or GpuLauncher()
        self._inputs = inputs.present()
        self.tensors: dict[str, torch.Tensor] = dict(self._inputs)
        for name in STREAM:
            # templates see both streams; the one that is absent is stood in for by the other and never read
            if name in self.tensors and f"shared_{name}" not in self.tensors:
                self.tensors[f"shared_{name}"] = self.tensors[name]
        self._whole: tuple[Inputs, torch.Tensor, torch.Tensor] | None = None  # the one-stage graph, as autograd has it
        self._stages = () if plan.graph == "whole" else stages_of(problem, plan.outer)
        self._last_reader = {name: stage.name for stage in self._stages for name in stage.reads}

    @classmethod
    def restore(
        cls,
        plan: Plan,
        problem: Problem,
        inputs: Inputs,
        saved: Sequence[torch.Tensor],
        *,
        scale: float,
        allocate: Callable[..., torch.Tensor] = torch.empty,
        launcher: Launcher | None = None,
    ) -> Execution:
        """The execution as its forward pass left it, from the tensors of `saved()`: only `backward` may follow."""
        execution = cls(plan, problem, inputs, scale=scale, allocate=allocate, launcher=launcher)
        execution.tensors.update(zip(saved_names(plan, problem), saved, strict=True))
        return execution

    def saved(self) -> list[torch.Tensor]:
        """What `restore` needs besides the inputs, in the order of `saved_names`."""
        return [self.tensors[name] for name in saved_names(self.plan, self.problem)]

    def forward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs the forward stages: o `[R, H, V]` and, if asked for, the final state `[S, P, H, K, V]` fp32."""
        if self.plan.graph == "whole":
            self._forward_whole()
        for stage in self._stages:
            if not stage.backward:
                self._run(stage)
        return self.tensors["o"], self.tensors.get("final_state")

    def backward(
        self, do: torch.Tensor, d_final_state: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Runs the backward stages once, after `forward`.

        Args:
            do: `[R, H, V]`, gradient of o.
            d_final_state: `[S, P, H, K, V]` fp32, gradient of the final state; None: zero.

        Returns:
            Input name to its gradient, of the input's shape and dtype.
        """
        assert self.problem.trains, "a problem of direction 'fwd' has no backward stages"
        self.tensors["do"] = do
        if d_final_state is not None:
            self.tensors["d_final_state"] = d_final_state
        if self._whole is not None:
            return self._backward_whole(do, d_final_state)
        for stage in self._stages:
            if stage.backward:
                self._run(stage)
        return {name: self.tensors[self._gradient_of(name)] for name in gradient_names(self._inputs)}

    def run_stage(self, name: str, choice: StageChoice | None = None) -> None:
        """Runs one stage again on the buffers it has, with another template or config if given; needs `keep`."""
        assert self.keep, "stages can be run again only when their buffers are kept"
        if self.plan.graph == "whole":
            self._forward_whole()
            return
        stage = next(stage for stage in self._stages if stage.name == name)
        with self._current_device():
            self._call(stage, choice or self.plan.stages[name])

    def _forward_whole(self) -> None:
        trains = self.problem.trains
        leaves = {name: tensor.detach() for name, tensor in self._inputs.items()}
        for name in gradient_names(leaves):
            leaves[name].requires_grad_(trains)
        inputs = Inputs(**leaves)
        with torch.set_grad_enabled(trains):
            o, final_state = whole(self.plan, self.problem, inputs, self.scale)
        self._whole = (inputs, o, final_state) if trains else None
        self.tensors["o"] = o.detach()
        if self.output_final_state:
            self.tensors["final_state"] = final_state.detach()

    def _backward_whole(self, do: torch.Tensor, d_final_state: torch.Tensor | None) -> dict[str, torch.Tensor]:
        assert self._whole is not None
        inputs, o, final_state = self._whole
        leaves = inputs.present()
        names = gradient_names(leaves)
        results = [(o, do)] if d_final_state is None else [(o, do), (final_state, d_final_state)]
        found = torch.autograd.grad(
            [result for result, _ in results], [leaves[name] for name in names], [grad for _, grad in results],
            retain_graph=self.keep, allow_unused=True, materialize_grads=True,
        )
        return dict(zip(names, found))

    def _run(self, stage: Stage) -> None:
        for name in stage.writes:
            if name not in self.tensors and self._wanted(name):
                shape, dtype = self._spec(name)
                self.tensors[name] = self._allocate(shape, dtype=dtype, device=self.device)
        with self._current_device():
            self._call(stage, self.plan.stages[stage.name])
        if self.keep:
            return
        for name in (*stage.reads, *stage.writes):
            is_unread = name in BUFFERS and self._last_reader.get(name, stage.name) == stage.name
            if is_unread:
                self.tensors.pop(name, None)

    def _call(self, stage: Stage, choice: StageChoice) -> None:
        template = find_template(choice.backend, choice.template)
        config = Config({**self.plan.outer, **choice.config})
        tensors = self.tensors
        if not self.problem.num_partitions:
            tensors = tensors | {rows: tensors[name] for name, rows in ROWS_OF_TOKENS.items() if name in tensors}
        template.run(Call(sizes_of(self.plan, self.problem), config, self._launch, self.scale), tensors)

    def _wanted(self, name: str) -> bool:
        if name == "final_state":
            return self.output_final_state
        return name != "d_initial_state" or "initial_state" in self.tensors

    def _spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        if name in BUFFERS:
            return buffer_spec(name, self.problem, self.plan)
        if name in ("final_state", "d_initial_state"):
            return state_shape(self.problem), torch.float32
        of = self.tensors["v" if name == "o" else name.removeprefix("d_")]
        return tuple(of.shape), of.dtype

    def _gradient_of(self, name: str) -> str:
        """In the plain mode (N = 0) the one stream is the always-on one."""
        is_plain = self.problem.num_partitions == 0
        return f"d_shared_{name}" if is_plain and name in STREAM else f"d_{name}"

    def _current_device(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
