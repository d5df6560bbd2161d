"""What tests of whole plans share: inputs of small problems, and what a plan makes of them beside the reference."""

import itertools
import math

import torch

from sse_tune.device import ARCHS
from sse_tune.problem import Problem
from sse_tune.reference import recurrent
from sse_tune.runtime.pipeline import DTYPES, Execution, Inputs
from sse_tune.templates.registry import default_plan
from sse_tune.templates.stages import GRAPHS

DEVICE = ARCHS["sm_90"]
STREAM = ("q", "k", "g", "beta")
# Relative Frobenius error, fp32 with exact products (kernels.md, section 6: 1e-5 and, of gates, 3e-5), others as there.
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 8e-3}
LOOSER = {"g": 3, "beta": 3, "shared_g": 3, "shared_beta": 3, "router_logits": 3, "k": 1.5, "shared_k": 1.5}


def outer_of(problem, **changes):
    return GRAPHS["staged"].default(problem, DEVICE).replace(**changes)


def make_inputs(problem, lengths=None, *, logits=None, initial=False, gate=1.0, seed=0):
    """Inputs of a problem, in its dtype; gates down to about `-4 * gate`, some rows of them 0."""
    random = torch.Generator().manual_seed(seed)
    dtype = DTYPES[problem.dtype]
    rows, heads = problem.batch * problem.seq_len, problem.num_heads

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    def stream():
        keys = (rows, heads, problem.key_dim)
        g = torch.nn.functional.logsigmoid(2 * normal(*(keys if problem.rule == "gla" else keys[:2]))) * gate
        g[::7] = 0.0
        made = {"q": normal(*keys).to(dtype), "k": (0.5 * normal(*keys)).to(dtype), "g": g}
        return made if problem.rule == "gla" else {**made, "beta": normal(rows, heads).sigmoid()}

    tensors = {**stream(), "v": normal(rows, heads, problem.value_dim).to(dtype)}
    if problem.num_partitions:
        tensors["router_logits"] = normal(rows, problem.num_partitions) if logits is None else logits
        if problem.shared:
            tensors |= {f"shared_{name}": tensor for name, tensor in stream().items()}
    lengths = lengths or [problem.seq_len] * problem.batch
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    assert offsets[-1] == rows, (lengths, rows)
    if initial:
        sizes = (problem.sequences, problem.partitions, heads, problem.key_dim, problem.value_dim)
        tensors["initial_state"] = normal(*sizes)
    return Inputs(**tensors, cu_seqlens=offsets)


def reference(problem, inputs, chosen, do, d_final):
    """o, final state and every gradient in float64, on the partitions the kernels chose."""
    leaves = {
        name: tensor.double().requires_grad_() for name, tensor in inputs.present().items() if name != "cu_seqlens"
    }
    batched = {name: tensor if name == "initial_state" else tensor[None] for name, tensor in leaves.items()}
    o, final = recurrent(
        *(batched.pop(name) for name in ("q", "k", "v", "g")), batched.pop("router_logits", None),
        problem.top_k or 2, **batched, qk_l2norm=problem.norm != "none", gate_before_norm=problem.norm == "before",
        read_k=problem.readers or None, output_final_state=True, cu_seqlens=inputs.cu_seqlens,
        partitions=chosen[:, int(problem.shared):].long() if problem.num_partitions else None,
    )  # fmt: skip
    loss = (o[0] * do.double()).sum() + (0.0 if d_final is None else (final * d_final.double()).sum())
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"o": o[0].detach(), "final_state": final.detach()} | {
        f"d_{name}": grad for name, grad in zip(leaves, grads)
    }


def kernels(problem, inputs, allocate, outer=None, plan=None, final=True, do=None, d_final=None, launcher=None):
    """The same from the templates, and the partitions they chose."""
    plan = plan or default_plan(problem, DEVICE, "triton", outer)
    execution = Execution(
        plan, problem, inputs, scale=problem.key_dim**-0.5, output_final_state=final, allocate=allocate,
        launcher=launcher, keep=True,
    )  # fmt: skip
    o, final_state = execution.forward()
    results = {"o": o} | ({"final_state": final_state} if final else {})
    if problem.trains:
        results |= {f"d_{name}": grad for name, grad in execution.backward(do, d_final).items()}
    return results, execution


def error_of(actual, exact, zero):
    """Relative error of the whole, and of the worst row (the last dimension) in units of the typical row."""
    assert not actual.isnan().any(), "NaN: something was read that nobody wrote"
    difference = actual.double() - exact
    norm = exact.norm().item()
    if norm <= zero:
        return difference.norm().item(), 0.0
    rows = difference.flatten(0, -2).norm(dim=-1) if difference.dim() > 1 else difference.abs()
    typical = norm / math.sqrt(max(1, rows.numel()))
    return difference.norm().item() / norm, rows.max().item() / typical / 20


def compare(problem, inputs, allocate, *, outer=None, plan=None, final=True, d_final=True, launcher=None):
    """Raises AssertionError when a result of the templates is not the reference's."""
    random = torch.Generator().manual_seed(99)
    do = torch.randn(inputs.v.shape, generator=random).to(inputs.v.dtype)
    shape = (problem.sequences, problem.partitions, problem.num_heads, problem.key_dim, problem.value_dim)
    d_final = torch.randn(shape, generator=random) if d_final and final else None
    actual, execution = kernels(problem, inputs, allocate, outer, plan, final, do, d_final, launcher)
    exact = reference(problem, inputs, execution.tensors["chosen"], do, d_final)
    errors = {}
    for name, tensor in actual.items():
        allowed = TOLERANCE[problem.dtype] * LOOSER.get(name.removeprefix("d_"), 1)
        # the norm cancels the gate: only epsilon is left of the router's gradient, so it counts in absolute terms
        zero = 1.0 if name == "d_router_logits" and problem.norm == "before" else 1e-9
        assert tensor.shape == exact[name].shape, name
        whole, worst = error_of(tensor, exact[name], zero)
        if max(whole, worst) > allowed:
            errors[name] = f"{whole:.1e} (worst row {worst:.1e}) > {allowed:.1e}"
    assert not errors, errors
    return execution


def problem_of(rule, norm="none", **changes):
    sizes = dict(seq_len=21, num_heads=2, head_dim=16, head_dim_v=16, num_partitions=3, top_k=2, dtype="fp32")
    return Problem(rule=rule, norm=norm, **{**sizes, **changes})
