"""How far a kernel may be from the float64 reference, by dtype and tensor."""

from __future__ import annotations

from sse_tune.plan import Plan
from sse_tune.problem import Problem

# relative Frobenius error of: o, final state, dq, dv | dk | dg, dbeta | dlogits, and of all of them for beta up to 2
_BY_PRECISION: dict[str, tuple[float, float, float, float, float]] = {
    "bf16": (8e-3, 1e-2, 1.5e-2, 1.5e-2, 2.5e-2),
    "fp16": (1e-3, 1.5e-3, 2e-3, 2e-3, 4e-3),
    "tf32": (2e-3, 2e-3, 3e-3, 3e-3, 9e-3),
    "ieee": (1e-5, 1e-5, 3e-5, 3e-5, 9e-5),
}
_COLUMN = {"d_k": 1, "d_shared_k": 1, "d_g": 2, "d_shared_g": 2, "d_beta": 2, "d_shared_beta": 2, "d_router_logits": 3}


def precision_of(plan: Plan, problem: Problem) -> str:
    """The row of the table a plan is held to: fp32 is "tf32" only where a config says that it rounds to tf32."""
    if problem.dtype != "fp32":
        return problem.dtype
    rounds = any("tf32" in choice.config.values() for choice in plan.stages.values())
    return "tf32" if rounds else "ieee"


def tolerance(name: str, precision: str, *, strong_beta: bool) -> float:
    """The largest relative Frobenius error of a whole tensor: "o", "final_state" or "d_" and an input."""
    row = _BY_PRECISION[precision]
    return row[4] if strong_beta else row[_COLUMN.get(name, 0)]


def local_factor(numbers: int) -> float:
    """How much wider the tolerance is for a group of few numbers, whose error scatters more than a whole tensor's."""
    return 2.0 + 6.0 / numbers**0.5
