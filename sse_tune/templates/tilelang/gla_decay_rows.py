"""GLA decay rows: the in-chunk scores of every chunk and head, and the rows of k and q as they meet the state.

    P_ij = c_i a_j Σ_d q_id k_jd e^(b_id - b_jd),  j <= i        qg = c q e^b        kg = a k e^(b_C - b)

with b the in-chunk sum of log-gates; a chunk leaves `decay`, e^(b_C), of the state before it. One block per chunk and
head. A thread owns a few columns of one half of the rows: it sums their gates from the middle of the chunk outwards and
puts what the product takes in the place of its q and k. Nothing of it is another thread's until the product.

With r, b at the last row of the first half, e^(b_i - b_j) = e^(b_i - r) e^(r - b_j). A chunk whose exponents are all
within 40 nats is near: the largest product of two factors is e^80, and one product of matrices gives P. Any other is
taken by halves: of blocks of 2S rows only the pairs (second half, first half), both exponents from the middle of the
block and at most 0; S = C/2, ..., 1 cover every pair i > j once, and pairs i = j have no decay. Each S reads the rows
anew. A chunk is all near or all far, which its sums tell before anything is overwritten.

fp16 has not got the range of near factors: there they are rounded to tf32, those of k in the place of the gates.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.tilelang import common

if TYPE_CHECKING:
    import torch

NEAR_NATS = 40.0  # e^80, the largest product, times any operands is a finite fp32
# 2^x as its unit gives it, 0 for what is no normal number; and fp32 as tensor cores take it, who cut off what is left
NUMBERS = """
__device__ __forceinline__ float exp2_or_zero(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float round_to_tf32(float x) {
  unsigned y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return __uint_as_float(y);
}
"""


def smem_bytes(problem: Problem, config: Config) -> int:
    """Rows of q, k and gates of 32 bits at most, in fp16 a tf32 operand; the scores, two numbers a column and a row."""
    c, k, item = int(config["chunk_size"]), problem.key_dim, common.item_bytes(problem)
    wide = 4 if problem.dtype == "fp16" else 0
    return (2 * item + 4 + wide) * c * k + item * c * c + 4 * 2 * k + 4 * 2 * c + 1024


def columns_at_once(problem: Problem, num_warps: int) -> int:
    """Neighbouring columns that a thread takes at a time; half of the threads go through all columns."""
    return 2 if problem.key_dim % (2 * 16 * num_warps) == 0 else 1


SPACE = Space(
    params=(
        Param("rows_at_once", (4, 8, 16), 8, "rows that a thread reads before it writes the first of them"),
        Param("num_warps", (4, 8), 4, "warps per block, four to a warpgroup"),
        Param("blocks_per_sm", (1, 2, 3), 3, "blocks that registers are kept for"),
    ),
    constraints=(
        *common.OPERANDS,
        # half of the threads share out the columns of one half of the rows
        Constraint("K must be a multiple of 16 * num_warps",
                   lambda p, c, d: p.head_dim % (16 * c["num_warps"]) == 0),
        # the scores, and those of one level of halves beside them
        Constraint("chunk_size^2 / (32 * num_warps) <= 64",
                   lambda p, c, d: c["chunk_size"] ** 2 <= 64 * 32 * c["num_warps"]),
        Constraint("the tiles fit in shared memory",
                   lambda p, c, d: c["blocks_per_sm"] * smem_bytes(p, c) <= d.smem_per_block_bytes),
    ),
)


def factory(
    H: int, K: int, V: int, C: int, L: int, DTYPE: str, THREADS: int, BLOCKS: int, BATCH: int, COLUMNS: int,
    WRITERS: int, READERS: int, NORM: str, G_DTYPE: str, SHARED_G_DTYPE: str, CAPABILITY: int,
) -> Any:  # fmt: skip
    import tilelang.language as T
    from tilelang.layout import make_swizzled_layout

    io = common.copies(T, THREADS, L, CAPABILITY)
    mma = common.products(T, THREADS, CAPABILITY)
    R, M, N = (T.dynamic(name, "int64") for name in ("R", "M", "N"))
    EPS = 1e-6
    LOG2E = 1.4426950408889634
    WIDE = DTYPE == "float16"
    GATES = G_DTYPE if G_DTYPE == SHARED_G_DTYPE and not WIDE else "float32"  # as they lie in shared memory
    AT_ONCE = 4 if GATES == "float32" else common.VECTOR
    HALF = C // 2
    LEVELS = C.bit_length() - 1
    TEAM = THREADS // 2  # threads of one half of the rows
    SLICES = K // (TEAM * COLUMNS)
    PARTS = THREADS // C  # threads that share a row's norm
    BATCHES = HALF // BATCH
    # the order of a batch's rows, from the middle of the chunk outwards
    orders = {False: list(range(BATCH - 1, -1, -1)), True: list(range(BATCH))}

    def row_scale(square, weight):
        """What multiplies a row, from its squared norm and router weight."""
        if NORM == "none":
            return weight
        if NORM == "after":
            return weight * T.rsqrt(square + EPS)
        return weight * T.rsqrt(weight * weight * square + EPS)

    def exp2(exponent):
        return T.call_pure_extern("float32", "exp2_or_zero", exponent)

    def bounded(gate):
        """Below -128 e^g is 0 in fp32 either way, and a bounded gate keeps the digits of the sums it enters."""
        return T.max(T.Cast("float32", gate), -128.0)

    def tf32(number):
        return T.call_pure_extern("float32", "round_to_tf32", number)

    def batch_begin(is_second, n):
        return HALF + n * BATCH if is_second else (HALF - BATCH) - n * BATCH

    def column_of(i_slice, tx):
        return i_slice * (TEAM * COLUMNS) + tx % TEAM * COLUMNS

    @T.macro
    def gather_gates(source, b_g, slots, i_h, n_rows, tx):
        """Log-gates of the rows whose q and k this thread copies; 0 for rows that do not write, and past the end."""
        for p in T.unroll(io.passes(C, K)):
            i = p * THREADS + tx
            row = i // (K // common.VECTOR)
            token = T.Cast("int64", T.truncdiv(slots[p], L))
            lane = slots[p] - T.truncdiv(slots[p], L) * L
            for side in T.unroll(common.VECTOR // AT_ONCE):
                o_d = i % (K // common.VECTOR) * AT_ONCE + side * (K // 2)
                if source.dtype == GATES:
                    T.ptx_cp_async(
                        T.access_ptr(b_g[row, o_d], "w", AT_ONCE),
                        T.access_ptr(source[token, i_h, o_d], "r", AT_ONCE),
                        AT_ONCE,
                        predicate=(row < n_rows) and (lane < WRITERS),
                    )
                else:  # copies do not convert
                    for e in T.unroll(AT_ONCE):
                        b_g[row, o_d + e] = T.if_then_else(
                            (row < n_rows) and (lane < WRITERS), T.Cast("float32", source[token, i_h, o_d + e]), 0.0
                        )

    @T.macro
    def gather_rows(q, k, shared_q, shared_k, b_q, b_k, slots, is_shared, i_h, tx):
        if is_shared:
            io.gather(shared_q, b_q, 0, slots, i_h, 0, tx, C, K)
            io.gather(shared_k, b_k, 0, slots, i_h, 0, tx, C, K)
        else:
            io.gather(q, b_q, 0, slots, i_h, 0, tx, C, K)
            io.gather(k, b_k, 0, slots, i_h, 0, tx, C, K)
        T.ptx_commit_group()

    @T.macro
    def sum_half(b_g, b_ends, gates, total, far, half, tx):
        """e^(sum) over this thread's half of the rows, a number a column, and whether a partial sum is far."""
        far[0] = 0
        for i_slice in T.unroll(SLICES):
            column = column_of(i_slice, tx)
            for e in T.unroll(COLUMNS):
                total[e] = 0.0
            for n in T.serial(BATCHES):
                for r in T.unroll(BATCH):
                    for e in T.vectorized(COLUMNS):
                        gates[r * COLUMNS + e] = b_g[half * HALF + n * BATCH + r, column + e]
                for r in T.unroll(BATCH):
                    for e in T.unroll(COLUMNS):
                        total[e] += bounded(gates[r * COLUMNS + e])
            for e in T.unroll(COLUMNS):
                # the chunk's first gate comes before the rows of all pairs
                before = T.if_then_else(half == 0, bounded(b_g[0, column + e]), 0.0)
                if total[e] - before < -NEAR_NATS:
                    far[0] = 1
                b_ends[half, column + e] = exp2(total[e] * LOG2E)

    @T.macro
    def store_pair(target, pair, i_h, first, row, n_rows, column):
        if row < n_rows:
            for e in T.vectorized(COLUMNS):
                target[i_h, T.Cast("int64", first + row), column + e] = pair[e]

    @T.macro
    def near_rows(
        is_second, b_q, b_k, b_g, w_q, b_a, b_c, b_ends, qg, kg, x, up, down, qe, ke, pair, gates, q_rows, k_rows,
        a_rows, c_rows, i_h, first, n_rows, tx,
    ):
        """A half of a near chunk: what the product takes, e^(b - r) q and e^(r - b) k; and qg and kg from them."""
        for i_slice in T.unroll(SLICES):
            column = column_of(i_slice, tx)
            for e in T.unroll(COLUMNS):
                x[e] = 0.0
                up[e] = b_ends[0, column + e]
                down[e] = b_ends[1, column + e]
            for n in T.serial(BATCHES):
                begin = batch_begin(is_second, n)
                for r in T.unroll(BATCH):
                    for e in T.vectorized(COLUMNS):
                        gates[r * COLUMNS + e] = b_g[begin + r, column + e]
                    for e in T.vectorized(COLUMNS):
                        q_rows[r * COLUMNS + e] = b_q[0, begin + r, column + e]
                    for e in T.vectorized(COLUMNS):
                        k_rows[r * COLUMNS + e] = b_k[0, begin + r, column + e]
                for r in T.vectorized(BATCH):
                    a_rows[r] = b_a[begin + r]
                for r in T.vectorized(BATCH):
                    c_rows[r] = b_c[begin + r]
                for r in orders[is_second]:
                    for e in T.unroll(COLUMNS):
                        if is_second:
                            x[e] += T.Cast("float32", gates[r * COLUMNS + e]) * LOG2E
                            qe[e] = T.Cast("float32", q_rows[r * COLUMNS + e]) * exp2(x[e])
                            ke[e] = T.Cast("float32", k_rows[r * COLUMNS + e]) * exp2(-x[e])
                        else:
                            qe[e] = T.Cast("float32", q_rows[r * COLUMNS + e]) * exp2(-x[e])
                            ke[e] = T.Cast("float32", k_rows[r * COLUMNS + e]) * exp2(x[e])
                            x[e] += T.Cast("float32", gates[r * COLUMNS + e]) * LOG2E
                    for e in T.unroll(COLUMNS):
                        pair[e] = T.Cast(DTYPE, qe[e] * (up[e] * c_rows[r]))
                    store_pair(qg, pair, i_h, first, begin + r, n_rows, column)
                    for e in T.unroll(COLUMNS):
                        pair[e] = T.Cast(DTYPE, ke[e] * (down[e] * a_rows[r]))
                    store_pair(kg, pair, i_h, first, begin + r, n_rows, column)
                    if WIDE:
                        for e in T.unroll(COLUMNS):
                            qe[e] = tf32(qe[e])
                            ke[e] = tf32(ke[e])
                        for e in T.vectorized(COLUMNS):
                            w_q[begin + r, column + e] = qe[e]
                        for e in T.vectorized(COLUMNS):
                            b_g[begin + r, column + e] = ke[e]
                    else:
                        for e in T.vectorized(COLUMNS):
                            b_q[0, begin + r, column + e] = T.Cast(DTYPE, qe[e])
                        for e in T.vectorized(COLUMNS):
                            b_k[0, begin + r, column + e] = T.Cast(DTYPE, ke[e])

    @T.macro
    def far_rows(half, b_q, b_k, b_g, b_a, b_c, b_ends, qg, kg, x, up, down, pair, i_h, first, n_rows, tx):
        """A half of a far chunk: qg and kg. Their decays are products of numbers of at most 1."""
        for i_slice in T.unroll(SLICES):
            column = column_of(i_slice, tx)
            for e in T.unroll(COLUMNS):
                x[e] = 0.0
                up[e] = T.if_then_else(half == 0, 1.0, b_ends[0, column + e])
                down[e] = T.if_then_else(half == 0, b_ends[1, column + e], 1.0)
            for n in T.serial(HALF):
                up_row = half * HALF + n
                for e in T.unroll(COLUMNS):
                    x[e] += bounded(b_g[up_row, column + e]) * LOG2E
                    decayed = T.Cast("float32", b_q[0, up_row, column + e]) * (exp2(x[e]) * up[e])
                    pair[e] = T.Cast(DTYPE, decayed * b_c[up_row])
                store_pair(qg, pair, i_h, first, up_row, n_rows, column)
            for e in T.unroll(COLUMNS):
                x[e] = 0.0
            for n in T.serial(HALF):
                down_row = half * HALF + (HALF - 1) - n
                for e in T.unroll(COLUMNS):
                    decayed = T.Cast("float32", b_k[0, down_row, column + e]) * (exp2(x[e]) * down[e])
                    pair[e] = T.Cast(DTYPE, decayed * b_a[down_row])
                    x[e] += bounded(b_g[down_row, column + e]) * LOG2E
                store_pair(kg, pair, i_h, first, down_row, n_rows, column)

    @T.macro
    def decay_halves(half, level, b_q, b_k, b_g, x, tx):
        """Blocks of two halves of 2^level rows: q of second halves and k of first ones, decayed from the middle."""
        for i_slice in T.unroll(SLICES):
            column = column_of(i_slice, tx)
            for e in T.unroll(COLUMNS):
                x[e] = 0.0
            for n in T.serial(HALF):
                up_row = half * HALF + n
                if (up_row >> level) % 2 == 1:
                    for e in T.unroll(COLUMNS):
                        x[e] = T.if_then_else(up_row % (1 << level) == 0, 0.0, x[e])
                        x[e] += bounded(b_g[up_row, column + e]) * LOG2E
                        b_q[0, up_row, column + e] = T.Cast(
                            DTYPE, T.Cast("float32", b_q[0, up_row, column + e]) * exp2(x[e])
                        )
            for n in T.serial(HALF):
                down_row = half * HALF + (HALF - 1) - n
                if (down_row >> level) % 2 == 0:
                    for e in T.unroll(COLUMNS):
                        x[e] = T.if_then_else((down_row + 1) % (1 << level) == 0, 0.0, x[e])
                        b_k[0, down_row, column + e] = T.Cast(
                            DTYPE, T.Cast("float32", b_k[0, down_row, column + e]) * exp2(x[e])
                        )
                        x[e] += bounded(b_g[down_row, column + e]) * LOG2E

    @T.macro
    def multiply(left, right, product):
        """left · rightᵀ, once all threads have written their part of the two."""
        io.fence()
        T.sync_threads()
        mma.start(left, right, product, transpose_B=True, clear_accum=True, policy=T.GemmWarpPolicy.FullRow)
        mma.finish(0)
        mma.settle(product, C, C)

    @T.prim_func
    def gla_decay_rows(
        q: T.Tensor((R, H, K), DTYPE),
        k: T.Tensor((R, H, K), DTYPE),
        g: T.Tensor((R, H, K), G_DTYPE),
        shared_q: T.Tensor((R, H, K), DTYPE),
        shared_k: T.Tensor((R, H, K), DTYPE),
        shared_g: T.Tensor((R, H, K), SHARED_G_DTYPE),
        P: T.Tensor((H, M, C), DTYPE),
        qg: T.Tensor((H, M, K), DTYPE),
        kg: T.Tensor((H, M, K), DTYPE),
        decay: T.Tensor((N, H, K), "float32"),
        k_scale: T.Tensor((H, M), "float32"),
        q_scale: T.Tensor((H, M), "float32"),
        perm: T.Tensor((M,), "int32"),
        weights: T.Tensor((R * L,), "float32"),
        chunk_table: T.Tensor((N, 5), "int32"),
        scale: T.float32,
        n_shared: T.int32,
        n_blocks: T.int32,
    ):
        with T.Kernel(n_blocks, threads=THREADS) as block:
            T.annotate_min_blocks_per_sm(BLOCKS)
            T.import_source(NUMBERS)
            tx = T.get_thread_binding()
            i_h = block % H
            i_c = block // H
            half = tx // TEAM
            b_q = T.alloc_shared((1, C, K), DTYPE)
            b_k = T.alloc_shared((1, C, K), DTYPE)
            b_g = T.alloc_shared((C, K), GATES)
            w_q = T.alloc_shared((C, K) if WIDE else (1, 1), "float32")
            tf32_q, tf32_k = (T.view(x, dtype=T.tfloat32) for x in (w_q, b_g)) if WIDE else (None, None)
            b_P = T.alloc_shared((C, C), DTYPE)
            b_ends = T.alloc_shared((2, K), "float32", scope="shared")  # e^(sum over the first half, over the second)
            b_a = T.alloc_shared((C,), "float32", scope="shared")
            b_c = T.alloc_shared((C,), "float32", scope="shared")
            b_scores = T.alloc_fragment((C, C), "float32")
            b_level = T.alloc_fragment((C, C), "float32")
            T.annotate_layout({b_P: make_swizzled_layout(b_P)})
            slots = T.alloc_local((io.passes(C, K),), "int32")
            x = T.alloc_local((COLUMNS,), "float32")
            up = T.alloc_local((COLUMNS,), "float32")
            down = T.alloc_local((COLUMNS,), "float32")
            total = T.alloc_local((COLUMNS,), "float32")
            qe = T.alloc_local((COLUMNS,), "float32")
            ke = T.alloc_local((COLUMNS,), "float32")
            pair = T.alloc_local((COLUMNS,), DTYPE)
            gates = T.alloc_local((BATCH * COLUMNS,), GATES)
            q_rows = T.alloc_local((BATCH * COLUMNS,), DTYPE)
            k_rows = T.alloc_local((BATCH * COLUMNS,), DTYPE)
            a_rows = T.alloc_local((BATCH,), "float32")
            c_rows = T.alloc_local((BATCH,), "float32")
            vector = T.alloc_local((common.VECTOR,), DTYPE)
            far = T.alloc_local((1,), "int32")
            is_far = T.alloc_var("int32")
            k_square = T.alloc_var("float32")
            q_square = T.alloc_var("float32")
            weight = T.alloc_var("float32")

            i_seg = chunk_table[i_c, 0]
            first = chunk_table[i_c, 1]
            n_rows = chunk_table[i_c, 2]
            if i_seg >= 0:
                io.load_slots(perm, slots, first, n_rows, tx, C, K)
                if i_seg < n_shared:
                    gather_gates(shared_g, b_g, slots, i_h, n_rows, tx)
                else:
                    gather_gates(g, b_g, slots, i_h, n_rows, tx)
                T.ptx_commit_group()
                gather_rows(q, k, shared_q, shared_k, b_q, b_k, slots, i_seg < n_shared, i_h, tx)
                row = tx // PARTS
                slot = perm[T.Cast("int64", first + T.min(row, n_rows - 1))]
                lane = slot - T.truncdiv(slot, L) * L
                weight = weights[T.Cast("int64", slot)]
                T.ptx_wait_group(1)
                T.sync_threads()
                sum_half(b_g, b_ends, gates, total, far, half, tx)
                T.ptx_wait_group(0)
                k_square = 0.0
                q_square = 0.0
                if NORM != "none":
                    T.sync_threads()
                    for n in T.serial(K // (PARTS * common.VECTOR)):
                        o_d = (n * PARTS + tx % PARTS) * common.VECTOR
                        for e in T.vectorized(common.VECTOR):
                            vector[e] = b_k[0, row, o_d + e]
                        for e in T.unroll(common.VECTOR):
                            k_square += T.Cast("float32", vector[e]) * T.Cast("float32", vector[e])
                        for e in T.vectorized(common.VECTOR):
                            vector[e] = b_q[0, row, o_d + e]
                        for e in T.unroll(common.VECTOR):
                            q_square += T.Cast("float32", vector[e]) * T.Cast("float32", vector[e])
                    for i in T.unroll(PARTS.bit_length() - 1):
                        k_square += T.shfl_xor(k_square, 1 << i)
                        q_square += T.shfl_xor(q_square, 1 << i)
                if tx % PARTS == 0:
                    a = T.if_then_else((row < n_rows) and (lane < WRITERS), row_scale(k_square, weight), 0.0)
                    c = T.if_then_else((row < n_rows) and (lane < READERS), row_scale(q_square, weight), 0.0) * scale
                    b_a[row] = a
                    b_c[row] = c
                    if row < n_rows:
                        k_scale[i_h, T.Cast("int64", first + row)] = a
                        q_scale[i_h, T.Cast("int64", first + row)] = c
                is_far = T.syncthreads_or(far[0])
                for i in T.unroll(-(-K // THREADS)):
                    if i * THREADS + tx < K:
                        decay[T.Cast("int64", i_c), i_h, i * THREADS + tx] = (
                            b_ends[0, i * THREADS + tx] * b_ends[1, i * THREADS + tx]
                        )

                if is_far == 0:
                    if half == 0:
                        near_rows(
                            False, b_q, b_k, b_g, w_q, b_a, b_c, b_ends, qg, kg, x, up, down, qe, ke, pair, gates,
                            q_rows, k_rows, a_rows, c_rows, i_h, first, n_rows, tx,
                        )
                    else:
                        near_rows(
                            True, b_q, b_k, b_g, w_q, b_a, b_c, b_ends, qg, kg, x, up, down, qe, ke, pair, gates,
                            q_rows, k_rows, a_rows, c_rows, i_h, first, n_rows, tx,
                        )
                    if WIDE:
                        multiply(tf32_q, tf32_k, b_scores)
                    else:
                        multiply(b_q[0, :, :], b_k[0, :, :], b_scores)
                else:
                    far_rows(half, b_q, b_k, b_g, b_a, b_c, b_ends, qg, kg, x, up, down, pair, i_h, first, n_rows, tx)
                    for i, j in T.Parallel(C, C):
                        b_scores[i, j] = 0.0
                    for step in T.serial(LEVELS + 1):
                        level = LEVELS - step  # at first that of no halves: the pairs i = j
                        if step > 0:
                            T.sync_threads()
                            gather_rows(q, k, shared_q, shared_k, b_q, b_k, slots, i_seg < n_shared, i_h, tx)
                            T.ptx_wait_group(0)
                            T.sync_threads()
                            decay_halves(half, level, b_q, b_k, b_g, x, tx)
                        multiply(b_q[0, :, :], b_k[0, :, :], b_level)
                        for i, j in T.Parallel(C, C):
                            b_scores[i, j] += T.if_then_else(
                                T.if_then_else(step == 0, i - j, ((i >> level) ^ (j >> level)) - 1) == 0,
                                b_level[i, j],
                                0.0,
                            )
                # conditions on registers alone, or each number would be a branch of its own
                for i, j in T.Parallel(C, C):
                    b_scores[i, j] *= b_c[i] * b_a[j]
                for i, j in T.Parallel(C, C):
                    b_scores[i, j] = T.if_then_else(i >= j, b_scores[i, j], 0.0)
                T.sync_threads()
                T.copy(b_scores, b_P)
                T.sync_threads()
                io.store_by_head(b_P, P, first, n_rows, i_h, 0, tx, C, C)

    return gla_decay_rows


def run(call: Call, tensors: "Mapping[str, torch.Tensor]") -> None:
    problem = call.sizes.problem
    num_warps = int(call.config["num_warps"])
    dtypes = {
        f"{name}_dtype".upper(): str(tensors[name].dtype).removeprefix("torch.") for name in ("g", "shared_g")
    }
    values = common.constants(
        call, BLOCKS=int(call.config["blocks_per_sm"]), BATCH=int(call.config["rows_at_once"]),
        COLUMNS=columns_at_once(problem, num_warps),
        WRITERS=int(problem.shared) + problem.top_k, READERS=int(problem.shared) + problem.readers, NORM=problem.norm,
        **dtypes,
    )  # fmt: skip
    names = ("P", "qg", "kg", "decay", "k_scale", "q_scale", "perm", "weights", "chunk_table")
    blocks = call.sizes.chunks * problem.num_heads
    arguments = {**common.streams(tensors, "q", "k", "g"), **common.row_arguments(call, tensors, *names)}
    arguments |= dict(scale=call.scale, n_blocks=blocks, N=call.sizes.chunks)
    # TileLang 0.1.15 would have the two halves of the threads wait for each other within `near_rows`, for ever
    kernel = dataclasses.replace(common.program(__name__, "factory", values), own_barriers=True)
    call.launch(kernel, (blocks,), arguments, num_warps=num_warps, num_stages=1)


TEMPLATE = Template("tilelang", "gla_decay_rows", "decay_rows", ("gla",), SPACE, run, (__name__, common.MODULE))
