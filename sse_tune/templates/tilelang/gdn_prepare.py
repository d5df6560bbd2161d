"""GDN prepare: what a chunk needs that no state enters, for each chunk and head on its own.

    N = strictLower(beta_i a_i a_j k_i·k_j)     A = (I + N)^-1     Ag = G∘A∘beta_col     P = G∘c_i a_j (q_i·k_j)

with the row scales a of k and c of q, the in-chunk cumsum b of g, and G_ij = e^(b_i - b_j). The squared norms are the
diagonals of K Kᵀ and Q Qᵀ.

The inverse is taken in fp32, in shared memory, in the place of N and of the rows. Blocks on its diagonal go by forward
substitution, a thread to each column, whose registers hold it; all of them need the same numbers of N. Two such
inverses become one of twice the size, [[X, 0], [N21, Y]]^-1 = [[X, 0], [-Y N21 X, Y]]. What is above the diagonal is 0
all the while. The products are those of

- fp32: plain ones. N21 X goes through the upper right quarter.
- tf32x3: tensor cores, each number in two halves of which three products are taken. A warp makes 16 rows and columns,
  and for them (N21 X)ᵀ, whose sums lie in its registers as the second product wants its operand: a quarter of the
  reads.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.tilelang import common

if TYPE_CHECKING:
    import torch

# a b + sum, of 16 x 8 numbers of K: mma's lane 4 g + j takes j and j + 4, which may be any two as long as a and b agree
HALVES = """
#include <tl_templates/cuda/instruction/mma.h>
__device__ __forceinline__ void halve(float x, unsigned& high, unsigned& low) {
  high = __float_as_uint(x) & ~0x1fffu;
  low = __float_as_uint(x - __uint_as_float(high));
}
__device__ __forceinline__ void multiply_halves(float* sum, const float* a, const float* b) {
  unsigned a_high[4], a_low[4], b_high[2], b_low[2];
  for (int i = 0; i < 4; ++i) halve(a[i], a_high[i], a_low[i]);
  for (int i = 0; i < 2; ++i) halve(b[i], b_high[i], b_low[i]);
  using tl::DataType;
  constexpr auto tf32 = DataType::kTensorFloat32, fp32 = DataType::kFloat32;
  tl::mma_sync<tf32, tf32, fp32, 16, 8, 8, false, true>(sum, a_low, b_high);
  tl::mma_sync<tf32, tf32, fp32, 16, 8, 8, false, true>(sum, a_high, b_low);
  tl::mma_sync<tf32, tf32, fp32, 16, 8, 8, false, true>(sum, a_high, b_high);
}
"""
PAD = 8  # fp32 numbers between rows of N: no two rows that a warp writes at once share a bank


def smem_bytes(problem: Problem, config: Config) -> int:
    """Rows of q and k, then N and P in their place, and eight numbers a row."""
    c, k, item = int(config["chunk_size"]), problem.head_dim, common.item_bytes(problem)
    return max(2 * item * c * k, 4 * c * (c + PAD) + item * c * c) + 4 * 8 * c + 2048


SPACE = Space(
    params=(
        Param("solve_block", (16, 32), 16, "rows of the diagonal blocks that forward substitution inverts"),
        Param("products", ("fp32", "tf32x3"), "tf32x3", "what two inverses are made one by"),
        Param("num_warps", (4, 8), 4, "warps per block, four to a warpgroup"),
        Param("blocks_per_sm", (1, 2, 3, 4, 5), 5, "blocks that registers are kept for"),
    ),
    constraints=(
        *common.OPERANDS,
        # two such sums beside each other
        Constraint("chunk_size^2 / (32 * num_warps) <= 64",
                   lambda p, c, d: c["chunk_size"] ** 2 <= 64 * 32 * c["num_warps"]),
        # two sums, and 36 for the rest
        Constraint("the blocks of a multiprocessor have registers for their sums",
                   lambda p, c, d: c["blocks_per_sm"] * (2 * c["chunk_size"] ** 2 + 36 * 32 * c["num_warps"]) <= 65536),
        Constraint("the tiles fit in shared memory",
                   lambda p, c, d: c["blocks_per_sm"] * smem_bytes(p, c) <= d.smem_per_block_bytes),
    ),
)


def factory(
    H: int, K: int, V: int, C: int, L: int, DTYPE: str, THREADS: int, SOLVE: int, BLOCKS: int, WRITERS: int,
    READERS: int, NORM: str, TRAINS: bool, PRODUCTS: str, G_DTYPE: str, BETA_DTYPE: str, SHARED_G_DTYPE: str,
    SHARED_BETA_DTYPE: str, CAPABILITY: int,
) -> Any:  # fmt: skip
    import tilelang.language as T
    from tilelang.layout import make_swizzled_layout

    io = common.copies(T, THREADS, L, CAPABILITY)
    mma = common.products(T, THREADS, CAPABILITY)
    by_rows = T.GemmWarpPolicy.FullRow
    R, M, N = (T.dynamic(name, "int64") for name in ("R", "M", "N"))
    EPS = 1e-6
    HALF = C // 2
    # row, first of four columns, and how many of them are left of the diagonal; lists: the loops over them unroll here
    substitutions = [(i, j, [0, 1, 2, 3][: i - j]) for j in range(0, SOLVE, 4) for i in range(j + 1, SOLVE)]
    merges = [size for size in (16, 32, 64) if SOLVE <= size < C]
    # of a thread: its share of HALF x HALF, four columns at least, or two times four of a warp's 16 x 16
    SUMS = max(4 if PRODUCTS == "fp32" else 8, HALF * HALF // THREADS)
    STEPS = C * C // (THREADS * common.VECTOR)  # of all threads, to go through a tile

    def row_scale(square, weight):
        """What multiplies a row, from its squared norm and router weight."""
        if NORM == "none":
            return weight
        if NORM == "after":
            return weight * T.rsqrt(square + EPS)
        return weight * T.rsqrt(weight * weight * square + EPS)

    @T.macro
    def invert_diagonal(b_N, x, row, tx):
        """(I + N)^-1 of each block on the diagonal, in its place: four columns of N at a time from all rows below."""
        o_n = tx // SOLVE * SOLVE
        for i in T.unroll(SOLVE):
            x[i] = T.if_then_else(tx % SOLVE == i, 1.0, 0.0)
        if tx < C:
            for i, j, columns in substitutions:
                for e in T.vectorized(4):
                    row[e] = b_N[o_n + i, o_n + j + e]
                for e in columns:
                    x[i] -= row[e] * x[j + e]
        T.sync_threads()
        if tx < C:
            for i in T.unroll(SOLVE):
                b_N[o_n + i, tx] = x[i]
        T.sync_threads()

    @T.macro
    def multiply(b_N, acc, left, right, o_left, o_left_k, o_right, o_right_c, size, step, turns):
        """acc[turn, 0..3] of rows o_left + step * turn: their `size` numbers from column o_left_k on, times the four
        columns from o_right_c on of the rows from o_right on."""
        for i in T.unroll(turns * 4):
            acc[i] = 0.0
        for i_k in T.serial(size // 4):
            for e in T.unroll(4):
                for j in T.vectorized(4):
                    right[e * 4 + j] = b_N[o_right + i_k * 4 + e, o_right_c + j]
            for turn in T.unroll(turns):
                for e in T.vectorized(4):
                    left[e] = b_N[o_left + step * turn, o_left_k + i_k * 4 + e]
                for e in T.unroll(4):
                    for j in T.unroll(4):
                        acc[turn * 4 + j] += left[e] * right[e * 4 + j]

    @T.macro
    def merge(b_N, acc, left, right, size, tx):
        """Inverses of `size` rows, two by two, to those of twice as many."""
        pairs = HALF // size
        team = min(THREADS // pairs, size * size // 4)  # threads of a pair, four columns of some rows each
        step = team * 4 // size
        turns = size // step
        pair = tx // team
        o_pair = pair * 2 * size
        row = tx % team // (size // 4)
        column = tx % (size // 4) * 4
        if tx < pairs * team:
            multiply(
                b_N, acc, left, right, o_pair + size + row, o_pair, o_pair, o_pair + column, size, step, turns
            )
            for turn in T.unroll(turns):
                for j in T.vectorized(4):
                    b_N[pair * size + row + step * turn, HALF + column + j] = acc[turn * 4 + j]
        T.sync_threads()
        if tx < pairs * team:
            multiply(
                b_N, acc, left, right, o_pair + size + row, o_pair + size, pair * size, HALF + column, size, step, turns
            )
            for turn in T.unroll(turns):
                for j in T.vectorized(4):
                    b_N[o_pair + size + row + step * turn, o_pair + column + j] = -acc[turn * 4 + j]
        T.sync_threads()

    @T.macro
    def multiply_halves(sums, o_sums, left, right, o_right):
        T.evaluate(
            T.call_extern(
                "handle", "multiply_halves", T.address_of(sums[o_sums]), T.address_of(left[0]),
                T.address_of(right[o_right]),
            )
        )  # fmt: skip

    def place(unit, size):
        """First rows of a pair of blocks, and of the 16 rows and columns that are made of it."""
        n = size // 16
        o_pair = unit // (n * n) * 2 * size
        return o_pair, o_pair + size + unit // n % n * 16, o_pair + unit % n * 16

    @T.macro
    def merge_by_halves(b_N, inner, acc, left, right, size, tx):
        """The same. Lane 4 g + j has rows g and g + 8, and of K, or of a sum's columns, 2 j and 2 j + 1 of every 8."""
        units = HALF * size // 256  # 16 rows and columns each
        turns = -(-units // (THREADS // 32))
        g = tx % 32 // 4
        j = tx % 4 * 2
        for turn in T.unroll(turns):
            unit = turn * (THREADS // 32) + tx // 32
            o_pair, o_row, o_column = place(unit, size)
            if unit < units:
                for i in T.unroll(size // 2):
                    inner[i] = 0.0
                for i_k in T.unroll(size // 8):
                    for e in T.unroll(4):
                        left[e] = b_N[o_pair + i_k * 8 + j + e // 2, o_column + g + e % 2 * 8]
                    for i_n in T.unroll(size // 8):
                        for e in T.vectorized(2):
                            right[e] = b_N[o_pair + size + i_n * 8 + g, o_pair + i_k * 8 + j + e]
                        multiply_halves(inner, i_n * 4, left, right, 0)
                for i in T.unroll(8):
                    acc[turn * 8 + i] = 0.0
                for i_k in T.unroll(size // 8):
                    for half in T.unroll(2):
                        for e in T.vectorized(2):
                            right[e] = b_N[o_row + half * 8 + g, o_pair + size + i_k * 8 + j + e]
                        for e in T.unroll(2):
                            left[half + e * 2] = right[e]
                    for half in T.unroll(2):
                        multiply_halves(acc, turn * 8 + half * 4, left, inner, i_k * 4 + half * 2)
        T.sync_threads()
        for turn in T.unroll(turns):
            unit = turn * (THREADS // 32) + tx // 32
            _, o_row, o_column = place(unit, size)
            if unit < units:
                for i in T.unroll(4):
                    for e in T.vectorized(2):
                        b_N[o_row + i % 2 * 8 + g, o_column + i // 2 * 8 + j + e] = -acc[turn * 8 + i * 2 + e]
        T.sync_threads()

    @T.prim_func
    def gdn_prepare(
        q: T.Tensor((R, H, K), DTYPE),
        k: T.Tensor((R, H, K), DTYPE),
        g: T.Tensor((R, H), G_DTYPE),
        beta: T.Tensor((R, H), BETA_DTYPE),
        shared_q: T.Tensor((R, H, K), DTYPE),
        shared_k: T.Tensor((R, H, K), DTYPE),
        shared_g: T.Tensor((R, H), SHARED_G_DTYPE),
        shared_beta: T.Tensor((R, H), SHARED_BETA_DTYPE),
        P: T.Tensor((H, M, C), DTYPE),
        Ag: T.Tensor((H, M, C), DTYPE),
        A: T.Tensor((H, M, C), DTYPE),
        k_scale: T.Tensor((H, M), "float32"),
        q_scale: T.Tensor((H, M), "float32"),
        g_cumsum: T.Tensor((H, M), "float32"),
        perm: T.Tensor((M,), "int32"),
        weights: T.Tensor((R * L,), "float32"),
        chunk_table: T.Tensor((N, 5), "int32"),
        scale: T.float32,
        n_shared: T.int32,
        n_blocks: T.int32,
    ):
        with T.Kernel(n_blocks, threads=THREADS) as block:
            T.annotate_min_blocks_per_sm(BLOCKS)
            if PRODUCTS == "tf32x3":
                T.import_source(HALVES)
            tx = T.get_thread_binding()
            i_h = block % H
            i_c = block // H
            b_k = T.alloc_shared((1, C, K), DTYPE)
            b_q = T.alloc_shared((1, C, K), DTYPE)
            b_N = T.alloc_shared((C, C + PAD), "float32")  # then its inverse
            b_P = T.alloc_shared((C, C), DTYPE)
            b_a = T.alloc_shared((C,), "float32", scope="shared")
            b_c = T.alloc_shared((C,), "float32", scope="shared")
            b_b = T.alloc_shared((C,), "float32", scope="shared")
            b_beta = T.alloc_shared((C,), "float32", scope="shared")
            b_erase = T.alloc_shared((C,), "float32", scope="shared")
            b_k_square = T.alloc_shared((C,), "float32", scope="shared")
            b_q_square = T.alloc_shared((C,), "float32", scope="shared")
            b_sums = T.alloc_shared((C // 32,), "float32", scope="shared")
            b_kk = T.alloc_fragment((C, C), "float32")
            b_qk = T.alloc_fragment((C, C), "float32")
            slots = T.alloc_local((io.passes(C, K),), "int32")
            x = T.alloc_local((SOLVE,), "float32")
            row4 = T.alloc_local((4,), "float32")
            acc = T.alloc_local((SUMS,), "float32")
            inner = T.alloc_local((HALF // 2,), "float32")
            right = T.alloc_local((16,), "float32")
            inverse = T.alloc_local((common.VECTOR,), "float32")
            betas = T.alloc_local((common.VECTOR,), "float32")
            gated = T.alloc_local((common.VECTOR,), DTYPE)
            T.annotate_layout({b_P: make_swizzled_layout(b_P)})
            plain = T.alloc_local((common.VECTOR,), DTYPE)
            gate = T.alloc_var("float32")
            before = T.alloc_var("float32")
            own_beta = T.alloc_var("float32")
            weight = T.alloc_var("float32")
            writes = T.alloc_var("bool")
            reads = T.alloc_var("bool")

            i_seg = chunk_table[i_c, 0]
            first = chunk_table[i_c, 1]
            n_rows = chunk_table[i_c, 2]
            if i_seg >= 0:
                io.load_slots(perm, slots, first, n_rows, tx, C, K)
                if i_seg < n_shared:
                    io.gather(shared_k, b_k, 0, slots, i_h, 0, tx, C, K)
                    io.gather(shared_q, b_q, 0, slots, i_h, 0, tx, C, K)
                else:
                    io.gather(k, b_k, 0, slots, i_h, 0, tx, C, K)
                    io.gather(q, b_q, 0, slots, i_h, 0, tx, C, K)
                T.ptx_commit_group()
                slot = perm[T.Cast("int64", first + T.min(tx, n_rows - 1))]
                token = T.Cast("int64", T.truncdiv(slot, L))
                lane = slot - T.truncdiv(slot, L) * L
                writes = (tx < n_rows) and (lane < WRITERS)
                reads = (tx < n_rows) and (lane < READERS)
                weight = weights[T.Cast("int64", slot)]
                gate = 0.0
                own_beta = 0.0
                if writes:
                    if i_seg < n_shared:
                        gate = T.Cast("float32", shared_g[token, i_h])
                        own_beta = T.Cast("float32", shared_beta[token, i_h])
                    else:
                        gate = T.Cast("float32", g[token, i_h])
                        own_beta = T.Cast("float32", beta[token, i_h])
                    gate = T.max(gate, -128.0)
                for i in T.unroll(5):
                    before = T.shfl_up(gate, 1 << i)
                    if tx % 32 >= 1 << i:
                        gate += before
                if tx < C and tx % 32 == 31:
                    b_sums[tx // 32] = gate
                io.arrive(0)

                mma.start(b_k[0, :, :], b_k[0, :, :], b_kk, transpose_B=True, clear_accum=True, policy=by_rows)
                mma.start(b_q[0, :, :], b_q[0, :, :], b_qk, transpose_B=True, clear_accum=True, policy=by_rows)
                for i in T.unroll(C // 32 - 1):
                    if tx // 32 > i:
                        gate += b_sums[i]
                if tx < C:
                    b_b[tx] = gate
                    if tx < n_rows:
                        g_cumsum[i_h, T.Cast("int64", first + tx)] = gate
                mma.finish(0)
                mma.settle(b_kk, C, C)
                mma.settle(b_qk, C, C)
                for i, j in T.Parallel(C, C):
                    if i == j:
                        b_k_square[i] = b_kk[i, j]
                        b_q_square[i] = b_qk[i, j]
                mma.start(b_q[0, :, :], b_k[0, :, :], b_qk, transpose_B=True, clear_accum=True, policy=by_rows)
                T.sync_threads()
                if tx < C:
                    a = T.if_then_else(writes, row_scale(b_k_square[tx], weight), 0.0)
                    c = T.if_then_else(reads, row_scale(b_q_square[tx], weight), 0.0) * scale
                    b_a[tx] = a
                    b_c[tx] = c
                    b_beta[tx] = own_beta
                    b_erase[tx] = own_beta * a
                    if tx < n_rows:
                        k_scale[i_h, T.Cast("int64", first + tx)] = a
                        q_scale[i_h, T.Cast("int64", first + tx)] = c
                mma.finish(0)
                mma.settle(b_qk, C, C)
                T.sync_threads()

                # conditions on registers alone, or each number would be a branch of its own
                for i, j in T.Parallel(C, C):
                    b_kk[i, j] *= b_erase[i] * b_a[j]
                for i, j in T.Parallel(C, C):
                    b_N[i, j] = T.if_then_else(i > j, b_kk[i, j], 0.0)
                for i, j in T.Parallel(C, C):
                    b_qk[i, j] *= b_c[i] * b_a[j] * T.__exp(T.min(b_b[i] - b_b[j], 0.0))
                for i, j in T.Parallel(C, C):
                    b_qk[i, j] = T.if_then_else(i >= j, b_qk[i, j], 0.0)
                T.copy(b_qk, b_P)
                T.sync_threads()
                io.store_by_head(b_P, P, first, n_rows, i_h, 0, tx, C, C)
                invert_diagonal(b_N, x, row4, tx)
                for size in merges:
                    if PRODUCTS == "tf32x3":
                        merge_by_halves(b_N, inner, acc, row4, right, size, tx)
                    else:
                        merge(b_N, acc, row4, right, size, tx)
                for e in T.unroll(common.VECTOR):
                    betas[e] = b_beta[tx % (C // common.VECTOR) * common.VECTOR + e]
                for p in T.unroll(STEPS):
                    i = (p * THREADS + tx) // (C // common.VECTOR)
                    j = tx % (C // common.VECTOR) * common.VECTOR
                    if i < n_rows:
                        for half in T.unroll(2):
                            for e in T.vectorized(4):
                                inverse[half * 4 + e] = b_N[i, j + half * 4 + e]
                        for e in T.unroll(common.VECTOR):
                            inverse[e] = T.if_then_else(i >= j + e, inverse[e], 0.0)
                        for e in T.unroll(common.VECTOR):
                            plain[e] = T.Cast(DTYPE, inverse[e])
                            gated[e] = T.Cast(DTYPE, T.__exp(T.min(b_b[i] - b_b[j + e], 0.0)) * inverse[e] * betas[e])
                        row = T.Cast("int64", first + i)
                        if TRAINS:
                            for e in T.vectorized(common.VECTOR):
                                A[i_h, row, j + e] = plain[e]
                        for e in T.vectorized(common.VECTOR):
                            Ag[i_h, row, j + e] = gated[e]

    return gdn_prepare


def run(call: Call, tensors: "Mapping[str, torch.Tensor]") -> None:
    problem = call.sizes.problem
    dtypes = {
        f"{name}_dtype".upper(): str(tensors[name].dtype).removeprefix("torch.")
        for name in ("g", "beta", "shared_g", "shared_beta")
    }
    values = common.constants(
        call, SOLVE=int(call.config["solve_block"]), BLOCKS=int(call.config["blocks_per_sm"]),
        WRITERS=int(problem.shared) + problem.top_k, READERS=int(problem.shared) + problem.readers, NORM=problem.norm,
        TRAINS=problem.trains, PRODUCTS=str(call.config["products"]), **dtypes,
    )  # fmt: skip
    names = ("P", "Ag", "k_scale", "q_scale", "g_cumsum", "perm", "weights", "chunk_table")
    blocks = call.sizes.chunks * problem.num_heads
    arguments = {**common.streams(tensors, "q", "k", "g", "beta"), **common.row_arguments(call, tensors, *names)}
    arguments |= dict(
        A=tensors.get("A", tensors["Ag"]),  # not written when nothing is trained
        scale=call.scale, n_blocks=blocks, N=call.sizes.chunks,
    )  # fmt: skip
    call.launch(
        common.program(__name__, "factory", values),
        (blocks,),
        arguments,
        num_warps=int(call.config["num_warps"]),
        num_stages=1,
    )


TEMPLATE = Template("tilelang", "gdn_prepare", "prepare", ("gdn",), SPACE, run, (__name__, common.MODULE))
