"""What the gradients of GLA are made of besides products: copies of rows, gates and states, sums, and the norm's share.

Each function gives the macros of one subject for blocks of THREADS threads, chunks of C rows and slices of BK columns.
"""

from types import SimpleNamespace
from typing import Any

from sse_tune.templates.tilelang import common

MODULE = "sse_tune.templates.tilelang.gla_tiles"
EPS = 1e-6


def copies(T: Any, io: SimpleNamespace, threads: int, C: int, BK: int, V: int) -> SimpleNamespace:
    """Copies by tokens that lie in shared memory, one number a row, and the store of a column's gates."""
    PARTS = threads // BK
    ROWS = C // PARTS

    @T.macro
    def fetch_rows(source, tile, tokens, i_h, column, tx, width):
        """A tile of rows by their tokens."""
        for p in T.unroll(io.passes(C, width)):
            i = p * threads + tx
            row = i // (width // common.VECTOR)
            o_d = i % (width // common.VECTOR) * common.VECTOR
            T.ptx_cp_async(
                T.access_ptr(tile[row, o_d], "w", common.VECTOR),
                T.access_ptr(source[T.Cast("int64", tokens[row]), i_h, column + o_d], "r", common.VECTOR),
                common.VECTOR,
            )

    @T.macro
    def fetch_gates(source, tile, tokens, writes, i_h, column, tx, dtype):
        """Log-gates; rows that do not write keep the state."""
        if dtype == "float32":
            for p in T.unroll(C * BK // (threads * 4)):
                i = p * threads + tx
                row = i // (BK // 4)
                o_d = i % (BK // 4) * 4
                T.ptx_cp_async(
                    T.access_ptr(tile[row, o_d], "w", 4),
                    T.access_ptr(source[T.Cast("int64", tokens[row]), i_h, column + o_d], "r", 4),
                    4,
                    predicate=writes[row] > 0.0,
                )
        else:  # copies do not convert
            for p in T.unroll(C * BK // threads):
                row = p * PARTS + tx // BK
                gate = T.Cast("float32", source[T.Cast("int64", tokens[row]), i_h, column + tx % BK])
                tile[row, tx % BK] = T.if_then_else(writes[row] > 0.0, gate, 0.0)

    @T.macro
    def fetch_state(source, at_end, has_end, tile, i_boundary, i_state, i_h, i_k, tx):
        """Rows of K of the state at a boundary; at a segment's end of the call's own, or 0."""
        if i_boundary >= 0:
            for p in T.unroll(io.passes(BK, V)):
                i = p * threads + tx
                row = i // (V // common.VECTOR)
                o_v = i % (V // common.VECTOR) * common.VECTOR
                T.ptx_cp_async(
                    T.access_ptr(tile[row, o_v], "w", common.VECTOR),
                    T.access_ptr(source[T.Cast("int64", i_boundary), i_h, i_k * BK + row, o_v], "r", common.VECTOR),
                    common.VECTOR,
                )
        else:  # few chunks are at an end: a loop, so that its registers are no others' spills
            for p in T.serial(BK * V // (threads * 4)):
                i = p * threads + tx
                row = i // (V // 4)
                o_v = i % (V // 4) * 4
                for e in T.vectorized(4):
                    if has_end:
                        tile[row, o_v + e] = at_end[i_state, i_h, i_k * BK + row, o_v + e]
                    else:
                        tile[row, o_v + e] = 0.0

    @T.macro
    def fetch_slice(q, k, g, shared_q, shared_k, shared_g, b_q, b_k, b_x, tokens, writes, i_seg, n_shared, i_h, i_k, tx, gate_dtype, shared_gate_dtype):
        if i_seg < n_shared:
            fetch_gates(shared_g, b_x, tokens, writes, i_h, i_k * BK, tx, shared_gate_dtype)
            fetch_rows(shared_q, b_q, tokens, i_h, i_k * BK, tx, BK)
            fetch_rows(shared_k, b_k, tokens, i_h, i_k * BK, tx, BK)
        else:
            fetch_gates(g, b_x, tokens, writes, i_h, i_k * BK, tx, gate_dtype)
            fetch_rows(q, b_q, tokens, i_h, i_k * BK, tx, BK)
            fetch_rows(k, b_k, tokens, i_h, i_k * BK, tx, BK)

    @T.macro
    def store_gates(target, own, first, n_left, i_h, column, tx):
        """A part of a column; rows past the end of the chunk are the next one's."""
        for i in T.unroll(ROWS):
            if tx // BK * ROWS + i < n_left:
                target[T.Cast("int64", first + tx // BK * ROWS + i), i_h, column + tx % BK] = own[i]

    return SimpleNamespace(
        fetch_rows=fetch_rows, fetch_slice=fetch_slice, fetch_state=fetch_state, store_gates=store_gates
    )


def terms(T: Any, C: int, BK: int, sides: int, is_exact: bool) -> SimpleNamespace:
    """Operands of bf16 from tiles of fp32, and sums of a row over a slice, in `sides` parts that warps beside each other
    have; is_exact: one operand holds a number of the problem's dtype, and Z is one."""

    @T.macro
    def second_half(b_x, b_low, columns):
        """What one operand of bf16 leaves of a tile of fp32."""
        for i, j in T.Parallel(C, columns):
            b_low[i, j] = b_x[i, j] - T.Cast("float32", T.Cast("bfloat16", b_x[i, j]))

    @T.macro
    def take_z(b_high, b_low, b_z):
        """Z as the products take it."""
        for i, j in T.Parallel(C, BK):
            b_z[i, j] = b_high[i, j]
        if not is_exact:
            for i, j in T.Parallel(C, BK):
                b_z[i, j] += T.Cast("float32", b_low[i, j])

    @T.macro
    def row_sums(b_terms, b_sums, into):
        T.reduce_sum(T.reshape(b_terms, (C, sides, BK // sides)), b_sums, dim=2)
        T.copy(b_sums, into)

    def in_all(parts, i):
        total = parts[i, 0]
        for side in range(1, sides):
            total += parts[i, side]
        return total

    return SimpleNamespace(second_half=second_half, take_z=take_z, row_sums=row_sums, in_all=in_all)


def norm_part(T: Any, norm: str, dot: Any, square: Any, weight: Any) -> Any:
    """κ: the gradient of a row x with scale s is s (X - κ x), X that of s x; `dot` is X·x, `square` x·x."""
    if norm == "none":
        return 0.0
    if norm == "after":
        rho = T.rsqrt(square + EPS)
        return rho * rho * dot
    rho = T.rsqrt(weight * weight * square + EPS)
    return weight * rho * (weight * rho) * dot


def weight_gradient(T: Any, norm: str, dot: Any, square: Any, weight: Any) -> Any:
    """The gradient of the router weight; never divides by the weight, which may be 0."""
    if norm == "none":
        return dot
    if norm == "after":
        return T.rsqrt(square + EPS) * dot
    rho = T.rsqrt(weight * weight * square + EPS)
    return dot * EPS * rho * rho * rho
