"""GLA gradients: of q, k, gates and router weight, for each chunk and head on its own, K in slices.

The formulas and the two kinds of gates are those of Triton's `gla_gradients_sliced`. With b the sum of a chunk's
log-gates, r its value in the middle row, E = e^(b - r), Zq = E q̂, Zk = k̂ / E, and in a chunk of C rows

    dA = tril(dO Vᵀ)     Yq = e^r (dO hᵀ) + dA Zk     Yk = e^(b_C - r) (V dhᵀ) + dAᵀ Zq
    Xq = E Yq            Xk = Yk / E                  db = Zq Yq - Zk Yk
    dg_i = Σ_(t >= i) db_t + Σ_j Zk e^(b_C - r) (V dhᵀ) + e^(b_C) <h, dh>

A block keeps dO, V and dA and goes along the slices of K; h and dh of the next slice are copied while this one is
finished. Sums along the rows of a chunk are taken by columns: THREADS / BK threads have a part of one each, in fp32.

Slices whose gates are not near are flagged and left to Triton's kernel for them, a second launch; sums over all of K,
which the norm and the router's gradient need, are finished by a third where there is more than one slice.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.registry import Call, Template, find_template
from sse_tune.templates.tilelang import common, gla_tiles

if TYPE_CHECKING:
    import torch

BK = 64  # columns of K in a slice: the width of the swizzle
PAD = 8  # numbers between the rows of a tile that is gone through by columns
NEAR_NATS = 40.0  # as in gla_gates: e^80, the largest product, times any operands is a finite fp32

# the modules of the template whose other launches follow
OTHERS = tuple(
    f"sse_tune.templates.triton.{name}"
    for name in ("gla_gradients_sliced", "common", "gla_gates", "gla_gradients_far", "gla_slices")
)


def smem_bytes(problem: Problem, config: Config) -> int:
    """dO and V; slices of h, dh, q and k; the gates, then E and db; dA, and halves of it and of Z where one operand of
    bf16 does not hold them; numbers by row and by column."""
    c, v = int(config["chunk_size"]), problem.value_dim
    tiles = common.item_bytes(problem) * (2 * c * v + 2 * BK * v + 2 * c * BK) + 4 * c * (BK + PAD)
    operands = 2 * c * c if problem.dtype == "bf16" else 2 * (2 * c * c + 4 * c * BK)
    by_row = 14 * c if problem.key_dim == BK else 8 * c  # one slice finishes the norm's share
    return tiles + operands + 4 * (by_row + 11 * BK) + 1024


SPACE = Space(
    params=(
        Param("num_warps", (4, 8), 8, "warps per block, four to a warpgroup"),
        Param("blocks_per_sm", (1, 2), 2, "blocks that registers are kept for"),
    ),
    constraints=(
        *common.OPERANDS,
        common.IO_STATES,
        Constraint("V must be a multiple of 64", lambda p, c, d: p.value_dim % 64 == 0),
        # Yq and Yk are held at once, with the rows of q and k beside them
        Constraint("chunk_size must be 64", lambda p, c, d: c["chunk_size"] == 64),
        # a multiprocessor has a KiB more than a block can ask for, and each block takes one beside what it asks for
        Constraint("the blocks of a multiprocessor have shared memory for their tiles",
                   lambda p, c, d: c["blocks_per_sm"] * (smem_bytes(p, c) + 1024) <= d.smem_per_block_bytes + 1024),
    ),
)


def factory(
    H: int, K: int, V: int, C: int, L: int, DTYPE: str, THREADS: int, BLOCKS: int, PARTITIONS: int, HAS_SHARED: bool,
    HAS_INITIAL: bool, HAS_FINAL: bool, WRITERS: int, READERS: int, NORM: str, G_DTYPE: str, SHARED_G_DTYPE: str,
    DG_ROWS_DTYPE: str, CAPABILITY: int,
) -> Any:  # fmt: skip
    import tilelang.language as T
    from tilelang.layout import make_swizzled_layout

    io = common.copies(T, THREADS, L, CAPABILITY)
    mma = common.products(T, THREADS, CAPABILITY)
    tiles = gla_tiles.copies(T, io, THREADS, C, BK, V)
    columns = gla_tiles.columns(T, THREADS, C, BK)
    by_rows = T.GemmWarpPolicy.FullRow
    SIDES = THREADS // 128  # warps beside each other along the columns of a product
    NK = K // BK
    PARTS = THREADS // BK
    ROWS = C // PARTS  # of a part of a column
    IS_EXACT = DTYPE == "bfloat16"  # Z and dA are one operand of bf16 each
    GATES = G_DTYPE if G_DTYPE == SHARED_G_DTYPE else "float32"  # as they lie in shared memory
    terms = gla_tiles.terms(T, C, BK, SIDES, IS_EXACT, NORM)
    R, S, M, B, N, G = (T.dynamic(name, "int64") for name in ("R", "S", "M", "B", "N", "G"))

    @T.prim_func
    def gla_gradients(
        q: T.Tensor((R, H, K), DTYPE),
        k: T.Tensor((R, H, K), DTYPE),
        v: T.Tensor((R, H, V), DTYPE),
        g: T.Tensor((R, H, K), G_DTYPE),
        shared_q: T.Tensor((R, H, K), DTYPE),
        shared_k: T.Tensor((R, H, K), DTYPE),
        shared_g: T.Tensor((R, H, K), SHARED_G_DTYPE),
        do: T.Tensor((R, H, V), DTYPE),
        k_scale: T.Tensor((H, M), "float32"),
        q_scale: T.Tensor((H, M), "float32"),
        h: T.Tensor((B, H, K, V), DTYPE),
        dh: T.Tensor((B, H, K, V), DTYPE),
        initial_state: T.Tensor((S, H, K, V), "float32"),
        d_final_state: T.Tensor((S, H, K, V), "float32"),
        dq_rows: T.Tensor((G, H, K), DTYPE),
        dk_rows: T.Tensor((G, H, K), DTYPE),
        dg_rows: T.Tensor((G, H, K), DG_ROWS_DTYPE),
        de_rows: T.Tensor((H, G), "float32"),
        d_shared_q: T.Tensor((R, H, K), DTYPE),
        d_shared_k: T.Tensor((R, H, K), DTYPE),
        d_shared_g: T.Tensor((R, H, K), SHARED_G_DTYPE),
        far: T.Tensor((N * H * NK,), "int32"),
        sums: T.Tensor((2, NK, H, M), "float32"),
        perm: T.Tensor((M,), "int32"),
        weights: T.Tensor((R * L,), "float32"),
        chunk_table: T.Tensor((N, 5), "int32"),
        scale: T.float32,
        n_shared: T.int32,
        n_shared_rows: T.int32,
        n_sequences: T.int32,
        n_blocks: T.int32,
    ):
        with T.Kernel(n_blocks, threads=THREADS) as block:
            T.annotate_min_blocks_per_sm(BLOCKS)
            tx = T.get_thread_binding()
            i_h = block % H
            i_c = block // H
            b_do = T.alloc_shared((C, V), DTYPE)
            b_v = T.alloc_shared((C, V), DTYPE)
            b_h = T.alloc_shared((BK, V), DTYPE)
            b_dh = T.alloc_shared((BK, V), DTYPE)
            b_q = T.alloc_shared((C, BK), DTYPE)  # then Zq where that is of this dtype; then the gradient
            b_k = T.alloc_shared((C, BK), DTYPE)  # the same
            b_x = T.alloc_shared((C, BK + PAD), "float32")  # E, then db
            # log-gates, in the same place: every thread has taken its own before there is an E
            b_gates = b_x if GATES == "float32" else T.view(b_x, (C, 2 * (BK + PAD)), dtype=GATES)
            b_dA = T.alloc_shared((C, C), "bfloat16")
            b_total = T.alloc_shared((PARTS, BK), "float32", scope="shared")
            b_state = T.alloc_shared((4, BK), "float32", scope="shared")
            b_first = T.alloc_shared((BK,), "float32", scope="shared")
            b_second = T.alloc_shared((BK,), "float32", scope="shared")
            b_through = T.alloc_shared((BK,), "float32", scope="shared")
            b_token = T.alloc_shared((C,), "int32", scope="shared")
            b_writes = T.alloc_shared((C,), "float32", scope="shared")
            b_a = T.alloc_shared((C,), "float32", scope="shared")
            b_c = T.alloc_shared((C,), "float32", scope="shared")
            b_qx = T.alloc_shared((C, SIDES), "float32", scope="shared")
            b_kx = T.alloc_shared((C, SIDES), "float32", scope="shared")
            b_qq = T.alloc_shared((C, SIDES), "float32", scope="shared")
            b_kk = T.alloc_shared((C, SIDES), "float32", scope="shared")
            b_q_part = T.alloc_shared((C,), "float32", scope="shared")
            b_k_part = T.alloc_shared((C,), "float32", scope="shared")
            b_yq = T.alloc_fragment((C, BK), "float32")
            b_yk = T.alloc_fragment((C, BK), "float32")
            b_scores = T.alloc_fragment((C, C), "float32")
            b_e = T.alloc_fragment((C, BK), "float32")
            b_z = T.alloc_fragment((C, BK), "bfloat16" if IS_EXACT else "float32")
            b_hdh = T.alloc_fragment((BK, BK), "float32")
            b_terms = T.alloc_fragment((C, BK), "float32")
            b_quarters = T.alloc_fragment((4, BK), "float32")
            b_sums = T.alloc_fragment((C, SIDES), "float32")
            own = T.alloc_local((ROWS,), "float32")
            run = T.alloc_local((1,), "float32")
            is_far = T.alloc_var("int32")
            if IS_EXACT:
                b_q_rows = T.alloc_fragment((C, BK), DTYPE)
                b_k_rows = T.alloc_fragment((C, BK), DTYPE)
                b_zq, b_zk, b_zq_low, b_zk_low = b_q, b_k, None, None
            else:
                b_q_rows, b_k_rows = b_q, b_k
                b_zq = T.alloc_shared((C, BK), "bfloat16")
                b_zk = T.alloc_shared((C, BK), "bfloat16")
                b_zq_low = T.alloc_shared((C, BK), "bfloat16")
                b_zk_low = T.alloc_shared((C, BK), "bfloat16")
                b_dA_low = T.alloc_shared((C, C), "bfloat16")
                T.annotate_layout({b_q: make_swizzled_layout(b_q), b_k: make_swizzled_layout(b_k)})

            i_seg = chunk_table[i_c, 0]
            first = chunk_table[i_c, 1]
            n_rows = chunk_table[i_c, 2]
            i_before = chunk_table[i_c, 3]
            i_after = chunk_table[i_c, 4]
            if i_seg >= 0:
                i_state = common.state_index(T, i_seg, n_sequences, PARTITIONS, HAS_SHARED)
                slot = perm[T.Cast("int64", first + T.min(tx, n_rows - 1))]
                lane = slot - T.truncdiv(slot, L) * L
                if tx < C:
                    row = T.Cast("int64", first + T.min(tx, n_rows - 1))
                    b_token[tx] = T.truncdiv(slot, L)
                    b_writes[tx] = T.if_then_else((tx < n_rows) and (lane < WRITERS), 1.0, 0.0)
                    b_a[tx] = T.if_then_else(tx < n_rows, k_scale[i_h, row], 0.0)
                    b_c[tx] = T.if_then_else(tx < n_rows, q_scale[i_h, row], 0.0)
                T.sync_threads()
                tiles.fetch_rows(do, b_do, b_token, i_h, 0, tx, V)
                tiles.fetch_rows(v, b_v, b_token, i_h, 0, tx, V)
                T.ptx_commit_group()
                if i_seg < n_shared:
                    tiles.fetch_slice(shared_q, shared_k, shared_g, b_q, b_k, b_gates, b_token, b_writes, i_h, 0, tx)
                else:
                    tiles.fetch_slice(q, k, g, b_q, b_k, b_gates, b_token, b_writes, i_h, 0, tx)
                T.ptx_commit_group()
                tiles.fetch_state(h, initial_state, HAS_INITIAL, b_h, i_before, i_state, i_h, 0, tx)
                tiles.fetch_state(dh, d_final_state, HAS_FINAL, b_dh, i_after, i_state, i_h, 0, tx)
                T.ptx_commit_group()

                io.arrive(2)
                T.gemm(b_do, b_v, b_scores, transpose_B=True, clear_accum=True, policy=by_rows)
                for i, j in T.Parallel(C, C):
                    b_scores[i, j] = T.if_then_else(i >= j, b_scores[i, j], 0.0)
                T.copy(b_scores, b_dA)
                if not IS_EXACT:
                    terms.second_half(b_scores, b_dA_low, C)
                io.fence()
                io.arrive(1)

                for s in T.serial(NK):
                    columns.take(b_gates, own, b_total, tx)
                    T.sync_threads()
                    columns.decays(b_x, own, b_total, run, tx)
                    is_far = T.if_then_else(run[0] >= -NEAR_NATS, 0, 1)
                    if tx < BK:
                        b_first[tx] = T.exp(columns.half(b_total, 0, tx))
                        b_second[tx] = T.exp(columns.half(b_total, 1, tx))
                    T.ptx_wait_group(0)  # h and dh
                    io.fence()
                    is_far = T.syncthreads_or(is_far)
                    if tx == 0:
                        far[T.Cast("int64", block) * NK + s] = is_far

                    mma.start(b_h, b_dh, b_hdh, transpose_B=True, clear_accum=True, policy=by_rows)
                    for i, j in T.Parallel(C, BK):
                        b_e[i, j] = b_x[i, j]
                    if IS_EXACT:
                        for i, j in T.Parallel(C, BK):
                            b_q_rows[i, j] = b_q[i, j]
                        for i, j in T.Parallel(C, BK):
                            b_k_rows[i, j] = b_k[i, j]
                    for i, j in T.Parallel(C, BK):
                        b_yq[i, j] = b_e[i, j] * (b_q_rows[i, j] * b_c[i])
                    for i, j in T.Parallel(C, BK):
                        b_yk[i, j] = T.fast_rcp(b_e[i, j]) * (b_k_rows[i, j] * b_a[i])
                    T.copy(b_yq, b_zq)
                    T.copy(b_yk, b_zk)
                    if not IS_EXACT:
                        terms.second_half(b_yq, b_zq_low, BK)
                        terms.second_half(b_yk, b_zk_low, BK)
                    io.fence()
                    mma.start(b_do, b_h, b_yq, transpose_B=True, clear_accum=True, policy=by_rows)
                    mma.start(b_v, b_dh, b_yk, transpose_B=True, clear_accum=True, policy=by_rows)
                    mma.finish(0)
                    mma.settle(b_hdh, BK, BK)
                    mma.settle(b_yq, C, BK)
                    mma.settle(b_yk, C, BK)
                    for i, j in T.Parallel(BK, BK):
                        if i == j:
                            b_through[i] = b_hdh[i, j]
                    T.sync_threads()
                    if s + 1 < NK:
                        tiles.fetch_state(h, initial_state, HAS_INITIAL, b_h, i_before, i_state, i_h, s + 1, tx)
                        tiles.fetch_state(dh, d_final_state, HAS_FINAL, b_dh, i_after, i_state, i_h, s + 1, tx)
                    T.ptx_commit_group()
                    terms.scale_columns(b_yq, b_first, b_terms)
                    terms.scale_columns(b_yk, b_second, b_terms)
                    terms.take_z(b_zk, b_zk_low, b_z)
                    for i, j in T.Parallel(C, BK):
                        b_terms[i, j] = b_z[i, j] * b_yk[i, j]
                    T.reduce_sum(T.reshape(b_terms, (4, C // 4, BK)), b_quarters, dim=1)
                    T.copy(b_quarters, b_state)
                    mma.start(b_dA, b_zk, b_yq, policy=by_rows)
                    mma.start(b_dA, b_zq, b_yk, transpose_A=True, policy=by_rows)
                    if not IS_EXACT:
                        mma.start(b_dA, b_zk_low, b_yq, policy=by_rows)
                        mma.start(b_dA_low, b_zk, b_yq, policy=by_rows)
                        mma.start(b_dA, b_zq_low, b_yk, transpose_A=True, policy=by_rows)
                        mma.start(b_dA_low, b_zq, b_yk, transpose_A=True, policy=by_rows)
                    mma.finish(0)
                    mma.settle(b_yq, C, BK)
                    mma.settle(b_yk, C, BK)
                    for i, j in T.Parallel(C, BK):
                        b_terms[i, j] = b_z[i, j] * b_yk[i, j]
                    terms.take_z(b_zq, b_zq_low, b_z)
                    for i, j in T.Parallel(C, BK):
                        b_terms[i, j] = b_z[i, j] * b_yq[i, j] - b_terms[i, j]
                    for i, j in T.Parallel(C, BK):
                        b_x[i, j] = b_terms[i, j]
                    T.sync_threads()
                    for i, j in T.Parallel(C, BK):
                        b_yq[i, j] *= b_e[i, j]
                    for i, j in T.Parallel(C, BK):
                        b_yk[i, j] *= T.fast_rcp(b_e[i, j])
                    for i, j in T.Parallel(C, BK):
                        b_terms[i, j] = b_yq[i, j] * b_q_rows[i, j]
                    terms.row_sums(b_terms, b_sums, b_qx)
                    for i, j in T.Parallel(C, BK):
                        b_terms[i, j] = b_yk[i, j] * b_k_rows[i, j]
                    terms.row_sums(b_terms, b_sums, b_kx)
                    if NK == 1:
                        if NORM != "none":
                            for i, j in T.Parallel(C, BK):
                                b_terms[i, j] = T.Cast("float32", b_q_rows[i, j]) * b_q_rows[i, j]
                            terms.row_sums(b_terms, b_sums, b_qq)
                            for i, j in T.Parallel(C, BK):
                                b_terms[i, j] = T.Cast("float32", b_k_rows[i, j]) * b_k_rows[i, j]
                            terms.row_sums(b_terms, b_sums, b_kk)
                        T.sync_threads()
                        if tx < n_rows:
                            weight = weights[T.Cast("int64", slot)]
                            b_q_part[tx] = terms.norm_part(b_qx, b_qq, tx, weight)
                            b_k_part[tx] = terms.norm_part(b_kx, b_kk, tx, weight)
                            if i_seg >= n_shared:
                                by_q = scale * terms.weight_gradient(b_qx, b_qq, tx, weight)
                                by_k = terms.weight_gradient(b_kx, b_kk, tx, weight)
                                de_rows[i_h, T.Cast("int64", first + tx) - n_shared_rows] = T.if_then_else(
                                    lane < READERS, by_q, 0.0
                                ) + T.if_then_else(lane < WRITERS, by_k, 0.0)
                        T.sync_threads()
                        if NORM != "none":
                            for i, j in T.Parallel(C, BK):
                                b_yq[i, j] -= b_q_part[i] * b_q_rows[i, j]
                            for i, j in T.Parallel(C, BK):
                                b_yk[i, j] -= b_k_part[i] * b_k_rows[i, j]
                    for i, j in T.Parallel(C, BK):
                        b_q[i, j] = b_c[i] * b_yq[i, j]
                    for i, j in T.Parallel(C, BK):
                        b_k[i, j] = b_a[i] * b_yk[i, j]
                    T.sync_threads()

                    if i_seg < n_shared:
                        if HAS_SHARED:
                            io.store_rows(b_q, d_shared_q, first, n_rows, i_h, s * BK, tx, C, BK)
                            io.store_rows(b_k, d_shared_k, first, n_rows, i_h, s * BK, tx, C, BK)
                    else:
                        io.store_rows(b_q, dq_rows, first - n_shared_rows, n_rows, i_h, s * BK, tx, C, BK)
                        io.store_rows(b_k, dk_rows, first - n_shared_rows, n_rows, i_h, s * BK, tx, C, BK)
                    columns.take(b_x, own, b_total, tx)
                    if NK > 1:
                        if tx < n_rows:
                            sums[0, s, i_h, T.Cast("int64", first + tx)] = terms.in_all(b_qx, tx)
                            sums[1, s, i_h, T.Cast("int64", first + tx)] = terms.in_all(b_kx, tx)
                    T.sync_threads()
                    run[0] = b_through[tx % BK] * b_first[tx % BK] * b_second[tx % BK]
                    for p in T.unroll(4):
                        run[0] += b_state[p, tx % BK]
                    columns.sums_from(own, b_total, run, b_writes, WRITERS < L, tx)
                    if i_seg < n_shared:
                        if HAS_SHARED:
                            tiles.store_gates(d_shared_g, own, first, n_rows, i_h, s * BK, tx)
                    else:
                        tiles.store_gates(dg_rows, own, first - n_shared_rows, n_rows, i_h, s * BK, tx)
                    T.sync_threads()
                    if s + 1 < NK:
                        if i_seg < n_shared:
                            tiles.fetch_slice(
                                shared_q, shared_k, shared_g, b_q, b_k, b_gates, b_token, b_writes, i_h, s + 1, tx
                            )
                        else:
                            tiles.fetch_slice(q, k, g, b_q, b_k, b_gates, b_token, b_writes, i_h, s + 1, tx)
                    T.ptx_commit_group()
                    io.arrive(0)

    return gla_gradients


def run(call: Call, tensors: "Mapping[str, torch.Tensor]") -> None:
    """The launches of Triton's template, with this kernel in the place of the first, that for near gates."""
    launched = 0

    def launch(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], *, num_warps: int, num_stages: int) -> None:
        nonlocal launched
        launched += 1
        if launched == 1:
            launch_near(call, tensors, args["far"], args["sums"])
        else:
            call.launch(kernel, grid, args, num_warps=num_warps, num_stages=num_stages)

    config = Config({**call.config, "block_k": BK, "block_v": BK, "num_stages": 1})
    others = find_template("triton", "gla_gradients_sliced")
    others.run(dataclasses.replace(call, config=config, launch=launch), tensors)


def launch_near(call: Call, tensors: "Mapping[str, torch.Tensor]", far: "torch.Tensor", sums: "torch.Tensor") -> None:
    problem, sizes = call.sizes.problem, call.sizes
    dtypes = {
        f"{name}_dtype".upper(): str(tensors[name].dtype).removeprefix("torch.")
        for name in ("g", "shared_g", "dg_rows")
    }
    values = common.constants(
        call, BLOCKS=int(call.config["blocks_per_sm"]), PARTITIONS=problem.partitions, HAS_SHARED=problem.shared,
        HAS_INITIAL="initial_state" in tensors, HAS_FINAL="d_final_state" in tensors,
        WRITERS=int(problem.shared) + problem.top_k, READERS=int(problem.shared) + problem.readers, NORM=problem.norm,
        **dtypes,
    )  # fmt: skip
    names = (
        "v", "do", "k_scale", "q_scale", "h", "dh", "perm", "weights", "chunk_table", "dq_rows", "dk_rows", "dg_rows",
        "de_rows", *(f"d_shared_{name}" for name in ("q", "k", "g") if problem.shared),
        *(name for name in ("initial_state", "d_final_state") if name in tensors),
    )  # fmt: skip
    blocks = sizes.chunks * problem.num_heads
    arguments = {**common.streams(tensors, "q", "k", "g"), **common.row_arguments(call, tensors, *names)}
    arguments |= dict(
        far=far, sums=sums, scale=call.scale, n_shared_rows=sizes.shared_rows, n_blocks=blocks, N=sizes.chunks,
        G=max(1, sizes.sparse_rows),
    )  # fmt: skip
    near = common.program(__name__, "factory", values)
    near = dataclasses.replace(near, sources=(*near.sources, gla_tiles.MODULE))
    call.launch(near, (blocks,), arguments, num_warps=int(call.config["num_warps"]), num_stages=1)


TEMPLATE = Template(
    "tilelang", "gla_gradients", "gradients", ("gla",), SPACE, run,
    (__name__, common.MODULE, gla_tiles.MODULE, *OTHERS),
)  # fmt: skip
