"""The stage graph: which stages compute a problem, and the buffers they hand each other. The contract of backends.

Words: R = B·T tokens, L lanes (rows a token takes part in: the shared one first, then one per chosen partition),
M = R·L rows, P partitions with the shared one, S sequences, C chunk size. A *segment* is the rows of one (sequence,
partition) in time order: segments 0..S-1 are the shared ones, then S + s·N + p. Segments lie one behind the other with
no padding, so the rows of the shared stream are the tokens; a row belongs to a *slot* token·L + lane. Each segment is
cut into *chunks* of C rows, the last one shorter; between two chunks of a segment lies a *boundary*. No buffer of rows
or states depends on N: only the tables of segments and chunks, a few integers each, do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from sse_tune.errors import PlanError
from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8, "int32": 4}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The numbers every stage of one call needs, all known on the host without looking at the data."""

    problem: Problem
    chunk_size: int

    @property
    def tokens(self) -> int:
        return self.problem.batch * self.problem.seq_len

    @property
    def rows(self) -> int:
        """M = R·L."""
        return self.tokens * self.problem.lanes

    @property
    def shared_rows(self) -> int:
        """The first rows, which are the tokens' own in the always-on stream."""
        return self.tokens if self.problem.shared else 0

    @property
    def sparse_rows(self) -> int:
        return self.rows - self.shared_rows

    @property
    def segments(self) -> int:
        return self.problem.sequences * self.problem.partitions

    @property
    def chunks(self) -> int:
        """The static bound on chunks: surplus ones stay empty. No segment's last chunk lacks more than C-1 rows."""
        return max(1, (self.rows + self.segments * (self.chunk_size - 1)) // self.chunk_size)

    @property
    def boundaries(self) -> int:
        """The static bound on boundaries: a segment of n rows has (n - 1) // C."""
        return max(1, (self.rows - 1) // self.chunk_size)


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A named tensor between stages; `dtype` "io" is the problem's own, "state" the plan's stored-state dtype.

    "sum" is fp32, or fp64 beside fp32 operands: a gate of -100 in a chunk would cost the sum the digits they have.
    """

    name: str
    dtype: str
    shape: Callable[[Sizes], tuple[int, ...]]
    doc: str

    def dtype_in(self, problem: Problem, outer: Config) -> str:
        if self.dtype == "state":
            return problem.dtype if outer["state_dtype"] == "io" else "fp32"
        if self.dtype == "sum":
            return "fp64" if problem.dtype == "fp32" else "fp32"
        return problem.dtype if self.dtype == "io" else self.dtype

    def bytes(self, sizes: Sizes, outer: Config) -> int:
        count = 1
        for extent in self.shape(sizes):
            count *= extent
        return count * ITEM_BYTES[self.dtype_in(sizes.problem, outer)]


def _scalars(s: Sizes) -> tuple[int, ...]:
    return (s.problem.num_heads, s.rows)


def _tiles(s: Sizes) -> tuple[int, ...]:
    return (s.problem.num_heads, s.rows, s.chunk_size)


def _values(s: Sizes) -> tuple[int, ...]:
    return (s.problem.num_heads, s.rows, s.problem.value_dim)


def _value_rows(s: Sizes) -> tuple[int, ...]:
    return (s.rows, s.problem.num_heads, s.problem.value_dim)


def _states(s: Sizes) -> tuple[int, ...]:
    return (s.boundaries, s.problem.num_heads, s.problem.key_dim, s.problem.value_dim)


def _state_products(s: Sizes) -> tuple[int, ...]:
    return (-(-s.problem.value_dim // 64), s.problem.num_heads, s.chunks, s.problem.key_dim)


# gradients of the sparse rows only: the shared ones go to their tokens at once. One row stands in where there is none
def _sparse_scalars(s: Sizes) -> tuple[int, ...]:
    return (s.problem.num_heads, max(1, s.sparse_rows))


def _sparse_keys(s: Sizes) -> tuple[int, ...]:
    return (max(1, s.sparse_rows), s.problem.num_heads, s.problem.key_dim)


def _sparse_gates(s: Sizes) -> tuple[int, ...]:
    return _sparse_scalars(s) if s.problem.rule == "gdn" else _sparse_keys(s)


CHUNK_COLUMNS = 5  # of "chunk_table": segment (-1: surplus), first row, rows, boundary before and after (-1: none)

BUFFERS: dict[str, Buffer] = {
    buffer.name: buffer
    for buffer in (
        # routing
        Buffer("weights", "fp32", lambda s: (s.tokens, s.problem.lanes), "router weight of each slot; 1 if shared"),
        Buffer("chosen", "int32", lambda s: (s.tokens, s.problem.lanes), "partition of each slot; the shared lane: 0"),
        Buffer("perm", "int32", lambda s: (s.rows,), "slot of each row"),
        Buffer("inv", "int32", lambda s: (s.tokens, s.problem.lanes), "row of each slot"),
        Buffer("segment_rows", "int32", lambda s: (s.segments + 1,), "first row of each segment"),
        Buffer("segment_chunks", "int32", lambda s: (s.segments + 1,), "first chunk of each segment"),
        Buffer("segment_boundaries", "int32", lambda s: (s.segments + 1,), "first boundary of each segment"),
        Buffer("chunk_table", "int32", lambda s: (s.chunks, CHUNK_COLUMNS), "where each chunk lies"),
        # forward
        Buffer("k_scale", "fp32", _scalars, "a: what multiplies k; 0 for rows that do not write"),
        Buffer("q_scale", "fp32", _scalars, "c: what multiplies q; 0 for rows that do not read"),
        Buffer("g_cumsum", "sum", _scalars, "GDN: b, inclusive in-chunk sum of the log-gates"),
        Buffer("P", "io", _tiles, "the in-chunk scores, scaled and decayed"),
        Buffer("Ag", "io", _tiles, "GDN: G∘A∘beta_col, from W to V'"),
        Buffer("A", "io", _tiles, "GDN: (I+N)^-1"),
        Buffer("o_rows", "io", _value_rows, "output of each row"),
        # backward
        Buffer("h", "state", _states, "state at each boundary"),
        Buffer("w", "io", _values, "GDN: W, the values less what the state knows of them"),
        Buffer("dh", "state", _states, "gradient of the state at each boundary"),
        Buffer("h_dh", "fp32", _state_products, "GDN: <h, dh> of each chunk by key, in parts of 64 columns of V"),
        Buffer("dv_new", "io", _values, "GDN: gradient of V'"),
        Buffer("dv_rows", "io", _value_rows, "gradient of v, each row's part; GDN: that of W too"),
        Buffer("dp", "io", _tiles, "GDN: G∘dP, of the scores before their scales"),
        Buffer("dn", "io", _tiles, "GDN: E + Eᵀ, of the products of keys before their scales"),
        Buffer("db", "fp32", _scalars, "GDN: what the scores give to the gradient of g_cumsum"),
        Buffer("dq_rows", "io", _sparse_keys, "gradient of q, each row's part"),
        Buffer("dk_rows", "io", _sparse_keys, "gradient of k, each row's part"),
        Buffer("dg_rows", "fp32", _sparse_gates, "gradient of g, each row's part"),
        Buffer("dbeta_rows", "fp32", _sparse_scalars, "GDN: gradient of beta, each row's part"),
        Buffer("de_rows", "fp32", _sparse_scalars, "gradient of the router weight, each row's part"),
    )
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step: what it reads, what it writes, and the arithmetic it cannot avoid.

    `flops` is per row and head. `reads` and `writes` name buffers of `BUFFERS` or tensors of the call: its inputs,
    `o`, `final_state`, `do`, `d_final_state`, and `d_` + an input for gradients. Reading q, k, g or beta is reading
    `shared_q`, ... in shared segments.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    flops: Callable[[Problem, int], float]
    backward: bool = False


_WALK = ("perm", "weights", "segment_rows", "segment_boundaries")
_CHUNK = ("perm", "weights", "chunk_table")
_QKV = ("q", "k", "v")
_ROW_GRADIENTS = ("dq_rows", "dk_rows", "dg_rows", "de_rows")


def _shared_gradients(problem: Problem, names: tuple[str, ...]) -> tuple[str, ...]:
    """The always-on stream's gradients, one row a token: written in place by the stage that has them."""
    return tuple(f"d_shared_{name}" for name in names) if problem.shared else ()


def _no_flops(p: Problem, c: int) -> float:
    return 0.0


def _score_gradients(problem: Problem) -> tuple[Stage, ...]:
    return (
        Stage(
            "score_gradients",
            (*_CHUNK, "k", "do", "beta", "P", "Ag", "A", "k_scale", "g_cumsum", "w", "dv_new"),
            ("dp", "dn", "db", "dbeta_rows", *_shared_gradients(problem, ("beta",))),
            lambda p, c: 6 * c * p.value_dim + 2 * c * p.key_dim + 4 * c * c,
            backward=True,
        ),
    )


def stages_of(problem: Problem) -> tuple[Stage, ...]:
    """The staged graph of a problem, in the order the stages run."""
    gdn = problem.rule == "gdn"
    scales = ("k_scale", "q_scale", "g_cumsum" if gdn else "g")
    solved = ("Ag",) if gdn else ()
    inverse = ("A",) if gdn and problem.trains else ()
    initial, final = ("initial_state",), ("final_state",)

    def key_value(p: Problem) -> float:
        return float(p.key_dim * p.value_dim)

    forward = (
        Stage(
            "routing",
            ("router_logits", "cu_seqlens"),
            (
                "weights", "chosen", "perm", "inv", "segment_rows", "segment_chunks", "segment_boundaries",
                "chunk_table",
            ),
            _no_flops,
        ),
        Stage(
            "prepare",
            (*_CHUNK, "q", "k", "g", *(("beta",) if gdn else ())),
            ("P", "k_scale", "q_scale", *(("Ag", "g_cumsum") if gdn else ()), *inverse),
            (lambda p, c: 4 * c * p.key_dim + 2 / 3 * c * c) if gdn else (lambda p, c: 2 * c * p.key_dim),
        ),
        Stage(
            "scan",
            (*_WALK, *_QKV, "P", *solved, *scales, *initial),
            ("o_rows", *final),
            (lambda p, c: 6 * key_value(p) + 4 * c * p.value_dim)
            if gdn
            else (lambda p, c: 4 * key_value(p) + 2 * c * p.value_dim),
        ),
        Stage("combine", ("inv", "o_rows"), ("o",), _no_flops),
    )
    if not problem.trains:
        return forward
    sparse = ("d_q", "d_k", "d_g", *(("d_beta",) if gdn else ()), "d_router_logits")
    backward = (
        Stage(
            "recompute",
            (*_WALK, "k", "v", *solved, *(name for name in scales if name != "q_scale"), *initial),
            ("h", "w") if gdn else ("h",),
            (lambda p, c: 4 * key_value(p) + 2 * c * p.value_dim) if gdn else (lambda p, c: 2 * key_value(p)),
            backward=True,
        ),
        Stage(
            "state_gradient",
            (*_WALK, "q", "k", "do", "P", *solved, *scales, "d_final_state")
            + (("segment_chunks", "h", *initial) if gdn else ()),
            ("dh", "dv_rows", "d_initial_state", *(("dv_new", "h_dh") if gdn else ())),
            (lambda p, c: 6 * key_value(p) + 4 * c * p.value_dim)
            if gdn
            else (lambda p, c: 4 * key_value(p) + 2 * c * p.value_dim),
            backward=True,
        ),
        *(_score_gradients(problem) if gdn else ()),
        Stage(
            "gradients",
            (*_CHUNK, "q", "k", "do", *scales, "h", "dh", *initial, "d_final_state")
            + (("Ag", "w", "dv_rows", "dp", "dn", "db", "h_dh") if gdn else ("v",)),
            (*_ROW_GRADIENTS, *_shared_gradients(problem, ("q", "k", "g"))),
            (lambda p, c: 6 * key_value(p) + 2 * c * p.value_dim + 6 * c * p.key_dim)
            if gdn
            else (lambda p, c: 4 * key_value(p) + 2 * c * p.value_dim + 4 * c * p.key_dim),
            backward=True,
        ),
        Stage(
            "combine_gradients",
            ("inv", "chosen", "router_logits", "dv_rows", *_ROW_GRADIENTS, *(("dbeta_rows",) if gdn else ())),
            ("d_v", *(sparse if problem.num_partitions else ())),
            _no_flops,
            backward=True,
        ),
    )
    return forward + backward


STAGED_OUTER = Space(
    params=(
        Param("chunk_size", (16, 32, 64, 128), 64, "C, rows of one chunk"),
        Param("state_dtype", ("io", "fp32"), "io", "of the stored chunk states: the problem's dtype, or fp32"),
    ),
    constraints=(
        # every row tile is held in registers next to the state: C·K fp32 beyond this spills on all targets
        Constraint("chunk_size * K <= 16384", lambda p, c, d: c["chunk_size"] * p.head_dim <= 16384),
        Constraint("C=128 needs 16-bit operands", lambda p, c, d: c["chunk_size"] < 128 or p.dtype != "fp32"),
        Constraint("fp32 states differ from io only for 16-bit dtypes in training",
                   lambda p, c, d: c["state_dtype"] == "io" or (p.dtype != "fp32" and p.trains)),
    ),
)

WHOLE_OUTER = Space()

# graph name -> the outer space its plans choose from
GRAPHS: dict[str, Space] = {"staged": STAGED_OUTER, "whole": WHOLE_OUTER}


def stage_names(graph: str, problem: Problem) -> tuple[str, ...]:
    """The stages a plan of this graph must choose a template for; "whole" is one stage that does everything."""
    if graph == "whole":
        return ("whole",)
    if graph == "staged":
        return tuple(stage.name for stage in stages_of(problem))
    raise PlanError("the stage graph must be known", f"{graph!r}", f"use one of {', '.join(GRAPHS)}")


def stage_flops(stage: Stage, problem: Problem, chunk_size: int) -> float:
    """FLOPs of a stage over all rows and heads, padding not counted."""
    rows = problem.batch * problem.seq_len * problem.lanes
    return stage.flops(problem, chunk_size) * rows * problem.num_heads


def stage_bytes(stage: Stage, problem: Problem, outer: Config) -> int:
    """Bytes a stage must move: every input and output once, gathered rows once per row."""
    sizes = Sizes(problem, int(outer["chunk_size"]))
    item = ITEM_BYTES[problem.dtype]
    row_heads = sizes.rows * problem.num_heads
    token_heads = sizes.tokens * problem.num_heads
    gate_width = problem.key_dim if problem.rule == "gla" else 1
    states = sizes.segments * problem.num_heads * problem.key_dim * problem.value_dim * 4
    logits = sizes.tokens * problem.num_partitions * 4
    per_row = {
        "q": problem.key_dim * item, "k": problem.key_dim * item, "v": problem.value_dim * item,
        "do": problem.value_dim * item, "g": gate_width * item, "beta": item,
    }
    per_token = {
        "o": problem.value_dim * item, "d_v": problem.value_dim * item,
    }
    for stream in ("d_", "d_shared_"):
        per_token |= {
            f"{stream}q": problem.key_dim * item, f"{stream}k": problem.key_dim * item,
            f"{stream}g": gate_width * item, f"{stream}beta": item,
        }
    whole = {
        "router_logits": logits, "d_router_logits": logits, "cu_seqlens": 4 * (problem.sequences + 1),
        "initial_state": states, "final_state": states, "d_initial_state": states, "d_final_state": states,
    }
    total = 0
    for name in (*stage.reads, *stage.writes):
        if name in BUFFERS:
            total += BUFFERS[name].bytes(sizes, outer)
        elif name in per_row:
            total += per_row[name] * row_heads
        elif name in per_token:
            total += per_token[name] * token_heads
        else:
            total += whole[name]
    return total
