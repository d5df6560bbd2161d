"""Hazards made concrete: the tensors of one call, and the gradients that come back to it."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import torch

from sse_tune.problem import Problem
from sse_tune.runtime.pipeline import DTYPES, Inputs, state_shape
from sse_tune.tuning.cases import CASES, FINAL, Hazard, case_problem


@dataclasses.dataclass(frozen=True)
class Case:
    """A hazard made concrete: the tensors of one call and the gradients that come back to it.

    Args:
        name: of the hazard.
        problem: of the call.
        inputs: of the call, already rounded to the problem's dtype.
        scale: of q·k.
        output_final_state: whether the final state is asked for.
        do: `[R, H, V]`.
        d_final_state: `[S, P, H, K, V]`, or None.
        lengths: of the sequences.
        chunk_size: the C it was made for.
        checked_sequences: how many last sequences are compared.
        strong_beta: whether beta goes up to 2, which widens the tolerance.
        repeats: how often the same bits are asked for.
    """

    name: str
    problem: Problem
    inputs: Inputs
    scale: float
    output_final_state: bool
    do: torch.Tensor
    d_final_state: torch.Tensor | None
    lengths: tuple[int, ...]
    chunk_size: int
    checked_sequences: int
    strong_beta: bool
    repeats: int


def build(name: str, problem: Problem, chunk_size: int, device: str, scale: str) -> Case:
    """The tensors of a hazard.

    Args:
        name: one of `CASES`.
        problem: the one at hand: rule, dtype, direction and, where the hazard does not set them, its sizes.
        chunk_size: C of the plan to be checked, or the rows of a group (`check.chunk_size_of`).
        device: torch's name of where the tensors go.
        scale: "tiny" (T <= 40, two heads, K <= 32), "full" or "big".
    """
    # what every candidate of a search meets is kept; the others may fill a GPU
    make = _kept if name in FINAL else _make
    return make(name, problem, chunk_size, device, scale)


def _make(name: str, problem: Problem, chunk_size: int, device: str, scale: str) -> Case:
    hazard = CASES[name]
    posed, lengths = case_problem(name, problem, chunk_size, scale)
    draw = _Draw(name, device if scale == "big" and hazard.needs == "big" else "cpu", device)
    tokens, heads, key_dim = posed.batch * posed.seq_len, posed.num_heads, posed.key_dim
    io = DTYPES[posed.dtype]
    gate = DTYPES[{None: posed.gate_dtype, "io": posed.dtype, "fp32": "fp32"}[hazard.gate_dtype]]
    scalar = io if hazard.gate_dtype == "io" else torch.float32
    gdn = posed.rule == "gdn"
    stream: dict[str, torch.Tensor | None] = {}
    for prefix in ("", "shared_") if posed.shared and posed.num_partitions else ("",):
        stream[f"{prefix}q"] = draw.normal(tokens, heads, key_dim).to(io)
        stream[f"{prefix}k"] = _keys(draw, hazard, posed, tokens).to(io)
        stream[f"{prefix}g"] = _gates(draw, hazard, (tokens, heads) if gdn else (tokens, heads, key_dim)).to(gate)
        stream[f"{prefix}beta"] = _beta(draw, hazard, (tokens, heads)).to(scalar) if gdn else None
    stream["v"] = draw.normal(tokens, heads, posed.value_dim).to(io)
    if posed.num_partitions:
        stream["router_logits"] = _logits(draw, hazard, tokens, posed.num_partitions).to(scalar)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    if hazard.states:
        stream["initial_state"] = 0.5 * draw.normal(*state_shape(posed))
    inputs = Inputs(
        **{name: None if x is None else x.to(device).contiguous() for name, x in stream.items()},  # type: ignore[arg-type]
        cu_seqlens=offsets.to(device),
    )
    return Case(
        name=name,
        problem=posed,
        inputs=inputs,
        scale=hazard.scale if hazard.scale is not None else float(key_dim) ** -0.5,
        output_final_state=hazard.states,
        do=draw.normal(tokens, heads, posed.value_dim).to(io).to(device),
        d_final_state=(0.5 * draw.normal(*state_shape(posed))).to(device) if hazard.states else None,
        lengths=lengths,
        chunk_size=chunk_size,
        checked_sequences=min(len(lengths), hazard.checked_sequences or len(lengths)),
        strong_beta=gdn and hazard.beta == "two",
        repeats=hazard.repeats,
    )


_kept = functools.lru_cache(maxsize=24)(_make)
_NEVER = -30.0  # the logit of a partition that no token chooses first: no noise makes up for it, and it is finite


@functools.lru_cache(maxsize=2)
def workload(
    problem: Problem,
    device: str,
    lengths: tuple[int, ...] | None = None,
    occupancy: tuple[float, ...] | None = None,
) -> Case:
    """Random inputs of a problem's full size, made on the device: never zeros, which run faster than numbers do.

    Args:
        problem, device: what is computed, and torch's name of where.
        lengths: of the packed sequences; None: equal ones.
        occupancy: the share of tokens that choose each partition first; None: a router without preferences.
    """
    generator = torch.Generator(device).manual_seed(0)
    tokens, heads, io = problem.batch * problem.seq_len, problem.num_heads, DTYPES[problem.dtype]

    def normal(*shape: int, dtype: torch.dtype = io) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    gate = (tokens, heads) if problem.rule == "gdn" else (tokens, heads, problem.key_dim)
    stream: dict[str, torch.Tensor | None] = {}
    for prefix in ("", "shared_") if problem.shared and problem.num_partitions else ("",):
        stream[f"{prefix}q"] = normal(tokens, heads, problem.key_dim)
        k = normal(tokens, heads, problem.key_dim)
        stream[f"{prefix}k"] = k if problem.norm != "none" else torch.nn.functional.normalize(k, dim=-1)
        g = -0.2 * torch.rand(gate, generator=generator, device=device)
        stream[f"{prefix}g"] = g.to(DTYPES[problem.gate_dtype])
        beta = torch.sigmoid(normal(tokens, heads, dtype=torch.float32)) if problem.rule == "gdn" else None
        stream[f"{prefix}beta"] = beta
    if problem.num_partitions:
        stream["router_logits"] = (
            normal(tokens, problem.num_partitions, dtype=torch.float32) if occupancy is None
            else skewed_logits(tokens, occupancy, generator)
        )  # fmt: skip
    sequences = problem.sequences
    starts = (
        [tokens * i // sequences for i in range(sequences + 1)] if lengths is None
        else list(itertools.accumulate(lengths, initial=0))
    )  # fmt: skip
    inputs = Inputs(
        v=normal(tokens, heads, problem.value_dim),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32).to(device), **stream,  # type: ignore[arg-type]
    )  # fmt: skip
    shape = (tokens, heads, problem.value_dim)
    # no gradient comes back to a forward pass: the shape without its memory, which long sequences need
    do = normal(*shape) if problem.trains else torch.zeros((), dtype=io, device=device).expand(shape)
    return Case(
        name="workload", problem=problem, inputs=inputs, scale=float(problem.key_dim) ** -0.5, output_final_state=False,
        do=do, d_final_state=None,
        lengths=tuple(b - a for a, b in itertools.pairwise(starts)), chunk_size=64, checked_sequences=sequences,
        strong_beta=False, repeats=1,
    )  # fmt: skip


def skewed_logits(tokens: int, occupancy: tuple[float, ...], generator: torch.Generator) -> torch.Tensor:
    """Router logits whose largest lies in each partition as often as its share says.

    The logarithm of a share and Gumbel noise: the order of a token's partitions is drawn without replacement.
    """
    shares = torch.tensor(occupancy, device=generator.device)
    chances = torch.empty(tokens, len(occupancy), device=generator.device).exponential_(generator=generator)
    return shares.log().clamp(min=_NEVER) - chances.clamp(min=1e-30).log()  # [R, N]


class _Draw:
    """Random numbers that depend on the hazard's name only; made on the CPU unless they are too many."""

    def __init__(self, name: str, where: str, device: str) -> None:
        self.where, self.device = where, device
        self.generator = torch.Generator(where).manual_seed(int.from_bytes(name.encode()[:6], "little"))
        self.fine = torch.float32 if where == "cpu" else torch.bfloat16

    def normal(self, *shape: int) -> torch.Tensor:
        large = self.where != "cpu" and len(shape) == 3 and shape[0] > 2**18
        dtype = self.fine if large else torch.float32
        return torch.randn(shape, generator=self.generator, device=self.where, dtype=dtype)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, device=self.where)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.where)


def _keys(draw: _Draw, hazard: Hazard, problem: Problem, tokens: int) -> torch.Tensor:
    heads, key_dim = problem.num_heads, problem.key_dim
    if hazard.keys == "duplicate":
        few = draw.normal(3, heads, key_dim)
        k = few[draw.integers(3, tokens)]
    elif hazard.keys == "silu":
        k = torch.nn.functional.silu(draw.normal(tokens, heads, key_dim) + 1)
    else:
        k = draw.normal(tokens, heads, key_dim)
    if hazard.keys == "large":
        return k * (1e3 / k.norm(dim=-1, keepdim=True))
    if problem.norm == "none":
        # the delta rule diverges for beta·‖k‖² > 2, whoever computes it; rounding must not bring it there
        length = 0.96 * (1 - 0.4 * draw.uniform(tokens, heads, 1)) if hazard.keys != "duplicate" else 0.96
        return k / (k.norm(dim=-1, keepdim=True) + 1e-9).to(k.dtype) * length
    return k


def _gates(draw: _Draw, hazard: Hazard, shape: tuple[int, ...]) -> torch.Tensor:
    if hazard.gates is None:
        return -0.2 * draw.uniform(*shape)
    values = torch.tensor(hazard.gates, device=draw.where)
    return values[draw.integers(len(values), *shape)]


def _beta(draw: _Draw, hazard: Hazard, shape: tuple[int, ...]) -> torch.Tensor:
    if hazard.beta == "one":
        return torch.ones(shape, device=draw.where)
    if hazard.beta == "two":
        drawn = 2 * draw.uniform(*shape)
        return torch.where(draw.uniform(*shape) < 0.3, 2.0, drawn)
    return torch.sigmoid(draw.normal(*shape))


def _logits(draw: _Draw, hazard: Hazard, tokens: int, num_partitions: int) -> torch.Tensor:
    logits = draw.normal(tokens, num_partitions)
    if hazard.logits == "equal":
        return torch.zeros_like(logits)
    if hazard.logits == "underflow":
        return 80 * logits
    if hazard.logits == "hot":
        logits[:, num_partitions // 2] += 12
    if hazard.logits == "few":
        logits[:, (num_partitions + 1) // 2 :] -= 30
    if hazard.logits == "infinite":
        kind = torch.arange(tokens) % 5
        logits[kind == 1, 0] = float("inf")
        logits[kind == 2, num_partitions - 1] = float("-inf")
        logits[kind == 3] = float("-inf")
        logits[kind == 4] = float("inf")
    return logits
