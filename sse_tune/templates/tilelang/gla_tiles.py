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

    def vector(tile):
        """Numbers of 16 bytes."""
        return 128 // tile.dtype.bits

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
    def fetch_gates(source, tile, tokens, writes, i_h, column, tx):
        """Log-gates; rows that do not write keep the state."""
        if source.dtype == tile.dtype:
            for p in T.unroll(C * BK // (threads * vector(tile))):
                i = p * threads + tx
                row = i // (BK // vector(tile))
                o_d = i % (BK // vector(tile)) * vector(tile)
                T.ptx_cp_async(
                    T.access_ptr(tile[row, o_d], "w", vector(tile)),
                    T.access_ptr(source[T.Cast("int64", tokens[row]), i_h, column + o_d], "r", vector(tile)),
                    vector(tile),
                    predicate=writes[row] > 0.0,
                )
        else:  # copies do not convert: the two streams' gates differ
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
    def fetch_slice(q, k, g, b_q, b_k, b_g, tokens, writes, i_h, i_k, tx):
        fetch_gates(g, b_g, tokens, writes, i_h, i_k * BK, tx)
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


def columns(T: Any, threads: int, C: int, BK: int) -> SimpleNamespace:
    """Sums along the rows of a chunk: a thread has a part of one column, C * BK / threads rows, in `own`."""
    PARTS = threads // BK
    ROWS = C // PARTS

    def total(own):
        found = own[0]
        for i in range(1, ROWS):
            found += own[i]
        return found

    @T.macro
    def take(b_x, own, b_total, tx):
        for i in T.unroll(ROWS):
            own[i] = T.Cast("float32", b_x[tx // BK * ROWS + i, tx % BK])
        b_total[tx // BK, tx % BK] = total(own)

    @T.macro
    def decays(b_x, own, b_total, run, tx):
        """From log-gates to e^(b - r), r at the last row of the first half. `run` is left with the exponent that is
        furthest from 0 in the part: gates are at most 0, so sums from the middle on only fall."""
        run[0] = 0.0
        if tx // BK < PARTS // 2:
            for p in T.unroll(PARTS // 2):
                if p > tx // BK:
                    run[0] += b_total[p, tx % BK]
            for i in T.unroll(ROWS):
                b_x[tx // BK * ROWS + ROWS - 1 - i, tx % BK] = T.__exp(-run[0])
                if i < ROWS - 1:
                    run[0] += own[ROWS - 1 - i]
        else:
            for p in T.unroll(PARTS // 2):
                if p + PARTS // 2 < tx // BK:
                    run[0] += b_total[p + PARTS // 2, tx % BK]
            for i in T.unroll(ROWS):
                run[0] += own[i]
                b_x[tx // BK * ROWS + i, tx % BK] = T.__exp(run[0])

    def half(b_total, i_half, column):
        """The sum over half a chunk."""
        found = b_total[i_half * (PARTS // 2), column]
        for p in range(1, PARTS // 2):
            found += b_total[i_half * (PARTS // 2) + p, column]
        return found

    @T.macro
    def sums_from(own, b_total, run, writes, some_do_not_write, tx):
        """Each row to the sum of it, those after it and `run`; 0 for rows that do not write."""
        for p in T.unroll(PARTS):
            if p > tx // BK:
                run[0] += b_total[p, tx % BK]
        for i in T.unroll(ROWS):
            run[0] += own[ROWS - 1 - i]
            own[ROWS - 1 - i] = run[0]
            if some_do_not_write:
                own[ROWS - 1 - i] = T.if_then_else(writes[tx // BK * ROWS + ROWS - 1 - i] > 0.0, run[0], 0.0)

    return SimpleNamespace(take=take, decays=decays, half=half, sums_from=sums_from)


def terms(T: Any, C: int, BK: int, sides: int, is_exact: bool, norm: str) -> SimpleNamespace:
    """Operands of bf16 from tiles of fp32, sums of rows over a slice, in `sides` parts as warps beside each other have
    them, and what the norm makes of these; is_exact: Z is one operand, not two halves."""

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

    @T.macro
    def scale_columns(b_x, by, b_terms):
        for i, j in T.Parallel(C, BK):
            b_terms[i, j] = by[j]
        for i, j in T.Parallel(C, BK):
            b_x[i, j] *= b_terms[i, j]

    def norm_part(b_dot, b_square, i, weight):
        """κ: the gradient of a row x with scale s is s (X - κ x), X that of s x; b_dot is X·x, b_square x·x."""
        if norm == "none":
            return 0.0
        if norm == "after":
            rho = T.rsqrt(in_all(b_square, i) + EPS)
            return rho * rho * in_all(b_dot, i)
        rho = T.rsqrt(weight * weight * in_all(b_square, i) + EPS)
        return weight * rho * (weight * rho) * in_all(b_dot, i)

    def weight_gradient(b_dot, b_square, i, weight):
        """The gradient of the router weight; never divides by the weight, which may be 0."""
        if norm == "none":
            return in_all(b_dot, i)
        if norm == "after":
            return T.rsqrt(in_all(b_square, i) + EPS) * in_all(b_dot, i)
        rho = T.rsqrt(weight * weight * in_all(b_square, i) + EPS)
        return in_all(b_dot, i) * EPS * rho * rho * rho

    return SimpleNamespace(
        second_half=second_half, take_z=take_z, row_sums=row_sums, scale_columns=scale_columns, in_all=in_all,
        norm_part=norm_part, weight_gradient=weight_gradient,
    )  # fmt: skip
