"""GDN scan by specialized warps: what `gdn_scan` does, its copies and stores taken out of the chain of products.

Consumers are at the products all the time (W, V', O and S as there); producers copy the chunks ahead, raise the gates,
and store O of the chunk before, and S and W where the plan keeps its states. O of a chunk is finished while the next
state becomes an operand, and put into shared memory during the next product with it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sse_tune.space import Constraint, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.stages import scan_keeps_states
from sse_tune.templates.tilelang import common, specialized

if TYPE_CHECKING:
    import torch


def smem_bytes(problem, config) -> int:
    return specialized.smem_bytes(problem, config, operands=4)


SPACE = Space(
    params=specialized.PARAMS,
    constraints=(
        *common.OPERANDS,
        common.WHOLE_SEGMENTS,
        # what is stored from a tile is not converted
        Constraint("states that the scan keeps must be of the problem's dtype",
                   lambda p, c, d: c["state_dtype"] == "io" or not scan_keeps_states(p, c)),
        *common.block_v_constraints(),
        specialized.REGISTERS,
        Constraint("the tiles in flight fit in shared memory",
                   lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
    ),
)


def factory(
    H: int, K: int, V: int, C: int, L: int, DTYPE: str, THREADS: int, PRODUCERS: int, BV: int, STAGES: int,
    PARTITIONS: int, HAS_SHARED: bool, HAS_INITIAL: bool, HAS_FINAL: bool, KEEPS: bool, CAPABILITY: int,
) -> Any:  # fmt: skip
    import tilelang.language as T
    from tilelang.layout import make_swizzled_layout

    io = common.copies(T, PRODUCERS, L, CAPABILITY)
    rows = specialized.chunks(T, io, PRODUCERS, L, H, C, K, V, BV)
    mma = common.products(T, THREADS, CAPABILITY)
    meet = specialized.roles(T, THREADS, PRODUCERS, CAPABILITY)
    NV = V // BV
    by_columns, by_rows = T.GemmWarpPolicy.FullCol, T.GemmWarpPolicy.FullRow
    R, S, M, B = (T.dynamic(name, "int64") for name in ("R", "S", "M", "B"))

    @T.macro
    def fetch(
        i, q, k, v, shared_q, shared_k, P, Ag, k_scale, q_scale, g_cumsum, perm, b_q, b_k, b_v, b_P, b_Ag, b_a, b_c,
        b_b, slots_k, slots_v, at_k, at_v, first_row, n_rows, is_shared, i_h, tx,
    ):  # fmt: skip
        """A chunk whose rows have been located, and the slots of the next one's."""
        at = i % STAGES
        first = first_row + i * C
        n_left = n_rows - i * C
        rows.fetch_keys(q, k, shared_q, shared_k, b_q, b_k, at, at_k, is_shared, tx)
        rows.gather(v, b_v, at, at_v, tx, BV)
        rows.fetch_scores(P, Ag, k_scale, q_scale, g_cumsum, b_P, b_Ag, b_a, b_c, b_b, at, first, n_left, i_h, tx)
        if n_left > C:
            rows.load_slots(perm, slots_k, slots_v, first + C, n_left - C, tx)

    @T.prim_func
    def gdn_scan_specialized(
        q: T.Tensor((R, H, K), DTYPE),
        k: T.Tensor((R, H, K), DTYPE),
        v: T.Tensor((R, H, V), DTYPE),
        shared_q: T.Tensor((R, H, K), DTYPE),
        shared_k: T.Tensor((R, H, K), DTYPE),
        P: T.Tensor((H, M, C), DTYPE),
        Ag: T.Tensor((H, M, C), DTYPE),
        k_scale: T.Tensor((H, M), "float32"),
        q_scale: T.Tensor((H, M), "float32"),
        g_cumsum: T.Tensor((H, M), "float32"),
        perm: T.Tensor((M,), "int32"),
        segment_rows: T.Tensor((S,), "int32"),
        segment_boundaries: T.Tensor((S,), "int32"),
        initial_state: T.Tensor((S, H, K, V), "float32"),
        final_state: T.Tensor((S, H, K, V), "float32"),
        o_rows: T.Tensor((M, H, V), DTYPE),
        h: T.Tensor((B, H, K, V), DTYPE),
        w: T.Tensor((H, M, V), DTYPE),
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
            b_v = T.alloc_shared((STAGES, C, BV), DTYPE)
            b_P = T.alloc_shared((STAGES, C, C), DTYPE)
            b_Ag = T.alloc_shared((STAGES, C, C), DTYPE)
            b_a = T.alloc_shared((STAGES, C), "float32", scope="shared")
            b_c = T.alloc_shared((STAGES, C), "float32", scope="shared")
            b_b = T.alloc_shared((STAGES, C), "float32", scope="shared")
            b_kept = T.alloc_shared((2, C), "float32", scope="shared")
            b_read = T.alloc_shared((2, C), "float32", scope="shared")
            b_down = T.alloc_shared((2, C), "float32", scope="shared")
            b_low = T.alloc_shared((K, BV), DTYPE)
            b_w = T.alloc_shared((C, BV), DTYPE)
            b_new = T.alloc_shared((C, BV), DTYPE)
            b_in = T.alloc_shared((C, BV), DTYPE)
            b_out = T.alloc_shared((C, BV), DTYPE)
            T.annotate_layout({b_out: make_swizzled_layout(b_out), b_v: make_swizzled_layout(b_v)})
            b_state = T.alloc_fragment((K, BV), "float32")
            b_x = T.alloc_fragment((C, BV), "float32")
            b_o = T.alloc_fragment((C, BV), "float32")
            b_out_low = T.alloc_fragment((C, BV), DTYPE)
            slots_k = T.alloc_local((io.passes(C, K),), "int32")
            slots_v = T.alloc_local((io.passes(C, BV),), "int32")
            at_k = T.alloc_local((io.passes(C, K),), "int64")
            at_v = T.alloc_local((io.passes(C, BV),), "int64")

            first_row = segment_rows[i_seg]
            n_rows = segment_rows[i_seg + 1] - first_row
            n_chunks = T.ceildiv(n_rows, C)
            i_state = common.state_index(T, i_seg, n_sequences, PARTITIONS, HAS_SHARED)

            if thread < THREADS:
                meet.consume()
                if HAS_INITIAL:
                    for i, j in T.Parallel(K, BV):
                        b_state[i, j] = initial_state[i_state, i_h, i, i_v * BV + j]
                else:
                    T.clear(b_state)
                T.clear(b_out_low)
                meet.wait(specialized.READY, meet.all)
                T.copy(b_state, b_low)
                io.fence()
                meet.arrive(specialized.STATE)
                meet.wait(specialized.OWN, THREADS)
                for i in T.serial(n_chunks):
                    at = i % STAGES
                    mma.start(b_k[at, :, :], b_low, b_x, clear_accum=True, policy=by_columns)
                    mma.start(b_q[at, :, :], b_low, b_o, clear_accum=True, policy=by_columns)
                    mma.finish(1)
                    mma.settle(b_x, C, BV)
                    for i_c, j in T.Parallel(C, BV):
                        b_x[i_c, j] = b_v[at, i_c, j] - b_kept[i % 2, i_c] * b_x[i_c, j]
                    T.copy(b_x, b_w)
                    T.copy(b_out_low, b_out)  # of the chunk before; nobody stores that of the first
                    io.fence()
                    meet.arrive(specialized.VALUES)
                    meet.wait(specialized.OWN, THREADS)
                    mma.start(b_Ag[at, :, :], b_w, b_x, clear_accum=True, policy=by_columns)
                    for i_k, j in T.Parallel(K, BV):
                        b_state[i_k, j] *= T.exp(b_b[at, C - 1])
                    mma.finish(0)
                    mma.settle(b_x, C, BV)
                    mma.settle(b_o, C, BV)
                    T.copy(b_x, b_new)
                    for i_c, j in T.Parallel(C, BV):
                        b_x[i_c, j] *= b_down[i % 2, i_c]
                    T.copy(b_x, b_in)
                    for i_c, j in T.Parallel(C, BV):
                        b_o[i_c, j] *= b_read[i % 2, i_c]
                    io.fence()
                    meet.wait(specialized.OWN, THREADS)
                    mma.start(b_k[at, :, :], b_in, b_state, transpose_A=True, policy=by_rows)
                    mma.start(b_P[at, :, :], b_new, b_o, policy=by_columns)
                    mma.finish(1)
                    mma.settle(b_state, K, BV)
                    meet.wait(specialized.READY, meet.all)
                    T.copy(b_state, b_low)
                    io.fence()
                    mma.finish(0)
                    mma.settle(b_o, C, BV)
                    T.copy(b_o, b_out_low)
                    meet.arrive(specialized.STATE)
                    meet.wait(specialized.OWN, THREADS)
                T.copy(b_out_low, b_out)
                meet.wait(specialized.LAST, meet.all)
                if HAS_FINAL:
                    for i, j in T.Parallel(K, BV):
                        final_state[i_state, i_h, i, i_v * BV + j] = b_state[i, j]
            else:
                tx = thread - THREADS
                meet.produce()
                if n_chunks > 0:
                    rows.load_slots(perm, slots_k, slots_v, first_row, n_rows, tx)
                for i in T.unroll(STAGES - 1):
                    if i < n_chunks:
                        rows.locate(slots_k, slots_v, at_k, at_v, i_h, i_v, tx)
                        fetch(
                            i, q, k, v, shared_q, shared_k, P, Ag, k_scale, q_scale, g_cumsum, perm, b_q, b_k, b_v, b_P,
                            b_Ag, b_a, b_c, b_b, slots_k, slots_v, at_k, at_v, first_row, n_rows, i_seg < n_shared, i_h,
                            tx,
                        )  # fmt: skip
                    T.ptx_commit_group()
                for i in T.serial(n_chunks):
                    at = i % STAGES
                    n_left = n_rows - i * C
                    T.ptx_wait_group(STAGES - 2)
                    io.fence()
                    meet.wait(specialized.COPIED, PRODUCERS)
                    if tx < C:
                        a = T.if_then_else(tx < n_left, b_a[at, tx], 0.0)
                        up = T.exp(b_b[at, tx])
                        b_kept[i % 2, tx] = a * up
                        b_read[i % 2, tx] = b_c[at, tx] * up
                        b_down[i % 2, tx] = a * T.exp(b_b[at, C - 1] - b_b[at, tx])
                    meet.arrive(specialized.READY)
                    rows.locate(slots_k, slots_v, at_k, at_v, i_h, i_v, tx)
                    meet.wait(specialized.STATE, meet.all)
                    if i + STAGES - 1 < n_chunks:
                        fetch(
                            i + STAGES - 1, q, k, v, shared_q, shared_k, P, Ag, k_scale, q_scale, g_cumsum, perm, b_q,
                            b_k, b_v, b_P, b_Ag, b_a, b_c, b_b, slots_k, slots_v, at_k, at_v, first_row, n_rows,
                            i_seg < n_shared, i_h, tx,
                        )  # fmt: skip
                    T.ptx_commit_group()
                    if KEEPS:
                        if i > 0:
                            io.store_state(b_low, h, segment_boundaries[i_seg] + i - 1, i_h, i_v * BV, tx, K, BV)
                    meet.wait(specialized.VALUES, meet.all)
                    if i > 0:
                        io.store_rows(b_out, o_rows, first_row + (i - 1) * C, C, i_h, i_v * BV, tx, C, BV)
                    if KEEPS:
                        io.store_by_head(b_w, w, first_row + i * C, n_left, i_h, i_v * BV, tx, C, BV)
                meet.arrive(specialized.READY)
                meet.wait(specialized.STATE, meet.all)
                meet.wait(specialized.LAST, meet.all)
                if n_chunks > 0:
                    last = (n_chunks - 1) * C
                    io.store_rows(b_out, o_rows, first_row + last, n_rows - last, i_h, i_v * BV, tx, C, BV)

    return gdn_scan_specialized


def run(call: Call, tensors: "Mapping[str, torch.Tensor]") -> None:
    keeps = scan_keeps_states(call.sizes.problem, call.config)
    values = common.walk_constants(
        call, HAS_INITIAL="initial_state" in tensors, HAS_FINAL="final_state" in tensors, KEEPS=keeps
    )
    names = (
        "v", "P", "Ag", "k_scale", "q_scale", "g_cumsum", "perm", "segment_rows", "o_rows",
        *(("segment_boundaries", "h", "w") if keeps else ()),
        *(name for name in ("initial_state", "final_state") if name in tensors),
    )  # fmt: skip
    arguments = {**common.streams(tensors, "q", "k"), **common.row_arguments(call, tensors, *names)}
    specialized.launch(call, __name__, values, arguments)


TEMPLATE = Template(
    "tilelang", "gdn_scan_specialized", "scan", ("gdn",), SPACE, run, (__name__, common.MODULE, specialized.MODULE)
)
