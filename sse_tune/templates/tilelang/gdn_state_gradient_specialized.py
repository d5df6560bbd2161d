"""GDN state gradient by specialized warps: what `gdn_state_gradient` does, its copies and stores taken out of the chain
of products.

Consumers are at the products all the time (dV', dW and dS as there); producers copy the chunks ahead, and the states
before them, scale the gates and dO by them, and store dS, dV' and the dW of the chunk before. Of the sums that make
dS, dO's does not depend on the chain: it runs while dV' becomes an operand.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sse_tune.space import Constraint, Space
from sse_tune.templates.buffers import STATE_PRODUCT_COLUMNS
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.tilelang import common, specialized

if TYPE_CHECKING:
    import torch


def smem_bytes(problem, config) -> int:
    return specialized.smem_bytes(problem, config, operands=3, scaled=1, states=1)


SPACE = Space(
    params=specialized.PARAMS,
    constraints=(
        *common.OPERANDS,
        common.WHOLE_SEGMENTS,
        common.IO_STATES,
        *common.block_v_constraints(),
        specialized.REGISTERS,
        Constraint("the tiles in flight fit in shared memory",
                   lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
    ),
)


def factory(
    H: int, K: int, V: int, C: int, L: int, DTYPE: str, THREADS: int, PRODUCERS: int, BV: int, STAGES: int,
    PARTITIONS: int, HAS_SHARED: bool, HAS_INITIAL: bool, HAS_FINAL: bool, CAPABILITY: int,
) -> Any:  # fmt: skip
    import tilelang.language as T
    from tilelang.layout import make_swizzled_layout

    io = common.copies(T, PRODUCERS, L, CAPABILITY)
    rows = specialized.chunks(T, io, PRODUCERS, L, H, C, K, V, BV)
    mma = common.products(T, THREADS, CAPABILITY)
    meet = specialized.roles(T, THREADS, PRODUCERS, CAPABILITY)
    NV = V // BV
    PARTS = BV // STATE_PRODUCT_COLUMNS
    by_columns, by_rows = T.GemmWarpPolicy.FullCol, T.GemmWarpPolicy.FullRow
    R, S, M, B, N = (T.dynamic(name, "int64") for name in ("R", "S", "M", "B", "N"))

    @T.macro
    def first_state(initial_state, b_h, at, i_state, i_h, column, tx):
        for p in T.unroll(io.passes(K, BV)):
            i = p * PRODUCERS + tx
            row = i // (BV // common.VECTOR)
            o_d = i % (BV // common.VECTOR) * common.VECTOR
            for e in T.vectorized(common.VECTOR):
                if HAS_INITIAL:
                    b_h[at, row, o_d + e] = initial_state[i_state, i_h, row, column + o_d + e]
                else:
                    b_h[at, row, o_d + e] = 0.0

    @T.macro
    def fetch(
        i, at, q, k, shared_q, shared_k, do, P, Ag, k_scale, q_scale, g_cumsum, perm, h, initial_state, b_q, b_k, b_do,
        b_P, b_Ag, b_a, b_c, b_b, b_h, slots_k, slots_v, at_k, at_v, first_row, n_rows, first_boundary, i_state,
        is_shared, i_h, i_v, tx,
    ):  # fmt: skip
        first = first_row + i * C
        n_left = n_rows - i * C
        rows.fetch_keys(q, k, shared_q, shared_k, b_q, b_k, at, at_k, is_shared, tx)
        rows.gather_or_zero(do, b_do, at, at_v, n_left, tx, BV)
        rows.fetch_scores(P, Ag, k_scale, q_scale, g_cumsum, b_P, b_Ag, b_a, b_c, b_b, at, first, n_left, i_h, tx)
        if i > 0:
            io.copy_state(h, b_h, at, first_boundary + i - 1, i_h, i_v * BV, tx, K, BV)
        else:
            first_state(initial_state, b_h, at, i_state, i_h, i_v * BV, tx)
        if i > 0:
            rows.load_slots(perm, slots_k, slots_v, first - C, n_left + C, tx)

    @T.macro
    def scale_rows(b_rows, at, b_by, b_scaled, i_of_two, tx):
        """The rows that this thread copied itself."""
        for p in T.unroll(io.passes(C, BV)):
            i = p * PRODUCERS + tx
            row = i // (BV // common.VECTOR)
            o_d = i % (BV // common.VECTOR) * common.VECTOR
            for e in T.vectorized(common.VECTOR):
                b_scaled[i_of_two, row, o_d + e] = b_rows[at, row, o_d + e] * b_by[i_of_two, row]

    @T.prim_func
    def gdn_state_gradient_specialized(
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
        with T.Kernel(n_blocks, threads=THREADS + PRODUCERS) as block:
            thread = T.get_thread_binding()
            i_v = block % NV
            i_h = block // NV % H
            i_seg = block // (NV * H)
            b_q = T.alloc_shared((STAGES, C, K), DTYPE)
            b_k = T.alloc_shared((STAGES, C, K), DTYPE)
            b_do = T.alloc_shared((STAGES, C, BV), DTYPE)
            b_P = T.alloc_shared((STAGES, C, C), DTYPE)
            b_Ag = T.alloc_shared((STAGES, C, C), DTYPE)
            b_h = T.alloc_shared((STAGES, K, BV), DTYPE)
            b_a = T.alloc_shared((STAGES, C), "float32", scope="shared")
            b_c = T.alloc_shared((STAGES, C), "float32", scope="shared")
            b_b = T.alloc_shared((STAGES, C), "float32", scope="shared")
            b_erase = T.alloc_shared((2, C), "float32", scope="shared")
            b_read = T.alloc_shared((2, C), "float32", scope="shared")
            b_down = T.alloc_shared((2, C), "float32", scope="shared")
            b_scaled = T.alloc_shared((2, C, BV), DTYPE)  # c e^b dO
            b_low = T.alloc_shared((K, BV), DTYPE)
            b_new = T.alloc_shared((C, BV), DTYPE)
            b_dw = T.alloc_shared((C, BV), DTYPE)
            b_erased = T.alloc_shared((C, BV), DTYPE)
            b_ds = T.alloc_fragment((K, BV), "float32")
            b_products = T.alloc_fragment((K, BV), "float32")
            b_product = T.alloc_fragment((K,), "float32")
            b_x = T.alloc_fragment((C, BV), "float32")
            b_y = T.alloc_fragment((C, BV), "float32")
            b_dw_low = T.alloc_fragment((C, BV), DTYPE)
            T.annotate_layout({b_dw: make_swizzled_layout(b_dw), b_h: make_swizzled_layout(b_h)})
            slots_k = T.alloc_local((io.passes(C, K),), "int32")
            slots_v = T.alloc_local((io.passes(C, BV),), "int32")
            at_k = T.alloc_local((io.passes(C, K),), "int64")
            at_v = T.alloc_local((io.passes(C, BV),), "int64")

            first_row = segment_rows[i_seg]
            n_rows = segment_rows[i_seg + 1] - first_row
            n_chunks = T.ceildiv(n_rows, C)
            first_chunk = segment_chunks[i_seg]
            first_boundary = segment_boundaries[i_seg]
            i_state = common.state_index(T, i_seg, n_sequences, PARTITIONS, HAS_SHARED)

            if thread < THREADS:
                meet.consume()
                if HAS_FINAL:
                    for i, j in T.Parallel(K, BV):
                        b_ds[i, j] = d_final_state[i_state, i_h, i, i_v * BV + j]
                else:
                    T.clear(b_ds)
                T.clear(b_dw_low)
                for i_back in T.serial(n_chunks):
                    i = n_chunks - 1 - i_back
                    # slots go by the steps: TileLang 0.1.15 takes (n - 1 - i) % 2 apart wrongly within an index
                    at = i_back % STAGES
                    meet.wait(specialized.READY, meet.all)
                    T.copy(b_ds, b_low)
                    io.fence()
                    meet.arrive(specialized.STATE)
                    meet.wait(specialized.OWN, THREADS)
                    mma.start(b_k[at, :, :], b_low, b_y, clear_accum=True, policy=by_columns)
                    mma.start(b_P[at, :, :], b_do[at, :, :], b_x, transpose_A=True, clear_accum=True, policy=by_columns)
                    for i_k, j in T.Parallel(K, BV):
                        b_products[i_k, j] = b_h[at, i_k, j] * b_ds[i_k, j]
                    T.reduce_sum(b_products, b_product, dim=1)
                    mma.finish(0)
                    mma.settle(b_x, C, BV)
                    mma.settle(b_y, C, BV)
                    for i_k, j in T.Parallel(K, BV):
                        b_ds[i_k, j] *= T.exp(b_b[at, C - 1])
                    mma.start(b_q[at, :, :], b_scaled[i_back % 2, :, :], b_ds, transpose_A=True, policy=by_rows)
                    for i_c, j in T.Parallel(C, BV):
                        b_x[i_c, j] += b_down[i_back % 2, i_c] * b_y[i_c, j]
                    T.copy(b_x, b_new)
                    T.copy(b_dw_low, b_dw)  # of the chunk behind; nobody stores that of the last
                    io.fence()
                    meet.arrive(specialized.VALUES)
                    meet.wait(specialized.OWN, THREADS)
                    mma.start(b_Ag[at, :, :], b_new, b_x, transpose_A=True, clear_accum=True, policy=by_columns)
                    for i_part in T.unroll(PARTS):  # the whole of it in the first part
                        for i_k in T.Parallel(K):
                            h_dh[i_v * PARTS + i_part, i_h, T.Cast("int64", first_chunk + i), i_k] = T.if_then_else(
                                i_part == 0, b_product[i_k], 0.0
                            )
                    mma.finish(0)
                    mma.settle(b_x, C, BV)
                    mma.settle(b_ds, K, BV)
                    for i_c, j in T.Parallel(C, BV):
                        b_y[i_c, j] = b_x[i_c, j] * b_erase[i_back % 2, i_c]
                    T.copy(b_y, b_erased)
                    io.fence()
                    meet.wait(specialized.OWN, THREADS)
                    mma.start(b_k[at, :, :], b_erased, b_ds, transpose_A=True, policy=by_rows)
                    T.copy(b_x, b_dw_low)
                    mma.finish(0)
                    mma.settle(b_ds, K, BV)
                meet.wait(specialized.READY, meet.all)
                T.copy(b_dw_low, b_dw)
                meet.wait(specialized.LAST, meet.all)
                if HAS_INITIAL:
                    for i, j in T.Parallel(K, BV):
                        d_initial_state[i_state, i_h, i, i_v * BV + j] = b_ds[i, j]
            else:
                tx = thread - THREADS
                meet.produce()
                if n_chunks > 0:
                    last = (n_chunks - 1) * C
                    rows.load_slots(perm, slots_k, slots_v, first_row + last, n_rows - last, tx)
                for i_back in T.unroll(STAGES - 1):
                    if i_back < n_chunks:
                        rows.locate(slots_k, slots_v, at_k, at_v, i_h, i_v, tx)
                        fetch(
                            n_chunks - 1 - i_back, i_back, q, k, shared_q, shared_k, do, P, Ag, k_scale, q_scale,
                            g_cumsum, perm, h, initial_state, b_q, b_k, b_do, b_P, b_Ag, b_a, b_c, b_b, b_h, slots_k,
                            slots_v, at_k, at_v, first_row, n_rows, first_boundary, i_state, i_seg < n_shared, i_h, i_v,
                            tx,
                        )  # fmt: skip
                    T.ptx_commit_group()
                for i_back in T.serial(n_chunks):
                    i = n_chunks - 1 - i_back
                    at = i_back % STAGES
                    n_left = n_rows - i * C
                    T.ptx_wait_group(STAGES - 2)
                    meet.wait(specialized.COPIED, PRODUCERS)
                    if tx < C:
                        a = T.if_then_else(tx < n_left, b_a[at, tx], 0.0)
                        up = T.exp(b_b[at, tx])
                        b_erase[i_back % 2, tx] = -a * up
                        b_read[i_back % 2, tx] = T.if_then_else(tx < n_left, b_c[at, tx], 0.0) * up
                        b_down[i_back % 2, tx] = a * T.exp(b_b[at, C - 1] - b_b[at, tx])
                    meet.wait(specialized.COPIED, PRODUCERS)
                    scale_rows(b_do, at, b_read, b_scaled, i_back % 2, tx)
                    io.fence()
                    meet.arrive(specialized.READY)
                    rows.locate(slots_k, slots_v, at_k, at_v, i_h, i_v, tx)
                    meet.wait(specialized.STATE, meet.all)
                    if i >= STAGES - 1:
                        fetch(
                            i - (STAGES - 1), (i_back + STAGES - 1) % STAGES, q, k, shared_q, shared_k, do, P, Ag,
                            k_scale, q_scale, g_cumsum, perm, h, initial_state, b_q, b_k, b_do, b_P, b_Ag, b_a, b_c,
                            b_b, b_h, slots_k, slots_v, at_k, at_v, first_row, n_rows, first_boundary, i_state,
                            i_seg < n_shared, i_h, i_v, tx,
                        )  # fmt: skip
                    T.ptx_commit_group()
                    if i_back > 0:
                        io.store_state(b_low, dh, first_boundary + i, i_h, i_v * BV, tx, K, BV)
                    meet.wait(specialized.VALUES, meet.all)
                    if i_back > 0:  # of the chunk behind
                        io.store_rows(b_dw, dv_rows, first_row + (i + 1) * C, n_left - C, i_h, i_v * BV, tx, C, BV)
                    io.store_by_head(b_new, dv_new, first_row + i * C, n_left, i_h, i_v * BV, tx, C, BV)
                meet.arrive(specialized.READY)
                meet.wait(specialized.LAST, meet.all)
                if n_chunks > 0:
                    io.store_rows(b_dw, dv_rows, first_row, n_rows, i_h, i_v * BV, tx, C, BV)

    return gdn_state_gradient_specialized


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
    specialized.launch(call, __name__, values, arguments)


TEMPLATE = Template(
    "tilelang", "gdn_state_gradient_specialized", "state_gradient", ("gdn",), SPACE, run,
    (__name__, common.MODULE, specialized.MODULE),
)  # fmt: skip
