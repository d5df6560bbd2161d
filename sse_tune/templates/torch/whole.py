"""Stage "whole" in PyTorch: route, lay the rows out in chunks, compute inside the chunks, scan over them, combine.

Everything but the scan is batched over all chunks, segments and heads. States and sums are fp32 whatever the inputs are
(float64 for float64 inputs). Made for CPUs; on a GPU it is right but synchronises with the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from sse_tune.device import Device
from sse_tune.problem import Problem
from sse_tune.reference.routing import route
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.torch.gdn import gdn_rows
from sse_tune.templates.torch.gla import gla_rows
from sse_tune.templates.torch.rows import build_table, collect, spread, spread_values

EPS = 1e-6


def _only(rule: str, name: str, value: int | str) -> Callable[[Problem, Config, Device], bool]:
    """A parameter of the other rule has no effect: only one value of it is tried."""

    def holds(problem: Problem, config: Config, device: Device) -> bool:
        return problem.rule == rule or config[name] == value

    return holds


SPACE = Space(
    params=(
        Param("chunk_size", (16, 32, 64, 128), 64, "C, rows of one chunk"),
        Param("partitions", ("gathered", "masked"), "gathered",
              "a partition's segment holds its own tokens, or all tokens with zeros for those of others"),
        Param("solve", ("rows", "blocks"), "rows",
              "GDN: how (I + L)^-1 is applied: triangular solve of the rows, or an inverse by batched blocks"),
        Param("sub_block", (4, 8, 16, 32), 16, "GLA: rows between which decays are taken pair by pair"),
    ),
    constraints=(
        Constraint("`solve` is tuned for GDN only", _only("gdn", "solve", "rows")),
        Constraint("`sub_block` is tuned for GLA only", _only("gla", "sub_block", 16)),
        Constraint("sub_block <= chunk_size", lambda p, c, d: p.rule == "gdn" or int(c.sub_block) <= int(c.chunk_size)),
        Constraint("masked partitions need partitions",
                   lambda p, c, d: p.num_partitions > 0 or c.partitions == "gathered"),
    ),
)  # fmt: skip


def compute(
    problem: Problem,
    config: Config,
    scale: float,
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None,
    shared_q: torch.Tensor | None,
    shared_k: torch.Tensor | None,
    shared_g: torch.Tensor | None,
    shared_beta: torch.Tensor | None,
    router_logits: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operation on streams flattened to tokens, differentiable in all of them.

    Args:
        problem: gives the rule, the norm, top_k, read_k, N and whether there is a shared partition.
        config: one value for every parameter of `SPACE`.
        scale: of q·k.
        q, k: `[R, H, K]`. v: `[R, H, V]`. g: `[R, H, K]` or `[R, H]`. beta: `[R, H]` or None.
        shared_q, shared_k, shared_g, shared_beta: the same of the shared partition, if there is one.
        router_logits: `[R, N]`; None when N = 0: then q, k, g, beta are the one always-on stream.
        cu_seqlens: `[S + 1]`.
        initial_state: `[S, P, H, K, V]`, or None for zeros.

    Returns:
        o `[R, H, V]` in v's dtype, and the final states `[S, P, H, K, V]`.
    """
    work = torch.promote_types(v.dtype, torch.float32)
    tokens, heads, value_dim = v.shape
    key_dim, sequences = q.shape[2], len(cu_seqlens) - 1
    chunk_size = int(config["chunk_size"])
    plain = router_logits is None
    if plain:
        shared_q, shared_k, shared_g, shared_beta = q, k, g, beta
    with_shared = plain or problem.shared
    # float64: the softmax's gradient is a difference that cancels when one partition is hot
    choice = None if router_logits is None else route(router_logits.double(), problem.top_k, problem.readers)
    table = build_table(
        cu_seqlens,
        tokens,
        None if choice is None else choice.partitions,
        num_partitions=problem.num_partitions,
        shared=with_shared,
        top_k=problem.top_k,
        read_k=problem.readers,
        heads=heads,
        chunk_size=chunk_size,
        masked=config["partitions"] == "masked",
    )

    def rows(shared: torch.Tensor | None, sparse: torch.Tensor, reads: bool = False) -> torch.Tensor:
        lanes = table.read if reads else table.write
        own = spread(lanes, shared if with_shared else None, None if plain else sparse)
        return own.view(-1, chunk_size, own.shape[1]).to(work)

    def scalars(shared: torch.Tensor | None, sparse: torch.Tensor) -> torch.Tensor:
        return rows(None if shared is None else shared[..., None], sparse[..., None]).squeeze(2)

    e = None  # the router's weight of each row, [chunks·H, C, 1]; None: 1
    if choice is not None:
        weights = choice.weights.to(work)
        if with_shared:
            weights = torch.cat([weights.new_ones(tokens, 1), weights], 1)
        weights = torch.cat([weights.flatten(), weights.new_zeros(1)]).index_select(0, table.slots)
        e = weights.view(-1, 1, chunk_size, 1).expand(-1, heads, -1, -1).flatten(0, 1)
    q_rows = _scaled(rows(shared_q, q, reads=True), e, problem.norm, scale)
    k_rows = _scaled(rows(shared_k, k), e, problem.norm, 1.0)
    v_lanes = spread_values(table.write, v).view(-1, chunk_size, value_dim).to(work)
    states = (sequences, problem.partitions)
    initial = _by_length(initial_state, table.order, states, with_shared, (heads, key_dim, value_dim), q_rows)
    if problem.rule == "gdn":
        assert beta is not None
        o, final = gdn_rows(
            q_rows, k_rows, v_lanes, scalars(shared_g, g), scalars(shared_beta, beta), initial,
            solve=str(config["solve"]), step_sizes=table.step_sizes, heads=heads,
        )  # fmt: skip
    else:
        o, final = gla_rows(
            q_rows, k_rows, v_lanes, rows(shared_g, g), initial,
            sub_block=int(config["sub_block"]), step_sizes=table.step_sizes, heads=heads,
        )  # fmt: skip
    o = collect(table.read, o.flatten(0, 1)).to(v.dtype)
    final = final.view(-1, heads, key_dim, value_dim).index_select(0, table.rank)
    return o, _by_sequence(final, states, with_shared)


def _scaled(x: torch.Tensor, e: torch.Tensor | None, norm: str, scale: float) -> torch.Tensor:
    """Rows times their router weight, l2 norm and scale."""
    if norm == "none":
        return x * scale if e is None else x * (e * scale)
    squares = (x * x).sum(-1, keepdim=True)
    if norm == "before" and e is not None:
        return x * (e * (e * e * squares + EPS).rsqrt() * scale)
    inverse = (squares + EPS).rsqrt() * scale
    return x * (inverse if e is None else e * inverse)


def _by_length(
    state: torch.Tensor | None,
    order: torch.Tensor,
    states: tuple[int, int],
    with_shared: bool,
    shape: tuple[int, int, int],
    like: torch.Tensor,
) -> torch.Tensor:
    """Initial states `[S, P, H, K, V]` in the order of the scan, `[segments·H, K, V]`."""
    if state is None:
        return like.new_zeros(len(order) * shape[0], *shape[1:])
    state = state.to(like.dtype)
    if with_shared:
        state = torch.cat([state[:, 0], state[:, 1:].flatten(0, 1)])
    else:
        state = state.flatten(0, 1)
    return state.index_select(0, order).flatten(0, 1)


def _by_sequence(segments: torch.Tensor, states: tuple[int, int], with_shared: bool) -> torch.Tensor:
    """States by segment, the shared ones first, as `[S, P, H, K, V]`."""
    sequences, partitions = states
    if not with_shared:
        return segments.unflatten(0, (sequences, partitions))
    shared, sparse = segments.split([sequences, sequences * (partitions - 1)])
    return torch.cat([shared[:, None], sparse.reshape(sequences, partitions - 1, *sparse.shape[1:])], 1)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes o, and final_state if it is there."""
    problem = call.sizes.problem
    sparse = problem.num_partitions > 0
    shared = {
        f"shared_{name}": tensors.get(f"shared_{name}") if sparse and problem.shared else None
        for name in ("q", "k", "g", "beta")
    }
    o, final_state = compute(
        problem,
        call.config,
        call.scale,
        q=tensors["q"],
        k=tensors["k"],
        v=tensors["v"],
        g=tensors["g"],
        beta=tensors.get("beta"),
        **shared,
        router_logits=tensors["router_logits"] if sparse else None,
        cu_seqlens=tensors["cu_seqlens"],
        initial_state=tensors.get("initial_state"),
    )
    tensors["o"].copy_(o)
    if "final_state" in tensors:
        tensors["final_state"].copy_(final_state)


TEMPLATE = Template(
    backend="torch",
    name="whole",
    stage="whole",
    rules=("gla", "gdn"),
    space=SPACE,
    run=run,
    sources=tuple(f"sse_tune.templates.torch.{name}" for name in ("whole", "rows", "scan", "gdn", "gla")),
)
