"""The buffers stages hand each other, and the sizes they follow from. The contract of backends.

Words: R = B·T tokens, L lanes (rows a token takes part in: the shared one first, then one per chosen partition),
M = R·L rows, P partitions with the shared one, S sequences, C chunk size. A *segment* is the rows of one (sequence,
partition) in time order: segments 0..S-1 are the shared ones, then S + s·N + p. Segments lie one behind the other with
no padding, so the rows of the shared stream are the tokens; a row belongs to a *slot* token·L + lane. Each segment is
cut into *chunks* of C rows, the last one shorter; between two chunks of a segment lies a *boundary*. Where a plan
splits segments, `split` chunks are a *group*, a segment's last one shorter. What is kept between two groups has the
slot `boundary // split`; such boundaries lie `split` apart or more, so no two share one. No buffer of rows or states
depends on N: only the tables of segments and chunks, a few integers each, do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from sse_tune.problem import Problem
from sse_tune.space import Config

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8, "int32": 4}
STATE_PRODUCT_COLUMNS = 32  # of V in a part of <h, dh>: no walk keeps fewer columns of the state


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The numbers every stage of one call needs, all known on the host without looking at the data."""

    problem: Problem
    chunk_size: int
    split: int = 0  # chunks of a group; 0: segments are not split

    @classmethod
    def of(cls, problem: Problem, outer: Config) -> Sizes:
        """Those of a plan's outer choices."""
        return cls(problem, int(outer.get("chunk_size", 64)), int(outer.get("split", 0)))

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

    @property
    def group_slots(self) -> int:
        """The static bound on what lies between groups."""
        return -(-self.boundaries // self.split) if self.split else 0

    @property
    def windows(self) -> int:
        """Of `split` chunks of the chunk table: none has the start of two groups besides first ones of segments, nor
        the end of two besides last ones."""
        return -(-self.chunks // self.split) if self.split else 0

    @property
    def walks(self) -> int:
        """The static bound on walks: one for each segment, and where they are split for each group after its first."""
        return self.segments + self.windows

    @property
    def longest_chunks(self) -> float:
        """Chunks of the longest segment, were sequences equally long and partitions equally liked: an estimate."""
        sparse = max(self.problem.top_k, self.problem.readers) / max(1, self.problem.num_partitions)
        rows = self.tokens / self.problem.sequences * (1.0 if self.problem.shared else sparse)
        return max(1.0, rows / self.chunk_size)


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A named tensor between stages; `dtype` "io" is the problem's own, "state" the plan's stored-state dtype.

    "sum" is fp32, or fp64 beside fp32 operands: a gate of -100 in a chunk would cost the sum the digits they have.
    "gates" is fp32, but bf16 for GLA beside bf16 operands: there gates are as many as keys. fp16 has not got the range.
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
        if self.dtype == "gates":
            return "bf16" if problem.rule == "gla" and problem.dtype == "bf16" else "fp32"
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


def _group_states(s: Sizes) -> tuple[int, ...]:
    return (s.group_slots, s.problem.num_heads, s.problem.key_dim, s.problem.value_dim)


def _transitions(s: Sizes) -> tuple[int, ...]:
    return (s.group_slots, s.problem.num_heads, s.problem.key_dim, s.problem.key_dim)


def _decays(s: Sizes) -> tuple[int, ...]:
    return (s.chunks, s.problem.num_heads, s.problem.key_dim)


def _keys(s: Sizes) -> tuple[int, ...]:
    return (s.problem.num_heads, s.rows, s.problem.key_dim)


def _state_products(s: Sizes) -> tuple[int, ...]:
    return (-(-s.problem.value_dim // STATE_PRODUCT_COLUMNS), s.problem.num_heads, s.chunks, s.problem.key_dim)


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
        Buffer("qg", "io", _keys, "GLA: c q e^b, what reads the state before the chunk"),
        Buffer("kg", "io", _keys, "GLA: a k e^(b_C - b), what writes into the state after the chunk"),
        Buffer("decay", "fp32", _decays, "GLA: e^(b_C), what a chunk leaves of the state before it"),
        Buffer("Ag", "io", _tiles, "GDN: G∘A∘beta_col, from W to V'"),
        Buffer("A", "io", _tiles, "GDN: (I+N)^-1"),
        Buffer("h", "state", _states, "state at each boundary"),
        Buffer("group_h", "fp32", _group_states, "GDN: state between two groups"),
        Buffer("transitions", "fp32", _transitions, "GDN: T of the group before, if it is not a first one"),
        Buffer("o_rows", "io", _value_rows, "output of each row"),
        # backward
        Buffer("w", "io", _values, "GDN: W, the values less what the state knows of them"),
        Buffer("group_dh", "fp32", _group_states, "GDN: gradient of the state between two groups"),
        Buffer("dh", "state", _states, "gradient of the state at each boundary"),
        Buffer("h_dh", "fp32", _state_products, "GDN: <h, dh> of each chunk by key, in parts of 32 columns of V"),
        Buffer("dv_new", "io", _values, "GDN: gradient of V'"),
        Buffer("dv_rows", "io", _value_rows, "gradient of v, each row's part; GDN: that of W too"),
        Buffer("dp", "io", _tiles, "GDN: G∘dP, of the scores before their scales"),
        Buffer("dn", "io", _tiles, "GDN: E + Eᵀ, of the products of keys before their scales"),
        Buffer("db", "fp32", _scalars, "GDN: what the scores give to the gradient of g_cumsum"),
        Buffer("dq_rows", "io", _sparse_keys, "gradient of q, each row's part"),
        Buffer("dk_rows", "io", _sparse_keys, "gradient of k, each row's part"),
        Buffer("dg_rows", "gates", _sparse_gates, "gradient of g, each row's part"),
        Buffer("dbeta_rows", "fp32", _sparse_scalars, "GDN: gradient of beta, each row's part"),
        Buffer("de_rows", "fp32", _sparse_scalars, "gradient of the router weight, each row's part"),
    )
}
