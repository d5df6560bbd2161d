"""GDN state gradient: the gradient of the state at each boundary, walking every segment backwards.

With dS the gradient of the state after the chunk:

    dV' = PᵀdO + diag(a e^(b_C - b)) K dS       dW = Agᵀ dV' = dV
    dS <- e^(b_C) dS + Qᵀ diag(c e^b) dO - Kᵀ diag(a e^b) dW

and <h, dS> with the state h before the chunk, of which the gates' gradient is made: here dS is at hand in fp32.
Rows of dO past the end of a chunk are 0, so those of dV' and of all sums over rows are. The state before a chunk is
loaded straight into the layout of dS, while the tensor cores are at K dS.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sse_tune.space import Constraint, Param, Space
from sse_tune.templates.buffers import STATE_PRODUCT_COLUMNS
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.tilelang import common

if TYPE_CHECKING:
    import torch


def smem_bytes(problem, config) -> int:
    return common.walk_smem_bytes(problem, config, keys=2, squares=2, values=1, operands=3)


SPACE = Space(
    params=(
        Param("block_v", (64, 128), 64, "columns of the state one block keeps"),
        Param("num_warps", (4, 8), 4, "warps per block, four to a warpgroup"),
        Param("num_stages", (1, 2, 3), 2, "chunks in shared memory"),
    ),
    constraints=(
        *common.OPERANDS,
        common.WHOLE_SEGMENTS,
        common.IO_STATES,
        *common.block_v_constraints(),
        # beyond that dS, the state beside it and the product spill
        Constraint("(3 * K / 2 + chunk_size) * block_v / (32 * num_warps) <= 192",
                   lambda p, c, d: (1.5 * p.head_dim + c["chunk_size"]) * c["block_v"] <= 192 * 32 * c["num_warps"]),
        Constraint("the tiles in flight fit in shared memory",
                   lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
    ),
)


def factory(
    H: int, K: int, V: int, C: int, L: int, DTYPE: str, THREADS: int, BV: int, STAGES: int, PARTITIONS: int,
    HAS_SHARED: bool, HAS_INITIAL: bool, HAS_FINAL: bool, CAPABILITY: int,
) -> Any:  # fmt: skip
    import tilelang.language as T
    from tilelang.layout import make_swizzled_layout

    io = common.copies(T, THREADS, L, CAPABILITY)
    mma = common.products(T, THREADS, CAPABILITY)
    NV = V // BV
    PARTS = BV // STATE_PRODUCT_COLUMNS
    by_columns, by_rows = T.GemmWarpPolicy.FullCol, T.GemmWarpPolicy.FullRow
    R, S, M, B, N = (T.dynamic(name, "int64") for name in ("R", "S", "M", "B", "N"))

    @T.macro
    def fetch(
        i, at, q, k, shared_q, shared_k, do, P, Ag, k_scale, q_scale, g_cumsum, perm, b_q, b_k, b_do, b_P, b_Ag, b_a,
        b_c, b_b, slots_k, slots_v, first_row, n_rows, is_shared, i_h, i_v, tx,
    ):  # fmt: skip
        first = first_row + i * C
        n_left = n_rows - i * C
        if is_shared:
            io.gather(shared_k, b_k, at, slots_k, i_h, 0, tx, C, K)
            io.gather(shared_q, b_q, at, slots_k, i_h, 0, tx, C, K)
        else:
            io.gather(k, b_k, at, slots_k, i_h, 0, tx, C, K)
            io.gather(q, b_q, at, slots_k, i_h, 0, tx, C, K)
        io.gather_or_zero(do, b_do, at, slots_v, i_h, i_v * BV, n_left, tx, C, BV)
        io.copy_by_head(P, b_P, at, first, n_left, i_h, 0, tx, C, C)
        io.copy_by_head(Ag, b_Ag, at, first, n_left, i_h, 0, tx, C, C)
        io.copy_scalars(k_scale, b_a, at, first, n_left, i_h, tx, C)
        io.copy_scalars(q_scale, b_c, at, first, n_left, i_h, tx, C)
        io.copy_scalars(g_cumsum, b_b, at, first, n_left, i_h, tx, C)
        if i > 0:
            io.load_slots(perm, slots_k, first - C, n_left + C, tx, C, K)
            io.load_slots(perm, slots_v, first - C, n_left + C, tx, C, BV)

    @T.prim_func
    def gdn_state_gradient(
        q: T.Tensor((R, H, K), DTYPE),
        k: T.Tensor((R, H, K), DTYPE),
        shared_q: T.Tensor((R, H, K), DTYPE),
        shared_k: T.Tensor((R, H, K), DTYPE),
        do: T.Tensor((R, H, V), DTYPE),
        P: T.Tensor((H, M, C), DTYPE),
        Ag: T.Tensor((H, M, C), DTYPE),
        k_scale: T.Tensor((H, M), "float32"),
        q_scale: T.Tensor((H, M), "float32"),
        g_cumsum: T.Tensor((H, M), "float32"),
        perm: T.Tensor((M,), "int32"),
        segment_rows: T.Tensor((S,), "int32"),
        segment_chunks: T.Tensor((S,), "int32"),
        segment_boundaries: T.Tensor((S,), "int32"),
        h: T.Tensor((B, H, K, V), DTYPE),
        initial_state: T.Tensor((S, H, K, V), "float32"),
        d_final_state: T.Tensor((S, H, K, V), "float32"),
        dh: T.Tensor((B, H, K, V), DTYPE),
        h_dh: T.Tensor((NV * PARTS, H, N, K), "float32"),
        dv_new: T.Tensor((H, M, V), DTYPE),
        dv_rows: T.Tensor((M, H, V), DTYPE),
        d_initial_state: T.Tensor((S, H, K, V), "float32"),
        n_shared: T.int32,
        n_sequences: T.int32,
        n_blocks: T.int32,
    ):
        with T.Kernel(n_blocks, threads=THREADS) as block:
            tx = T.get_thread_binding()
            i_v = block % NV
            i_h = block // NV % H
            i_seg = block // (NV * H)
            b_q = T.alloc_shared((STAGES, C, K), DTYPE)
            b_k = T.alloc_shared((STAGES, C, K), DTYPE)
            b_do = T.alloc_shared((STAGES, C, BV), DTYPE)  # then c e^b dO
            b_P = T.alloc_shared((STAGES, C, C), DTYPE)
            b_Ag = T.alloc_shared((STAGES, C, C), DTYPE)
            b_a = T.alloc_shared((STAGES, C), "float32", scope="shared")
            b_c = T.alloc_shared((STAGES, C), "float32", scope="shared")
            b_b = T.alloc_shared((STAGES, C), "float32", scope="shared")
            b_erase = T.alloc_shared((C,), "float32", scope="shared")
            b_read = T.alloc_shared((C,), "float32", scope="shared")
            b_down = T.alloc_shared((C,), "float32", scope="shared")
            b_low = T.alloc_shared((K, BV), DTYPE)
            b_new = T.alloc_shared((C, BV), DTYPE)
            b_dw = T.alloc_shared((C, BV), DTYPE)
            b_erased = T.alloc_shared((C, BV), DTYPE)
            b_ds = T.alloc_fragment((K, BV), "float32")
            b_h = T.alloc_fragment((K, BV), DTYPE)
            b_products = T.alloc_fragment((K, BV), "float32")
            b_product = T.alloc_fragment((K,), "float32")
            b_x = T.alloc_fragment((C, BV), "float32")
            b_y = T.alloc_fragment((C, BV), "float32")
            T.annotate_layout({b_dw: make_swizzled_layout(b_dw)})
            slots_k = T.alloc_local((io.passes(C, K),), "int32")
            slots_v = T.alloc_local((io.passes(C, BV),), "int32")

            first_row = segment_rows[i_seg]
            n_rows = segment_rows[i_seg + 1] - first_row
            n_chunks = T.ceildiv(n_rows, C)
            first_chunk = segment_chunks[i_seg]
            first_boundary = segment_boundaries[i_seg]
            i_state = common.state_index(T, i_seg, n_sequences, PARTITIONS, HAS_SHARED)

            if HAS_FINAL:
                for i, j in T.Parallel(K, BV):
                    b_ds[i, j] = d_final_state[i_state, i_h, i, i_v * BV + j]
            else:
                T.clear(b_ds)
            if n_chunks > 0:
                last = (n_chunks - 1) * C
                io.load_slots(perm, slots_k, first_row + last, n_rows - last, tx, C, K)
                io.load_slots(perm, slots_v, first_row + last, n_rows - last, tx, C, BV)
            for i_back in T.unroll(STAGES - 1):
                if i_back < n_chunks:
                    fetch(
                        n_chunks - 1 - i_back, i_back, q, k, shared_q, shared_k, do, P, Ag, k_scale, q_scale, g_cumsum,
                        perm, b_q, b_k, b_do, b_P, b_Ag, b_a, b_c, b_b, slots_k, slots_v, first_row, n_rows,
                        i_seg < n_shared, i_h, i_v, tx,
                    )  # fmt: skip
                T.ptx_commit_group()
            for i_back in T.serial(n_chunks):
                i = n_chunks - 1 - i_back
                # slots go by the steps: TileLang 0.1.15 takes (n - 1 - i) % 2 apart wrongly within an index
                at = i_back % STAGES
                n_left = n_rows - i * C
                if STAGES == 1:
                    T.sync_threads()
                    fetch(
                        i, at, q, k, shared_q, shared_k, do, P, Ag, k_scale, q_scale, g_cumsum, perm, b_q, b_k, b_do,
                        b_P, b_Ag, b_a, b_c, b_b, slots_k, slots_v, first_row, n_rows, i_seg < n_shared, i_h, i_v, tx,
                    )  # fmt: skip
                    T.ptx_commit_group()
                    io.arrive(0)
                else:
                    io.arrive(STAGES - 2)
                if i > 0:
                    for i_k, j in T.Parallel(K, BV):
                        b_h[i_k, j] = h[T.Cast("int64", first_boundary + i - 1), i_h, i_k, i_v * BV + j]
                elif HAS_INITIAL:
                    for i_k, j in T.Parallel(K, BV):
                        b_h[i_k, j] = initial_state[i_state, i_h, i_k, i_v * BV + j]
                else:
                    T.clear(b_h)
                if tx < C:
                    a = T.if_then_else(tx < n_left, b_a[at, tx], 0.0)
                    up = T.exp(b_b[at, tx])
                    b_erase[tx] = -a * up
                    b_read[tx] = T.if_then_else(tx < n_left, b_c[at, tx], 0.0) * up
                    b_down[tx] = a * T.exp(b_b[at, C - 1] - b_b[at, tx])
                T.copy(b_ds, b_low)
                io.fence()
                T.sync_threads()
                mma.start(b_k[at, :, :], b_low, b_x, clear_accum=True, policy=by_columns)
                mma.start(b_P[at, :, :], b_do[at, :, :], b_y, transpose_A=True, clear_accum=True, policy=by_columns)
                if STAGES > 1:
                    if i >= STAGES - 1:
                        fetch(
                            i - (STAGES - 1), (i_back + STAGES - 1) % STAGES, q, k, shared_q, shared_k, do, P, Ag,
                            k_scale, q_scale, g_cumsum, perm, b_q, b_k, b_do, b_P, b_Ag, b_a, b_c, b_b, slots_k,
                            slots_v, first_row, n_rows, i_seg < n_shared, i_h, i_v, tx,
                        )  # fmt: skip
                    T.ptx_commit_group()
                if i_back > 0:  # of the chunk behind
                    io.store_rows(b_dw, dv_rows, first_row + (i + 1) * C, n_left - C, i_h, i_v * BV, tx, C, BV)
                    io.store_state(b_low, dh, first_boundary + i, i_h, i_v * BV, tx, K, BV)
                for i_k, j in T.Parallel(K, BV):
                    b_products[i_k, j] = b_h[i_k, j] * b_ds[i_k, j]
                T.reduce_sum(b_products, b_product, dim=1)
                for i_part in T.unroll(PARTS):  # the whole of it in the first part
                    for i_k in T.Parallel(K):
                        h_dh[i_v * PARTS + i_part, i_h, T.Cast("int64", first_chunk + i), i_k] = T.if_then_else(
                            i_part == 0, b_product[i_k], 0.0
                        )
                mma.finish(0)
                mma.settle(b_x, C, BV)
                mma.settle(b_y, C, BV)
                for i_c, j in T.Parallel(C, BV):
                    b_x[i_c, j] = b_down[i_c] * b_x[i_c, j] + b_y[i_c, j]
                T.copy(b_x, b_new)
                io.fence()
                T.sync_threads()
                mma.start(b_Ag[at, :, :], b_new, b_x, transpose_A=True, clear_accum=True, policy=by_columns)
                for i_c, j in T.Parallel(C, BV):
                    b_do[at, i_c, j] = b_do[at, i_c, j] * b_read[i_c]
                io.store_by_head(b_new, dv_new, first_row + i * C, n_left, i_h, i_v * BV, tx, C, BV)
                mma.finish(0)
                mma.settle(b_x, C, BV)
                T.copy(b_x, b_dw)
                for i_c, j in T.Parallel(C, BV):
                    b_x[i_c, j] *= b_erase[i_c]
                T.copy(b_x, b_erased)
                io.fence()
                for i_k, j in T.Parallel(K, BV):
                    b_ds[i_k, j] *= T.exp(b_b[at, C - 1])
                T.sync_threads()
                mma.start(b_q[at, :, :], b_do[at, :, :], b_ds, transpose_A=True, policy=by_rows)
                mma.start(b_k[at, :, :], b_erased, b_ds, transpose_A=True, policy=by_rows)
                mma.finish(0)
                mma.settle(b_ds, K, BV)
            if n_chunks > 0:
                T.sync_threads()
                io.store_rows(b_dw, dv_rows, first_row, n_rows, i_h, i_v * BV, tx, C, BV)
            if HAS_INITIAL:
                for i, j in T.Parallel(K, BV):
                    d_initial_state[i_state, i_h, i, i_v * BV + j] = b_ds[i, j]

    return gdn_state_gradient


def run(call: Call, tensors: "Mapping[str, torch.Tensor]") -> None:
    values = common.walk_constants(
        call, HAS_INITIAL="d_initial_state" in tensors, HAS_FINAL="d_final_state" in tensors
    )
    names = (
        "do", "P", "Ag", "k_scale", "q_scale", "g_cumsum", "perm", "segment_rows", "segment_chunks",
        "segment_boundaries", "h", "dh", "h_dh", "dv_new", "dv_rows",
        *(name for name in ("initial_state", "d_initial_state", "d_final_state") if name in tensors),
    )  # fmt: skip
    arguments = {**common.streams(tensors, "q", "k"), **common.row_arguments(call, tensors, *names)}
    arguments["N"] = call.sizes.chunks
    common.launch_walk(call, common.program(__name__, "factory", values), arguments)


TEMPLATE = Template("tilelang", "gdn_state_gradient", "state_gradient", ("gdn",), SPACE, run, (__name__, common.MODULE))
