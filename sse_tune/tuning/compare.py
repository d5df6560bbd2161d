"""The reference's answer to a case, in float64, and how far another is from it: as a whole and by segment."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import torch

from sse_tune.reference import chunked, recurrent, route
from sse_tune.tuning.inputs import Case
from sse_tune.tuning.tolerance import local_factor, tolerance

Results = dict[str, torch.Tensor]  # "o", "final_state" and "d_" + an input
_RECURRENT_TOKENS = 200


@dataclasses.dataclass(frozen=True)
class Groups:
    """Tokens by (segment) or by (segment, last chunk): `rows[i]` belongs to group `ids[i]`."""

    rows: torch.Tensor
    ids: torch.Tensor
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Exact:
    """What the reference says about the checked part of a case.

    Args:
        results: float64.
        partitions: `[R, J]` chosen by the reference, of all tokens; None: N = 0.
        first_token, first_sequence: where the checked part begins.
        scales: name -> root mean square below which a result counts as near zero and is compared in absolute terms.
        shared, sparse: the groups of the always-on and of the routed stream, by token from `first_token` on.
    """

    results: Results
    partitions: torch.Tensor | None
    first_token: int
    first_sequence: int
    scales: dict[str, float]
    shared: tuple[Groups, ...]
    sparse: tuple[Groups, ...]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Relative errors by tensor, and the first reason why they are too large."""

    errors: dict[str, float]
    reason: str | None


class ExactAnswers:
    """The reference's answers, kept while their cases are: candidates of one search meet the same cases."""

    def __init__(self, capacity: int = 24) -> None:
        self._answers: dict[int, tuple[Case, Exact]] = {}
        self._capacity = capacity

    def of(self, case: Case) -> Exact:
        if id(case) not in self._answers:
            if len(self._answers) >= self._capacity:
                self._answers.pop(next(iter(self._answers)))
            self._answers[id(case)] = (case, exact(case))
        return self._answers[id(case)][1]


def exact(case: Case) -> Exact:
    """Runs the reference on the checked part of a case, forward and, if the problem trains, backward."""
    problem = case.problem
    first_sequence = len(case.lengths) - case.checked_sequences
    first = sum(case.lengths[:first_sequence])
    lengths = case.lengths[first_sequence:]
    leaves: dict[str, torch.Tensor] = {}
    for name, x in case.inputs.present().items():
        if name == "cu_seqlens":
            continue
        part = x[first_sequence:] if name == "initial_state" else x[first:]
        leaves[name] = part.to(torch.float64).requires_grad_(problem.trains)
    arguments = {name: x if name == "initial_state" else x[None] for name, x in leaves.items()}
    tokens = sum(lengths)
    offsets = torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int64, device=case.do.device)
    chunk = 16 if problem.rule == "gla" else 32
    reference: Callable[..., tuple[torch.Tensor, torch.Tensor]] = recurrent  # type: ignore[assignment]
    if tokens > _RECURRENT_TOKENS:
        reference = functools.partial(chunked, chunk_size=chunk)  # type: ignore[assignment]
    o, final_state = reference(
        router_logits=arguments.pop("router_logits", None),
        **arguments,
        top_k=problem.top_k,
        read_k=problem.readers,
        qk_l2norm=problem.norm != "none",
        gate_before_norm=problem.norm == "before",
        scale=case.scale,
        output_final_state=True,
        cu_seqlens=offsets,
    )
    results: Results = {"o": o.detach()[0]}
    if case.output_final_state:
        results["final_state"] = final_state.detach()
    if problem.trains:
        outputs, gradients = [o[0]], [case.do[first:].to(torch.float64)]
        if case.d_final_state is not None:
            outputs.append(final_state)
            gradients.append(case.d_final_state[first_sequence:].to(torch.float64))
        found = torch.autograd.grad(
            outputs, list(leaves.values()), gradients, allow_unused=True, materialize_grads=True
        )
        results |= {f"d_{name}": gradient for name, gradient in zip(leaves, found)}
    partitions = None
    if case.inputs.router_logits is not None:
        partitions = route(case.inputs.router_logits.float(), problem.top_k, problem.readers).partitions
    shared, sparse = _groups(case, lengths, None if partitions is None else partitions[first:].cpu())
    return Exact(results, partitions, first, first_sequence, _scales(case, leaves, results, first), shared, sparse)


def difference(actual: Results, case: Case, expected: Exact, precision: str) -> Difference:
    """Compares the results of a kernel with the reference's, tensor by tensor, then group by group."""
    errors: dict[str, float] = {}
    reason: str | None = None
    missing = sorted(set(expected.results) - set(actual))
    if missing:
        return Difference({}, f"no result for {', '.join(missing)}")
    for name, x in expected.results.items():
        full = actual[name]
        if not bool(torch.isfinite(full).all()):
            errors[name] = math.inf
            count = int((~torch.isfinite(full)).sum())
            reason = reason or f"{name}: {count} of {full.numel()} values are NaN or infinite: unwritten or overflowed"
            continue
        is_state = name in ("final_state", "d_initial_state")
        part = full[expected.first_sequence :] if is_state else full[expected.first_token :]
        if part.shape != x.shape:
            errors[name] = math.inf
            reason = reason or f"{name}: shape {list(part.shape)}, not {list(x.shape)}"
            continue
        squares = (part.to(torch.float64) - x).square()
        limit = tolerance(name, precision, strong_beta=case.strong_beta)
        floor = expected.scales[name]
        errors[name] = _relative(squares.sum(), x.square().sum(), floor, x.numel())
        if errors[name] > limit:
            reason = reason or f"{name}: relative error {errors[name]:.1e} > {limit:.1e}"
        elif x.numel():
            typical = max(floor, 0.3 * float(x.square().mean().sqrt()))
            reason = reason or _worst_group(name, squares, x, typical, limit, case, expected)
    return Difference(errors, reason)


def _relative(error: torch.Tensor, size: torch.Tensor, floor: float, count: int) -> float:
    return float(error.sqrt()) / max(float(size.sqrt()), floor * count**0.5, 1e-30)


def _worst_group(
    name: str, squares: torch.Tensor, x: torch.Tensor, typical: float, limit: float, case: Case, expected: Exact
) -> str | None:
    """The group that exceeds its own, wider, tolerance the most."""
    if name in ("final_state", "d_initial_state"):
        count = squares.shape[-1] * squares.shape[-2]
        ratios = squares.sum((-1, -2)).sqrt() / x.square().sum((-1, -2)).sqrt().clamp(min=typical * count**0.5)
        worst = float(ratios.max())
        if worst <= limit * local_factor(count):
            return None
        sequence, partition, head = (int(i) for i in torch.unravel_index(ratios.argmax(), ratios.shape))
        where = f"sequence {sequence + expected.first_sequence}, state {partition}, head {head}"
        return f"{name}: relative error {worst:.1e} > {limit * local_factor(count):.1e} in {where}"
    width = squares.shape[-1] if squares.dim() == 3 or name == "d_router_logits" else 1
    if width > 1 or name == "d_router_logits":
        squares, sizes = squares.sum(-1), x.square().sum(-1)
    else:
        sizes = x.square()
    if squares.dim() == 1:
        squares, sizes = squares[:, None], sizes[:, None]
    for groups in _groups_of(name, case, expected):
        if not groups.names:
            continue
        rows, ids = groups.rows.to(squares.device), groups.ids.to(squares.device)
        shape = (len(groups.names), squares.shape[1])
        error = squares.new_zeros(shape).index_add_(0, ids, squares[rows])
        size = squares.new_zeros(shape).index_add_(0, ids, sizes[rows])
        counts = torch.bincount(ids, minlength=len(groups.names))[:, None].to(squares.dtype) * width
        bound = limit * (2.0 + 6.0 / counts.sqrt())
        ratios = error.sqrt() / torch.maximum(size.sqrt(), typical * counts.sqrt()) / bound
        if float(ratios.max()) > 1:
            group, head = (int(i) for i in torch.unravel_index(ratios.argmax(), ratios.shape))
            limited, found = float(bound[group, 0]), float(ratios.max() * bound[group, 0])
            place = "" if name == "d_router_logits" else f", head {head}"
            return f"{name}: relative error {found:.1e} > {limited:.1e} in {groups.names[group]}{place}"
    return None


def _groups_of(name: str, case: Case, expected: Exact) -> tuple[Groups, ...]:
    if name.startswith("d_shared") or case.problem.num_partitions == 0:
        return expected.shared
    return expected.sparse if name not in ("o", "d_v") else (*expected.shared, *expected.sparse)


def _groups(
    case: Case, lengths: tuple[int, ...], partitions: torch.Tensor | None
) -> tuple[tuple[Groups, ...], tuple[Groups, ...]]:
    """Whole segments and their last chunks, of the always-on stream and of the partitions."""
    shared: list[tuple[str, torch.Tensor]] = []
    sparse: list[tuple[str, torch.Tensor]] = []
    first = len(case.lengths) - len(lengths)
    start = 0
    for number, length in enumerate(lengths, start=first):
        tokens = torch.arange(start, start + length)
        if case.problem.shared:
            shared.append((f"sequence {number}, the always-on partition", tokens))
        if partitions is not None:
            chosen = partitions[start : start + length]
            for p in range(case.problem.num_partitions):
                sparse.append((f"sequence {number}, partition {p}", tokens[(chosen == p).any(1)]))
        start += length
    return tuple(
        (_table(found, None), _table(found, case.chunk_size)) for found in (shared, sparse)
    )  # type: ignore[return-value]


def _table(found: list[tuple[str, torch.Tensor]], chunk_size: int | None) -> Groups:
    kept = [(name, tokens) for name, tokens in found if len(tokens)]
    if chunk_size is not None:
        kept = [(f"{name}, last chunk", t[(len(t) - 1) // chunk_size * chunk_size :]) for name, t in kept]
    if not kept:
        return Groups(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), ())
    ids = torch.arange(len(kept)).repeat_interleave(torch.tensor([len(tokens) for _, tokens in kept]))
    return Groups(torch.cat([tokens for _, tokens in kept]), ids, tuple(name for name, _ in kept))


def _scales(case: Case, leaves: dict[str, torch.Tensor], results: Results, first: int) -> dict[str, float]:
    """Below what size a result is noise around zero.

    dg and the router's gradient are differences of products like ⟨dq, q⟩: their rounding is relative to those. With the
    gate before the norm the norm cancels the weight, and its gradient is compared in absolute terms only.
    """

    def rms(x: torch.Tensor) -> float:
        return float(x.square().mean().sqrt()) if x.numel() else 0.0

    v, do = rms(leaves["v"].detach()), rms(case.do[first:].double())
    scales = dict.fromkeys(("o", "final_state"), 1e-4 * v)
    scales |= {name: 1e-5 * do * v for name in results if name not in scales}
    scales |= dict.fromkeys(("d_v", "d_initial_state"), 1e-4 * do)
    if not case.problem.trains:
        return scales
    for stream in ("", "shared_"):
        if f"d_{stream}q" not in results:
            continue
        parts = [(results[f"d_{stream}{x}"], leaves[f"{stream}{x}"].detach()) for x in ("q", "k")]
        products = sum((gradient * x).square() for gradient, x in parts)
        assert isinstance(products, torch.Tensor)
        if case.problem.rule == "gdn":
            products = products.sum(-1)
        scales[f"d_{stream}g"] = 0.1 * float(products.mean().sqrt())
        if stream == "" and "d_router_logits" in results:
            lengths = sum(gradient.square().sum(-1) * x.square().sum(-1) for gradient, x in parts)
            assert isinstance(lengths, torch.Tensor)
            part = 1.0 if case.problem.norm == "before" else 0.05
            scales["d_router_logits"] = part * float(lengths.sum(-1).mean().sqrt())
    return scales
