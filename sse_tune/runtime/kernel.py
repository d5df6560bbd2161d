"""A problem with the plan that was decided for it: callable, and able to say why it is this plan."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import torch
from torch import Tensor

from sse_tune.compile import compile_stage
from sse_tune.database.store import TuningDatabase
from sse_tune.device import ARCHS, Device
from sse_tune.errors import ProblemError
from sse_tune.plan import Plan
from sse_tune.problem import Problem
from sse_tune.runtime.again import Calls, key_of
from sse_tune.runtime.arguments import Arguments, check, pose
from sse_tune.runtime.call import call
from sse_tune.runtime.dispatch import Decision, decide, device_of, narrow
from sse_tune.runtime.settings import read_plan, write_problem
from sse_tune.templates.registry import find_template, is_compiled, validate_plan

# what a kernel's plan was chosen for: a call may differ from it in everything else
_FIXED = ("rule", "num_heads", "head_dim", "head_dim_v", "num_partitions", "top_k", "read_k", "shared", "norm", "dtype")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What `sse_attention` runs for a problem on a device.

    Args:
        problem: what it was decided for; calls may differ in batch, length and packing, and have `head_groups` times
            its heads.
        device: where it was decided for.
        decision: the plan, and why.
    """

    problem: Problem
    device: Device
    decision: Decision
    _calls: Calls = dataclasses.field(default_factory=Calls, init=False, repr=False, compare=False)

    @property
    def plan(self) -> Plan:
        return self.decision.plan

    def compile(self) -> Kernel:
        """Builds the kernels into the compiler's cache, so that the first call need not; returns itself.

        Raises:
            CompileError: a compiler refuses a template.
        """
        if self.device.arch in ARCHS:  # kernels for another one are built by their first call
            for choice in self.plan.stages.values():
                if is_compiled(choice.backend):
                    template = find_template(choice.backend, choice.template)
                    compile_stage(
                        template, self.problem, self.plan.outer, choice.config, self.device.arch, with_states=False
                    )
        return self

    def explain(self) -> str:
        """Several lines: the problem, the plan, where it comes from and why nothing nearer was taken."""
        return explain(self.problem, self.device, self.decision)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        router_logits: Tensor | None,
        top_k: int | None = None,
        *,
        beta: Tensor | None = None,
        shared_q: Tensor | None = None,
        shared_k: Tensor | None = None,
        shared_g: Tensor | None = None,
        shared_beta: Tensor | None = None,
        qk_l2norm: bool = False,
        gate_before_norm: bool = False,
        scale: float | None = None,
        read_k: int | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        head_groups: int = 1,
    ) -> tuple[Tensor, Tensor | None]:
        """`sse_attention` by this plan, whatever the databases say now.

        Raises:
            ProblemError: as `sse_attention`, and when the call is not of this kernel's kind.
        """
        given = q, k, v, g, beta, shared_q, shared_k, shared_g, shared_beta, router_logits, initial_state, cu_seqlens
        numbers = top_k, read_k, scale, head_groups, qk_l2norm, gate_before_norm, output_final_state
        key = key_of(given, numbers)
        if key is not None:
            known, _ = self._calls.find(key)
            if known is not None:
                return known.run(given)
        arguments = Arguments(
            q=q, k=k, v=v, g=g, router_logits=router_logits, top_k=top_k, beta=beta, shared_q=shared_q,
            shared_k=shared_k, shared_g=shared_g, shared_beta=shared_beta, qk_l2norm=qk_l2norm,
            gate_before_norm=gate_before_norm, scale=scale, read_k=read_k, initial_state=initial_state,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens, head_groups=head_groups,
        )  # fmt: skip
        problem = pose(check(arguments))
        self._check_kind(problem, q.device)
        fitted = _fitted(self.decision.plan_json, problem, self.problem, self.device)
        results = call(arguments, *fitted)
        if key is not None:
            self._calls.remember(key, arguments, fitted)
        return results

    def _check_kind(self, problem: Problem, device: torch.device) -> None:
        differing = [name for name in _FIXED if getattr(problem, name) != getattr(self.problem, name)]
        if differing:
            shown = ", ".join(
                f"{name}={getattr(problem, name)} instead of {getattr(self.problem, name)}" for name in differing
            )
            raise ProblemError(
                "a kernel runs calls of the problem it was loaded for", shown, "load_best(problem) for this call"
            )
        if problem.trains and not self.problem.trains:
            raise ProblemError(
                "a kernel of direction 'fwd' has no backward pass", "an input that requires grad",
                "load_best(problem.replace(direction='fwd+bwd')), or call it under torch.no_grad()",
            )
        if device.type != self.device.kind:
            raise ProblemError(
                "a kernel runs on the device it was loaded for", f"q on {device}, kernel for {self.device.name}",
                "load_best(problem, device=q.device)",
            )


@functools.lru_cache(maxsize=1024)
def _fitted(plan: str, problem: Problem, decided_for: Problem, device: Device) -> tuple[str, str, str]:
    """Graph, problem and plan, the last two as JSON, of a call of a kernel whose plan is given as JSON.

    Raises ConstraintError when the plan cannot run a call of this length."""
    narrowed = narrow(read_plan(plan), problem)
    if problem.seq_len != decided_for.seq_len or problem.batch != decided_for.batch:
        validate_plan(narrowed, problem, device)
    return narrowed.graph, write_problem(problem), narrowed.to_json()


def load_best(
    problem: Problem,
    device: Device | torch.device | str | None = None,
    database: TuningDatabase | str | pathlib.Path | None = None,
) -> Kernel:
    """What `sse_attention` would run for a problem, compiled.

    Args:
        problem: what to compute.
        device: "cuda", "cuda:1", "cpu", or an architecture such as "sm_90"; None: the current GPU, else the CPU.
        database: file or URL of the answers; None: the user's default database.

    Raises:
        DeviceError: no such device.
        DatabaseError: the database cannot be read.
    """
    chosen = device_of(device)
    return Kernel(problem, chosen, decide(problem, chosen, database)).compile()


def explain(problem: Problem, device: Device, decision: Decision) -> str:
    """What runs and why, for people, a few lines."""
    packed = "" if problem.num_sequences is None else f" in {problem.num_sequences} packed sequences"
    streams = "always-on stream alone" if problem.num_partitions == 0 else (
        f"N={problem.num_partitions} top_k={problem.top_k} read_k={problem.readers}"
        f"{' and an always-on partition' if problem.shared else ''}"
    )  # fmt: skip
    lines = [
        ("problem", f"{problem.rule} {problem.dtype} B={problem.batch} T={problem.seq_len}{packed} "
                    f"H={problem.num_heads} K={problem.key_dim} V={problem.value_dim}, {streams}, "
                    f"norm {problem.norm}, {problem.direction}"),
        ("bucket", problem.bucket.name),
        ("device", f"{device.name} ({device.arch})"),
        ("source", f"{decision.source}: {decision.reason}"),
        ("time", _time(decision)),
        ("plan", " ".join((decision.plan.graph, *(f"{n}={v}" for n, v in decision.plan.outer.items())))),
    ]  # fmt: skip
    for stage, choice in decision.plan.stages.items():
        config = " ".join(f"{name}={value}" for name, value in choice.config.items())
        lines.append(("", f"  {stage:<18}{choice.backend}:{choice.template}  {config}".rstrip()))
    lines.extend(("passed over" if index == 0 else "", reason) for index, reason in enumerate(decision.refused))
    return "\n".join(f"{label:<12}{text}" for label, text in lines)


def _time(decision: Decision) -> str:
    answer = decision.answer
    if answer is None:
        return "not measured"
    text = f"{answer.time_us / 1000:.3f} ms, measured {answer.created}"
    if answer.default_time_us is not None:
        ratio = answer.default_time_us / answer.time_us
        text += f"; default {answer.default_time_us / 1000:.3f} ms, {ratio:.2f} times as long"
    if decision.source == "nearest":
        text += f"; of bucket {answer.bucket}, not of this one"
    return text
