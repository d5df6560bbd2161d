"""GDN score gradients: of a chunk's scores and key products, before the states come in; one block per chunk and head.

In the notation of `gdn_scan`, with dV' the gradient of V' and V' = Ag W taken again:

    dP = tril(dO V'ᵀ)      dAg = tril(dV' Wᵀ)      dN = -strictLower(Aᵀ (G∘dAg∘beta_col) Aᵀ)      E = beta_i dN
    dbeta_j = Σ_i G·dAg·A + Σ_t dN_jt a_j a_t k_j·k_t
    db = rowsum - colsum (dP∘P + dAg∘Ag)

Kept for `gdn_gradients` are G∘dP and E + Eᵀ, without the row scales: those go to the rows they multiply.

The inverse of nearly parallel keys cancels, so what dN is a product of has sixteen bits and not eight: fp32 tiles go in
as two of bf16. A itself is one where it was stored in bf16, and two are made of it where it was not.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.tilelang import common

if TYPE_CHECKING:
    import torch

PAD = 8  # numbers between the rows of tiles that are gone through by columns


def smem_bytes(problem: Problem, config: Config) -> int:
    """k, Ag, P and A; the pieces of V and of V' in their slots, or what comes in their place: sums or halves."""
    c, k, bv, item = int(config["chunk_size"]), problem.head_dim, int(config["block_v"]), common.item_bytes(problem)
    pieces = item * c * bv * (3 * int(config["num_stages"]) + 1)
    halves = 2 * c * c * (2 if problem.dtype == "bf16" else 4)
    return item * (c * k + 3 * c * c) + max(pieces, 4 * c * (c + PAD) + halves) + 4 * 9 * c + 2048


SPACE = Space(
    params=(
        Param("block_v", (64, 128), 64, "columns of V taken at a time"),
        # halves of sums are operands in registers, where a warp must have whole rows of them: with eight warps, two
        # to the same sixteen rows, TileLang finds no layout for any config (0.1.15, all architectures)
        Param("num_warps", (4,), 4, "warps per block, sixteen rows each"),
        Param("num_stages", (1, 2), 1, "pieces of V in shared memory"),
        Param("blocks_per_sm", (1, 2, 3), 3, "blocks that registers are kept for"),
    ),
    constraints=(
        *common.OPERANDS,
        *common.block_v_constraints(),
        # three such sums beside each other
        Constraint("chunk_size^2 / (32 * num_warps) <= 64",
                   lambda p, c, d: c["chunk_size"] ** 2 <= 64 * 32 * c["num_warps"]),
        # three sums of at most max(chunk_size, block_v) columns, and 40 for the rest
        Constraint("the blocks of a multiprocessor have registers for their sums",
                   lambda p, c, d: c["blocks_per_sm"] * (
                       c["chunk_size"] * (2 * c["chunk_size"] + c["block_v"]) + 32 * 32 * c["num_warps"]) <= 65536),
        Constraint("the tiles fit in shared memory", lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
    ),
)


def factory(
    H: int, K: int, V: int, C: int, L: int, DTYPE: str, THREADS: int, BV: int, STAGES: int, BLOCKS: int,
    HAS_SHARED: bool, WRITERS: int, READERS: int, BETA_DTYPE: str, SHARED_BETA_DTYPE: str, CAPABILITY: int,
) -> Any:  # fmt: skip
    import tilelang.language as T
    from tilelang.layout import make_swizzled_layout

    io = common.copies(T, THREADS, L, CAPABILITY)
    mma = common.products(T, THREADS, CAPABILITY)
    by_rows = T.GemmWarpPolicy.FullRow
    NV = V // BV
    IS_EXACT = DTYPE == "bfloat16"  # A is one operand of bf16
    R, M, N, G = (T.dynamic(name, "int64") for name in ("R", "M", "N", "G"))

    @T.macro
    def fetch(t, do, w, dv_new, b_do, b_w, b_dnew, slots, first, n_rows, i_h, tx):
        at = t % STAGES
        io.copy_by_head(w, b_w, at, first, n_rows, i_h, t * BV, tx, C, BV)
        io.copy_by_head(dv_new, b_dnew, at, first, n_rows, i_h, t * BV, tx, C, BV)
        io.gather(do, b_do, at, slots, i_h, t * BV, tx, C, BV)

    @T.macro
    def halve(b_x, b_high, b_low):
        """A tile of fp32 as two of bf16; b_x is left with the second."""
        T.copy(b_x, b_high)
        for i, j in T.Parallel(C, C):
            b_x[i, j] -= T.Cast("float32", T.Cast("bfloat16", b_x[i, j]))
        T.copy(b_x, b_low)

    @T.macro
    def column_sum(b_tile, total, into, tx):
        if tx < C:
            total[0] = 0.0
            for i in T.unroll(C):
                total[0] += b_tile[i, tx]
            into[tx] = total[0]

    @T.prim_func
    def gdn_score_gradients(
        k: T.Tensor((R, H, K), DTYPE),
        beta: T.Tensor((R, H), BETA_DTYPE),
        shared_k: T.Tensor((R, H, K), DTYPE),
        shared_beta: T.Tensor((R, H), SHARED_BETA_DTYPE),
        do: T.Tensor((R, H, V), DTYPE),
        P: T.Tensor((H, M, C), DTYPE),
        Ag: T.Tensor((H, M, C), DTYPE),
        A: T.Tensor((H, M, C), DTYPE),
        k_scale: T.Tensor((H, M), "float32"),
        g_cumsum: T.Tensor((H, M), "float32"),
        w: T.Tensor((H, M, V), DTYPE),
        dv_new: T.Tensor((H, M, V), DTYPE),
        dp: T.Tensor((H, M, C), DTYPE),
        dn: T.Tensor((H, M, C), DTYPE),
        db: T.Tensor((H, M), "float32"),
        dbeta_rows: T.Tensor((H, G), "float32"),
        d_shared_beta: T.Tensor((R, H), SHARED_BETA_DTYPE),
        perm: T.Tensor((M,), "int32"),
        chunk_table: T.Tensor((N, 5), "int32"),
        n_shared: T.int32,
        n_shared_rows: T.int32,
        n_blocks: T.int32,
    ):
        with T.Kernel(n_blocks, threads=THREADS) as block:
            T.annotate_min_blocks_per_sm(BLOCKS)
            tx = T.get_thread_binding()
            i_h = block % H
            i_c = block // H
            b_k = T.alloc_shared((1, C, K), DTYPE)
            b_Ag = T.alloc_shared((1, C, C), DTYPE)
            b_P = T.alloc_shared((1, C, C), DTYPE)
            b_A = T.alloc_shared((1, C, C), DTYPE)
            b_do = T.alloc_shared((STAGES, C, BV), DTYPE)
            b_w = T.alloc_shared((STAGES, C, BV), DTYPE)
            b_dnew = T.alloc_shared((STAGES, C, BV), DTYPE)
            b_new = T.alloc_shared((C, BV), DTYPE)
            b_tile = T.alloc_shared((C, C + PAD), "float32")
            b_dp = T.alloc_shared((C, C), DTYPE)
            b_dn = T.alloc_shared((C, C + PAD), DTYPE)
            b_high = T.alloc_shared((C, C), "bfloat16")
            b_low = T.alloc_shared((C, C), "bfloat16")
            b_A_high = T.alloc_shared((C, C), "bfloat16")
            b_A_low = T.alloc_shared((C, C), "bfloat16")
            b_a = T.alloc_shared((1, C), "float32", scope="shared")
            b_b = T.alloc_shared((1, C), "float32", scope="shared")
            b_beta = T.alloc_shared((C,), "float32", scope="shared")
            b_reads = T.alloc_shared((C,), "float32", scope="shared")
            b_across = T.alloc_shared((C,), "float32", scope="shared")
            b_down = T.alloc_shared((C,), "float32", scope="shared")
            b_dbeta = T.alloc_shared((C,), "float32", scope="shared")
            b_x = T.alloc_fragment((C, BV), "float32")
            b_dP = T.alloc_fragment((C, C), "float32")
            b_dAg = T.alloc_fragment((C, C), "float32")
            b_y = T.alloc_fragment((C, C), "float32")
            b_y_high = T.alloc_fragment((C, C), "bfloat16")
            b_y_low = T.alloc_fragment((C, C), "bfloat16")
            b_sums = T.alloc_fragment((C,), "float32")
            slots = T.alloc_local((io.passes(C, BV),), "int32")
            slots_k = T.alloc_local((io.passes(C, K),), "int32")
            total = T.alloc_local((1,), "float32")
            own_beta = T.alloc_var("float32")
            writes = T.alloc_var("bool")
            T.annotate_layout({b_P: make_swizzled_layout(b_P), b_dp: make_swizzled_layout(b_dp)})
            if not IS_EXACT:  # no product reads it
                T.annotate_layout({b_A: make_swizzled_layout(b_A)})

            i_seg = chunk_table[i_c, 0]
            first = chunk_table[i_c, 1]
            n_rows = chunk_table[i_c, 2]
            if i_seg >= 0:
                io.load_slots(perm, slots, first, n_rows, tx, C, BV)
                io.load_slots(perm, slots_k, first, n_rows, tx, C, K)
                io.copy_by_head(Ag, b_Ag, 0, first, n_rows, i_h, 0, tx, C, C)
                for t in T.unroll(STAGES):
                    if t < NV:
                        fetch(t, do, w, dv_new, b_do, b_w, b_dnew, slots, first, n_rows, i_h, tx)
                    T.ptx_commit_group()
                io.copy_by_head(P, b_P, 0, first, n_rows, i_h, 0, tx, C, C)
                io.copy_by_head(A, b_A, 0, first, n_rows, i_h, 0, tx, C, C)
                io.copy_scalars(k_scale, b_a, 0, first, n_rows, i_h, tx, C)
                io.copy_scalars(g_cumsum, b_b, 0, first, n_rows, i_h, tx, C)
                if i_seg < n_shared:
                    io.gather(shared_k, b_k, 0, slots_k, i_h, 0, tx, C, K)
                else:
                    io.gather(k, b_k, 0, slots_k, i_h, 0, tx, C, K)
                T.ptx_commit_group()
                slot = perm[T.Cast("int64", first + T.min(tx, n_rows - 1))]
                token = T.Cast("int64", T.truncdiv(slot, L))
                lane = slot - T.truncdiv(slot, L) * L
                writes = (tx < n_rows) and (lane < WRITERS)
                own_beta = 0.0
                if writes:
                    if i_seg < n_shared:
                        own_beta = T.Cast("float32", shared_beta[token, i_h])
                    else:
                        own_beta = T.Cast("float32", beta[token, i_h])
                if tx < C:
                    b_beta[tx] = own_beta
                    b_reads[tx] = T.if_then_else((tx < n_rows) and (lane < READERS), 1.0, 0.0)
                T.clear(b_dP)
                T.clear(b_dAg)
                io.arrive(STAGES)
                for t in T.serial(NV):
                    at = t % STAGES
                    mma.start(b_Ag[0, :, :], b_w[at, :, :], b_x, clear_accum=True, policy=by_rows)
                    mma.start(b_dnew[at, :, :], b_w[at, :, :], b_dAg, transpose_B=True, policy=by_rows)
                    mma.finish(1)
                    mma.settle(b_x, C, BV)
                    T.copy(b_x, b_new)
                    io.fence()
                    T.sync_threads()
                    mma.start(b_do[at, :, :], b_new, b_dP, transpose_B=True, policy=by_rows)
                    mma.finish(0)
                    mma.settle(b_dAg, C, C)
                    mma.settle(b_dP, C, C)
                    T.sync_threads()
                    if t + STAGES < NV:
                        fetch(t + STAGES, do, w, dv_new, b_do, b_w, b_dnew, slots, first, n_rows, i_h, tx)
                    T.ptx_commit_group()
                    io.arrive(STAGES - 1)
                io.arrive(0)

                # what rows past the end hold is a copy of the last row's
                for i, j in T.Parallel(C, C):
                    b_dP[i, j] = T.if_then_else((i >= j) and (b_reads[i] > 0.0), b_dP[i, j], 0.0)
                    b_dAg[i, j] = T.if_then_else((i >= j) and (i < n_rows), b_dAg[i, j], 0.0)
                for i, j in T.Parallel(C, C):
                    b_y[i, j] = b_dP[i, j] * b_P[0, i, j] + b_dAg[i, j] * b_Ag[0, i, j]
                T.reduce_sum(b_y, b_sums, dim=1)
                T.copy(b_sums, b_across)
                for i, j in T.Parallel(C, C):
                    b_tile[i, j] = b_y[i, j]
                for i, j in T.Parallel(C, C):
                    b_y[i, j] = T.__exp(T.min(b_b[0, i] - b_b[0, j], 0.0))
                for i, j in T.Parallel(C, C):
                    b_dP[i, j] *= b_y[i, j]
                for i, j in T.Parallel(C, C):
                    b_dAg[i, j] *= b_y[i, j]
                T.copy(b_dP, b_dp)
                T.sync_threads()
                io.store_by_head(b_dp, dp, first, n_rows, i_h, 0, tx, C, C)
                column_sum(b_tile, total, b_down, tx)
                if tx < n_rows:
                    db[i_h, T.Cast("int64", first + tx)] = b_across[tx] - b_down[tx]
                T.sync_threads()
                for i, j in T.Parallel(C, C):
                    b_tile[i, j] = b_dAg[i, j] * b_A[0, i, j]
                for i, j in T.Parallel(C, C):
                    b_dAg[i, j] *= b_beta[j]
                if not IS_EXACT:
                    for i, j in T.Parallel(C, C):
                        b_A_high[i, j] = T.Cast("bfloat16", T.Cast("float32", b_A[0, i, j]))
                    for i, j in T.Parallel(C, C):
                        b_A_low[i, j] = T.Cast(
                            "bfloat16",
                            T.Cast("float32", b_A[0, i, j])
                            - T.Cast("float32", T.Cast("bfloat16", T.Cast("float32", b_A[0, i, j]))),
                        )
                    io.fence()
                halve(b_dAg, b_y_high, b_y_low)
                T.sync_threads()
                if IS_EXACT:
                    mma.start(b_y_low, b_A[0, :, :], b_y, transpose_B=True, clear_accum=True, policy=by_rows)
                    mma.start(b_y_high, b_A[0, :, :], b_y, transpose_B=True, policy=by_rows)
                else:
                    mma.start(b_y_low, b_A_high, b_y, transpose_B=True, clear_accum=True, policy=by_rows)
                    mma.start(b_y_high, b_A_low, b_y, transpose_B=True, policy=by_rows)
                    mma.start(b_y_high, b_A_high, b_y, transpose_B=True, policy=by_rows)
                column_sum(b_tile, total, b_dbeta, tx)
                mma.finish(0)
                mma.settle(b_y, C, C)
                halve(b_y, b_high, b_low)
                io.fence()
                T.sync_threads()
                if IS_EXACT:
                    mma.start(b_A[0, :, :], b_low, b_dP, transpose_A=True, clear_accum=True, policy=by_rows)
                    mma.start(b_A[0, :, :], b_high, b_dP, transpose_A=True, policy=by_rows)
                else:
                    mma.start(b_A_high, b_low, b_dP, transpose_A=True, clear_accum=True, policy=by_rows)
                    mma.start(b_A_low, b_high, b_dP, transpose_A=True, policy=by_rows)
                    mma.start(b_A_high, b_high, b_dP, transpose_A=True, policy=by_rows)
                mma.start(b_k[0, :, :], b_k[0, :, :], b_y, transpose_B=True, clear_accum=True, policy=by_rows)
                mma.finish(0)
                mma.settle(b_dP, C, C)
                mma.settle(b_y, C, C)
                for i, j in T.Parallel(C, C):
                    b_dP[i, j] = T.if_then_else(i > j, -b_dP[i, j], 0.0)
                for i, j in T.Parallel(C, C):
                    b_y[i, j] *= b_dP[i, j] * b_a[0, j]
                T.reduce_sum(b_y, b_sums, dim=1)
                T.copy(b_sums, b_across)
                for i, j in T.Parallel(C, C):
                    b_dP[i, j] *= b_beta[i]
                for i, j in T.Parallel(C, C):
                    if i >= j:
                        b_dn[i, j] = b_dP[i, j]
                for i, j in T.Parallel(C, C):
                    if i > j:
                        b_dn[j, i] = b_dP[i, j]
                T.sync_threads()
                io.store_by_head(b_dn, dn, first, n_rows, i_h, 0, tx, C, C)
                if tx < n_rows:
                    d_beta = T.if_then_else(writes, b_dbeta[tx] + b_a[0, tx] * b_across[tx], 0.0)
                    if i_seg < n_shared:
                        if HAS_SHARED:
                            d_shared_beta[token, i_h] = d_beta
                    else:
                        dbeta_rows[i_h, T.Cast("int64", first + tx) - n_shared_rows] = d_beta

    return gdn_score_gradients


def run(call: Call, tensors: "Mapping[str, torch.Tensor]") -> None:
    problem = call.sizes.problem
    dtypes = {
        f"{name}_dtype".upper(): str(tensors[name].dtype).removeprefix("torch.") for name in ("beta", "shared_beta")
    }
    values = common.constants(
        call, BV=int(call.config["block_v"]), STAGES=int(call.config["num_stages"]),
        BLOCKS=int(call.config["blocks_per_sm"]), HAS_SHARED=problem.shared,
        WRITERS=int(problem.shared) + problem.top_k, READERS=int(problem.shared) + problem.readers, **dtypes,
    )  # fmt: skip
    names = (
        "do", "P", "Ag", "A", "k_scale", "g_cumsum", "w", "dv_new", "dp", "dn", "db", "dbeta_rows", "perm",
        "chunk_table", *(("d_shared_beta",) if problem.shared else ()),
    )  # fmt: skip
    blocks = call.sizes.chunks * problem.num_heads
    arguments = {**common.streams(tensors, "k", "beta"), **common.row_arguments(call, tensors, *names)}
    arguments |= dict(
        n_shared_rows=call.sizes.shared_rows, n_blocks=blocks, N=call.sizes.chunks, G=max(1, call.sizes.sparse_rows)
    )
    call.launch(
        common.program(__name__, "factory", values),
        (blocks,),
        arguments,
        num_warps=int(call.config["num_warps"]),
        num_stages=int(call.config["num_stages"]),
    )


TEMPLATE = Template(
    "tilelang", "gdn_score_gradients", "score_gradients", ("gdn",), SPACE, run, (__name__, common.MODULE)
)
