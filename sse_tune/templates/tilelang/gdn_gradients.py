"""GDN gradients: of q, k, g and the router weight, for each chunk and head on its own.

Given the states (h) before and their gradients (dh) after every chunk, and what `score_gradients` left of the scores;
the notation of `gdn_scan`, k̂ = a k, q̂ = c q, X the gradient of a scaled row, V' = Ag W taken again:

    Xq = e^b∘(dO hᵀ) + (G∘dP) K̂
    Xk = e^(b_C - b)∘(V' dhᵀ) - e^b∘(dW hᵀ) + (G∘dP)ᵀ Q̂ + (E + Eᵀ) K̂
    db += <q̂, e^b∘(dO hᵀ)> - <k̂, e^b∘(dW hᵀ)> - y,   y = <k̂, e^(b_C - b)∘(V' dhᵀ)>
    db_last += Σy + e^(b_C) <h, dh>;   dg = in-chunk reverse cumsum of db

The tiles of V come in pieces, those of dh first. With one slot for them two blocks share a multiprocessor, and one
computes while the other waits. The norm's and the gate's share comes last, in fp32.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.buffers import STATE_PRODUCT_COLUMNS
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.tilelang import common

if TYPE_CHECKING:
    import torch


def smem_bytes(problem: Problem, config: Config) -> int:
    """Rows and scores, the pieces in their slots or the scaled rows after them, twelve numbers a row, and <h, dh>."""
    c, k, bv = int(config["chunk_size"]), problem.head_dim, int(config["block_v"])
    parts = problem.value_dim // STATE_PRODUCT_COLUMNS
    pieces = int(config["num_stages"]) * (k * bv + 2 * c * bv)
    return common.item_bytes(problem) * (2 * c * k + 3 * c * c + max(pieces, c * k)) + 4 * (16 * c + parts * k) + 2048


SPACE = Space(
    params=(
        Param("block_v", (32, 64, 128), 64, "columns of V taken at a time"),
        Param("num_warps", (4, 8), 4, "warps per block, four to a warpgroup"),
        Param("num_stages", (1, 2), 1, "pieces of V in shared memory"),
    ),
    constraints=(
        *common.OPERANDS,
        common.IO_STATES,
        *common.block_v_constraints(),
        # two such sums, and as much beside them
        Constraint("chunk_size * K / (32 * num_warps) <= 64",
                   lambda p, c, d: c["chunk_size"] * p.head_dim <= 64 * 32 * c["num_warps"]),
        Constraint("the tiles fit in shared memory", lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
    ),
)


def factory(
    H: int, K: int, V: int, C: int, L: int, DTYPE: str, THREADS: int, BV: int, STAGES: int, PARTITIONS: int,
    HAS_SHARED: bool, HAS_INITIAL: bool, HAS_FINAL: bool, WRITERS: int, READERS: int, NORM: str, GATE_DTYPE: str,
    CAPABILITY: int,
) -> Any:  # fmt: skip
    import tilelang.language as T
    from tilelang.layout import make_swizzled_layout

    io = common.copies(T, THREADS, L, CAPABILITY)
    NV = V // BV
    PARTS = V // STATE_PRODUCT_COLUMNS
    by_columns = T.GemmWarpPolicy.FullCol
    R, S, M, B, N, G = (T.dynamic(name, "int64") for name in ("R", "S", "M", "B", "N", "G"))
    EPS = 1e-6

    @T.macro
    def fetch(
        t, dh, h, w, do, dv_rows, d_final_state, initial_state, b_s, b_x, b_y, slots_v, i_before, i_after, i_state,
        first, n_rows, i_h, tx,
    ):  # fmt: skip
        """Piece t: of dh and W for the first NV, then of h, dO and dW."""
        at = t % STAGES
        if t < NV:
            if i_after >= 0:
                io.copy_state(dh, b_s, at, i_after, i_h, t * BV, tx, K, BV)
            elif HAS_FINAL:
                for i_k, j in T.Parallel(K, BV):
                    b_s[at, i_k, j] = d_final_state[i_state, i_h, i_k, t * BV + j]
            else:
                for i_k, j in T.Parallel(K, BV):
                    b_s[at, i_k, j] = 0.0
            io.copy_by_head(w, b_x, at, first, n_rows, i_h, t * BV, tx, C, BV)
        else:
            if i_before >= 0:
                io.copy_state(h, b_s, at, i_before, i_h, (t - NV) * BV, tx, K, BV)
            elif HAS_INITIAL:
                for i_k, j in T.Parallel(K, BV):
                    b_s[at, i_k, j] = initial_state[i_state, i_h, i_k, (t - NV) * BV + j]
            else:
                for i_k, j in T.Parallel(K, BV):
                    b_s[at, i_k, j] = 0.0
            io.gather(do, b_x, at, slots_v, i_h, (t - NV) * BV, tx, C, BV)
            io.copy_rows(dv_rows, b_y, at, first, n_rows, i_h, (t - NV) * BV, tx, C, BV)

    @T.macro
    def row_scale_gradient(r, square, dot, weight, unit, coefficient, d_weight, in_role):
        """What the gradient of the row and of its weight take from the norm; unit is 0 for rows without the role."""
        if NORM == "none":
            coefficient[r] = 0.0
            d_weight[r] += T.if_then_else(in_role, dot, 0.0)
        elif NORM == "after":
            rho = T.rsqrt(square + EPS)
            coefficient[r] = rho * rho * dot
            d_weight[r] += T.if_then_else(in_role, rho * dot, 0.0)
        else:
            rho = T.rsqrt(weight * weight * square + EPS)
            coefficient[r] = unit * unit * dot
            d_weight[r] += T.if_then_else(in_role, dot * EPS * rho * rho * rho, 0.0)

    @T.prim_func
    def gdn_gradients(
        q: T.Tensor((R, H, K), DTYPE),
        k: T.Tensor((R, H, K), DTYPE),
        shared_q: T.Tensor((R, H, K), DTYPE),
        shared_k: T.Tensor((R, H, K), DTYPE),
        do: T.Tensor((R, H, V), DTYPE),
        Ag: T.Tensor((H, M, C), DTYPE),
        k_scale: T.Tensor((H, M), "float32"),
        q_scale: T.Tensor((H, M), "float32"),
        g_cumsum: T.Tensor((H, M), "float32"),
        h: T.Tensor((B, H, K, V), DTYPE),
        dh: T.Tensor((B, H, K, V), DTYPE),
        initial_state: T.Tensor((S, H, K, V), "float32"),
        d_final_state: T.Tensor((S, H, K, V), "float32"),
        w: T.Tensor((H, M, V), DTYPE),
        dv_rows: T.Tensor((M, H, V), DTYPE),
        dp: T.Tensor((H, M, C), DTYPE),
        dn: T.Tensor((H, M, C), DTYPE),
        db: T.Tensor((H, M), "float32"),
        h_dh: T.Tensor((PARTS, H, N, K), "float32"),
        dq_rows: T.Tensor((G, H, K), DTYPE),
        dk_rows: T.Tensor((G, H, K), DTYPE),
        dg_rows: T.Tensor((H, G), "float32"),
        de_rows: T.Tensor((H, G), "float32"),
        d_shared_q: T.Tensor((R, H, K), DTYPE),
        d_shared_k: T.Tensor((R, H, K), DTYPE),
        d_shared_g: T.Tensor((R, H), GATE_DTYPE),
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
            tx = T.get_thread_binding()
            i_h = block % H
            i_c = block // H
            b_k = T.alloc_shared((1, C, K), DTYPE)  # then its gradient
            b_q = T.alloc_shared((1, C, K), DTYPE)  # then its gradient
            b_Ag = T.alloc_shared((1, C, C), DTYPE)
            b_dP = T.alloc_shared((1, C, C), DTYPE)
            b_dN = T.alloc_shared((1, C, C), DTYPE)
            b_s = T.alloc_shared((STAGES, K, BV), DTYPE)
            b_x = T.alloc_shared((STAGES, C, BV), DTYPE)  # W, then e^(b_C - b) V'; dO
            b_y = T.alloc_shared((STAGES, C, BV), DTYPE)  # dW, then -e^b dW
            b_scaled = T.alloc_shared((C, K), DTYPE)  # K̂, then Q̂
            b_a = T.alloc_shared((1, C), "float32", scope="shared")
            b_c = T.alloc_shared((1, C), "float32", scope="shared")
            b_b = T.alloc_shared((1, C), "float32", scope="shared")
            b_db = T.alloc_shared((1, C), "float32", scope="shared")
            b_up = T.alloc_shared((C,), "float32", scope="shared")
            b_down = T.alloc_shared((C,), "float32", scope="shared")
            b_weight = T.alloc_shared((C,), "float32", scope="shared")
            b_square = T.alloc_shared((C,), "float32", scope="shared")
            b_dot = T.alloc_shared((C,), "float32", scope="shared")
            b_inner = T.alloc_shared((C,), "float32", scope="shared")
            b_end = T.alloc_shared((C,), "float32", scope="shared")
            b_unit = T.alloc_shared((C,), "float32", scope="shared")
            b_part = T.alloc_shared((C,), "float32", scope="shared")
            b_de = T.alloc_shared((C,), "float32", scope="shared")
            b_through = T.alloc_shared((PARTS, K), "float32", scope="shared")
            b_warps = T.alloc_shared((THREADS // 32,), "float32", scope="shared")
            b_eights = T.alloc_shared((C // 8,), "float32", scope="shared")
            b_xk = T.alloc_fragment((C, K), "float32")
            b_xq = T.alloc_fragment((C, K), "float32")
            b_new = T.alloc_fragment((C, BV), "float32")
            b_terms = T.alloc_fragment((C, K), "float32")
            b_sums = T.alloc_fragment((C,), "float32")
            slots_k = T.alloc_local((io.passes(C, K),), "int32")
            slots_v = T.alloc_local((io.passes(C, BV),), "int32")
            T.annotate_layout({b_k: make_swizzled_layout(b_k), b_q: make_swizzled_layout(b_q)})

            i_seg = chunk_table[i_c, 0]
            first = chunk_table[i_c, 1]
            n_rows = chunk_table[i_c, 2]
            i_before = chunk_table[i_c, 3]
            i_after = chunk_table[i_c, 4]
            if i_seg >= 0:
                i_state = common.state_index(T, i_seg, n_sequences, PARTITIONS, HAS_SHARED)
                io.load_slots(perm, slots_k, first, n_rows, tx, C, K)
                io.load_slots(perm, slots_v, first, n_rows, tx, C, BV)
                if i_seg < n_shared:
                    io.gather(shared_k, b_k, 0, slots_k, i_h, 0, tx, C, K)
                    io.gather(shared_q, b_q, 0, slots_k, i_h, 0, tx, C, K)
                else:
                    io.gather(k, b_k, 0, slots_k, i_h, 0, tx, C, K)
                    io.gather(q, b_q, 0, slots_k, i_h, 0, tx, C, K)
                io.copy_by_head(Ag, b_Ag, 0, first, n_rows, i_h, 0, tx, C, C)
                io.copy_by_head(dp, b_dP, 0, first, n_rows, i_h, 0, tx, C, C)
                io.copy_by_head(dn, b_dN, 0, first, n_rows, i_h, 0, tx, C, C)
                io.copy_scalars(k_scale, b_a, 0, first, n_rows, i_h, tx, C)
                io.copy_scalars(q_scale, b_c, 0, first, n_rows, i_h, tx, C)
                io.copy_scalars(g_cumsum, b_b, 0, first, n_rows, i_h, tx, C)
                io.copy_scalars(db, b_db, 0, first, n_rows, i_h, tx, C)
                for i_part in T.unroll(PARTS):
                    if tx < K // 4:
                        T.ptx_cp_async(
                            T.access_ptr(b_through[i_part, tx * 4], "w", 4),
                            T.access_ptr(h_dh[i_part, i_h, T.Cast("int64", i_c), tx * 4], "r", 4),
                            4,
                        )
                for t in T.unroll(STAGES):
                    fetch(
                        t, dh, h, w, do, dv_rows, d_final_state, initial_state, b_s, b_x, b_y, slots_v, i_before,
                        i_after, i_state, first, n_rows, i_h, tx,
                    )  # fmt: skip
                    T.ptx_commit_group()
                io.arrive(STAGES - 1)
                slot = T.if_then_else(tx < n_rows, perm[T.Cast("int64", first + T.min(tx, n_rows - 1))], 0)
                lane = slot - T.truncdiv(slot, L) * L
                if tx < C:
                    b_up[tx] = T.exp(b_b[0, tx])
                    b_down[tx] = T.exp(b_b[0, C - 1] - b_b[0, tx])
                    b_weight[tx] = weights[T.Cast("int64", slot)]
                    b_de[tx] = 0.0
                    if tx >= n_rows:
                        b_a[0, tx] = 0.0
                        b_c[0, tx] = 0.0
                        b_db[0, tx] = 0.0
                T.sync_threads()

                T.clear(b_xk)
                for t in T.serial(NV):
                    at = t % STAGES
                    T.gemm(b_Ag[0, :, :], b_x[at, :, :], b_new, clear_accum=True, policy=by_columns)
                    for i, j in T.Parallel(C, BV):
                        b_new[i, j] *= b_down[i]
                    T.copy(b_new, b_x[at, :, :])
                    io.fence()
                    T.gemm(b_x[at, :, :], b_s[at, :, :], b_xk, transpose_B=True, policy=by_columns)
                    T.sync_threads()
                    if t + STAGES < 2 * NV:
                        fetch(
                            t + STAGES, dh, h, w, do, dv_rows, d_final_state, initial_state, b_s, b_x, b_y, slots_v,
                            i_before, i_after, i_state, first, n_rows, i_h, tx,
                        )  # fmt: skip
                    T.ptx_commit_group()
                    if t == NV - 1:
                        for i, j in T.Parallel(C, K):
                            b_terms[i, j] = b_k[0, i, j] * b_xk[i, j]
                        T.reduce_sum(b_terms, b_sums, dim=1)
                        T.copy(b_sums, b_end)
                    io.arrive(STAGES - 1)
                T.clear(b_xq)
                for t in T.serial(NV):
                    at = (t + NV) % STAGES
                    for i, j in T.Parallel(C, BV):
                        b_y[at, i, j] = -b_up[i] * b_y[at, i, j]
                    io.fence()
                    T.gemm(b_x[at, :, :], b_s[at, :, :], b_xq, transpose_B=True, policy=by_columns)
                    T.gemm(b_y[at, :, :], b_s[at, :, :], b_xk, transpose_B=True, policy=by_columns)
                    T.sync_threads()
                    if t + STAGES < NV:
                        fetch(
                            t + NV + STAGES, dh, h, w, do, dv_rows, d_final_state, initial_state, b_s, b_x, b_y,
                            slots_v, i_before, i_after, i_state, first, n_rows, i_h, tx,
                        )  # fmt: skip
                    T.ptx_commit_group()
                    io.arrive(STAGES - 1)

                for i, j in T.Parallel(C, K):
                    b_scaled[i, j] = b_k[0, i, j] * b_a[0, i]
                io.fence()
                for i, j in T.Parallel(C, K):
                    b_terms[i, j] = b_k[0, i, j] * b_xk[i, j]
                T.reduce_sum(b_terms, b_sums, dim=1)
                T.copy(b_sums, b_inner)
                for i, j in T.Parallel(C, K):
                    b_xq[i, j] *= b_up[i]
                for i, j in T.Parallel(C, K):
                    b_terms[i, j] = b_q[0, i, j] * b_xq[i, j]
                T.reduce_sum(b_terms, b_sums, dim=1)
                T.copy(b_sums, b_dot)
                T.sync_threads()
                if tx < C:  # <k̂, Xk> holds y too, and db wants what is erased less y
                    b_end[tx] *= b_a[0, tx]
                    b_db[0, tx] += b_a[0, tx] * b_inner[tx] - 2.0 * b_end[tx] + b_c[0, tx] * b_dot[tx]
                T.gemm(b_dP[0, :, :], b_scaled, b_xq, policy=by_columns)
                T.gemm(b_dN[0, :, :], b_scaled, b_xk, policy=by_columns)
                T.sync_threads()
                for i, j in T.Parallel(C, K):
                    b_scaled[i, j] = b_q[0, i, j] * b_c[0, i]
                io.fence()

                for i, j in T.Parallel(C, K):
                    b_terms[i, j] = T.Cast("float32", b_q[0, i, j]) * b_q[0, i, j]
                T.reduce_sum(b_terms, b_sums, dim=1)
                T.copy(b_sums, b_square)
                for i, j in T.Parallel(C, K):
                    b_xq[i, j] *= scale
                for i, j in T.Parallel(C, K):
                    b_terms[i, j] = b_q[0, i, j] * b_xq[i, j]
                T.reduce_sum(b_terms, b_sums, dim=1)
                T.copy(b_sums, b_dot)
                T.sync_threads()
                if tx < C:
                    reads = (tx < n_rows) and (lane < READERS)
                    if NORM == "none":
                        b_unit[tx] = T.if_then_else(reads, b_weight[tx], 0.0)
                    elif NORM == "after":
                        b_unit[tx] = T.if_then_else(reads, b_weight[tx] * T.rsqrt(b_square[tx] + EPS), 0.0)
                    else:
                        b_unit[tx] = T.if_then_else(
                            reads, b_weight[tx] * T.rsqrt(b_weight[tx] * b_weight[tx] * b_square[tx] + EPS), 0.0
                        )
                    row_scale_gradient(
                        tx, b_square[tx], b_dot[tx], b_weight[tx], b_unit[tx], b_part, b_de, reads
                    )
                T.gemm(b_dP[0, :, :], b_scaled, b_xk, transpose_A=True, policy=by_columns)
                T.sync_threads()
                for i, j in T.Parallel(C, K):
                    b_q[0, i, j] = b_unit[i] * (b_xq[i, j] - b_part[i] * b_q[0, i, j])

                for i, j in T.Parallel(C, K):
                    b_terms[i, j] = T.Cast("float32", b_k[0, i, j]) * b_k[0, i, j]
                T.reduce_sum(b_terms, b_sums, dim=1)
                T.copy(b_sums, b_square)
                for i, j in T.Parallel(C, K):
                    b_terms[i, j] = b_k[0, i, j] * b_xk[i, j]
                T.reduce_sum(b_terms, b_sums, dim=1)
                T.copy(b_sums, b_dot)
                T.sync_threads()
                if tx < C:
                    writes = (tx < n_rows) and (lane < WRITERS)
                    row_scale_gradient(
                        tx, b_square[tx], b_dot[tx], b_weight[tx], b_a[0, tx], b_part, b_de, writes
                    )
                T.sync_threads()
                for i, j in T.Parallel(C, K):
                    b_k[0, i, j] = b_a[0, i] * (b_xk[i, j] - b_part[i] * b_k[0, i, j])
                T.sync_threads()

                if i_seg < n_shared:
                    if HAS_SHARED:
                        io.store_rows(b_q, d_shared_q, first, n_rows, i_h, 0, tx, C, K)
                        io.store_rows(b_k, d_shared_k, first, n_rows, i_h, 0, tx, C, K)
                else:
                    io.store_rows(b_q, dq_rows, first - n_shared_rows, n_rows, i_h, 0, tx, C, K)
                    io.store_rows(b_k, dk_rows, first - n_shared_rows, n_rows, i_h, 0, tx, C, K)

                # what goes through the end, warp by warp; then db by eights
                end = T.alloc_var("float32")
                end = 0.0
                for i in T.unroll(-(-K // THREADS)):
                    if i * THREADS + tx < K:
                        for i_part in T.unroll(PARTS):
                            end += b_through[i_part, i * THREADS + tx]
                end *= T.exp(b_b[0, C - 1])
                if tx < C:
                    end += b_end[tx]
                for i in T.unroll(5):
                    end += T.shfl_xor(end, 1 << i)
                if tx % 32 == 0:
                    b_warps[tx // 32] = end
                if tx < C // 8:
                    eight = T.alloc_var("float32")
                    eight = 0.0
                    for i in T.unroll(8):
                        eight += b_db[0, tx * 8 + i]
                    b_eights[tx] = eight
                T.sync_threads()
                if tx < C:
                    d_gate = T.alloc_var("float32")
                    d_gate = 0.0
                    for i in T.unroll(THREADS // 32):
                        d_gate += b_warps[i]
                    for i in T.unroll(C // 8):
                        d_gate += T.if_then_else(i > tx // 8, b_eights[i], 0.0)
                    for i in T.unroll(8):
                        d_gate += T.if_then_else(i >= tx % 8, b_db[0, tx // 8 * 8 + i], 0.0)
                    d_gate = T.if_then_else((tx < n_rows) and (lane < WRITERS), d_gate, 0.0)
                    if tx < n_rows:
                        row = T.Cast("int64", first + tx)
                        if i_seg < n_shared:
                            if HAS_SHARED:
                                d_shared_g[row, i_h] = d_gate
                        else:
                            dg_rows[i_h, row - n_shared_rows] = d_gate
                            de_rows[i_h, row - n_shared_rows] = b_de[tx]

    return gdn_gradients


def run(call: Call, tensors: "Mapping[str, torch.Tensor]") -> None:
    problem = call.sizes.problem
    gate = str(tensors["d_shared_g"].dtype).removeprefix("torch.") if problem.shared else "float32"
    values = common.constants(
        call, BV=int(call.config["block_v"]), STAGES=int(call.config["num_stages"]), PARTITIONS=problem.partitions,
        HAS_SHARED=problem.shared, HAS_INITIAL="initial_state" in tensors, HAS_FINAL="d_final_state" in tensors,
        WRITERS=int(problem.shared) + problem.top_k, READERS=int(problem.shared) + problem.readers, NORM=problem.norm,
        GATE_DTYPE=gate,
    )  # fmt: skip
    names = (
        "do", "Ag", "k_scale", "q_scale", "g_cumsum", "h", "dh", "w", "dv_rows", "dp", "dn", "db", "h_dh", "perm",
        "weights", "chunk_table", "dq_rows", "dk_rows", "dg_rows", "de_rows",
        *(f"d_shared_{name}" for name in ("q", "k", "g") if problem.shared),
        *(name for name in ("initial_state", "d_final_state") if name in tensors),
    )  # fmt: skip
    blocks = call.sizes.chunks * problem.num_heads
    arguments = {**common.streams(tensors, "q", "k"), **common.row_arguments(call, tensors, *names)}
    arguments |= dict(
        scale=call.scale, n_shared_rows=call.sizes.shared_rows, n_blocks=blocks, N=call.sizes.chunks,
        G=max(1, call.sizes.sparse_rows),
    )  # fmt: skip
    call.launch(
        common.program(__name__, "factory", values),
        (blocks,),
        arguments,
        num_warps=int(call.config["num_warps"]),
        num_stages=int(call.config["num_stages"]),
    )


TEMPLATE = Template("tilelang", "gdn_gradients", "gradients", ("gdn",), SPACE, run, (__name__, common.MODULE))
