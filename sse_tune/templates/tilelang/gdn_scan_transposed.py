"""GDN scan with its state in registers: `gdn_scan` the other way round, columns of V along the rows of products.

With X = V - γ K S, what the chunk's inverse makes of it and O written as their transposes,

    Xᵀ = Vᵀ - γ (Sᵀ Kᵀ)     V'ᵀ = Xᵀ Agᵀ     Oᵀ = (Sᵀ Qᵀ) + V'ᵀ Pᵀ     Sᵀ = decay Sᵀ + V'ᵀ K

the left operand of every product is what a product before it left in the registers of its warps (`transposed.py`).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sse_tune.space import Constraint, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.stages import scan_keeps_states
from sse_tune.templates.tilelang import common, specialized, transposed

if TYPE_CHECKING:
    import torch


def smem_bytes(problem, config) -> int:
    """Tiles of the chunks in flight, the state, W and O to be stored, and six numbers a row."""
    walk = common.walk_smem_bytes(problem, config, keys=2, squares=2, values=1, operands=2)
    return walk + 2 * 3 * 4 * int(config["chunk_size"])


SPACE = Space(
    params=transposed.PARAMS,
    constraints=(
        *transposed.CONSTRAINTS,
        # what is stored from a tile is not converted
        Constraint("states that the scan keeps must be of the problem's dtype",
                   lambda p, c, d: c["state_dtype"] == "io" or not scan_keeps_states(p, c)),
        Constraint("the tiles in flight fit in shared memory",
                   lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
    ),
)


def factory(
    H: int, K: int, V: int, C: int, L: int, DTYPE: str, THREADS: int, COPIERS: int, BV: int, STAGES: int,
    PARTITIONS: int, HAS_SHARED: bool, HAS_INITIAL: bool, HAS_FINAL: bool, KEEPS: bool, CAPABILITY: int,
) -> Any:  # fmt: skip
    import tilelang.language as T
    from tilelang.layout import make_swizzled_layout

    io, out = (common.copies(T, threads, L, CAPABILITY) for threads in (COPIERS, transposed.STORERS))
    rows = specialized.chunks(T, io, COPIERS, L, H, C, K, V, BV)
    mma = common.products(T, THREADS, CAPABILITY)
    meet = transposed.meetings(T, THREADS, COPIERS)
    take_registers = transposed.registers(T, THREADS, COPIERS)
    turned = transposed.turns(T)
    NV = V // BV
    by_rows = T.GemmWarpPolicy.FullRow
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
    def gdn_scan_transposed(
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
        with T.Kernel(n_blocks, threads=THREADS + COPIERS + transposed.STORERS, prelude=transposed.PRELUDE) as block:
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
            b_out = T.alloc_shared((C, BV), DTYPE)
            T.annotate_layout({b_out: make_swizzled_layout(b_out), b_v: make_swizzled_layout(b_v)})
            if KEEPS:
                b_h = T.alloc_shared((K, BV), DTYPE)
                b_w = T.alloc_shared((C, BV), DTYPE)
                T.annotate_layout({b_h: make_swizzled_layout(b_h), b_w: make_swizzled_layout(b_w)})
            b_state = T.alloc_fragment((BV, K), "float32")
            b_low = T.alloc_fragment((BV, K), DTYPE)
            b_x = T.alloc_fragment((BV, C), "float32")
            b_new = T.alloc_fragment((BV, C), "float32")
            b_o = T.alloc_fragment((BV, C), "float32")
            b_values = T.alloc_fragment((BV, C), DTYPE)
            b_x_low = T.alloc_fragment((BV, C), DTYPE)
            b_new_low = T.alloc_fragment((BV, C), DTYPE)
            b_in_low = T.alloc_fragment((BV, C), DTYPE)
            b_out_low = T.alloc_fragment((BV, C), DTYPE)
            slots_k = T.alloc_local((io.passes(C, K),), "int32")
            slots_v = T.alloc_local((io.passes(C, BV),), "int32")
            at_k = T.alloc_local((io.passes(C, K),), "int64")
            at_v = T.alloc_local((io.passes(C, BV),), "int64")

            first_row = segment_rows[i_seg]
            n_rows = segment_rows[i_seg + 1] - first_row
            n_chunks = T.ceildiv(n_rows, C)
            i_state = common.state_index(T, i_seg, n_sequences, PARTITIONS, HAS_SHARED)

            if thread < THREADS:
                take_registers.consume()
                if HAS_INITIAL:
                    for j, i in T.Parallel(BV, K):
                        b_state[j, i] = initial_state[i_state, i_h, i, i_v * BV + j]
                else:
                    T.clear(b_state)
                T.clear(b_out_low)
                T.copy(b_state, b_low)
                meet.ready.wait()
                for i in T.serial(n_chunks):
                    at = i % STAGES
                    meet.free.arrive()
                    mma.start(b_low, b_k[at, :, :], b_x, transpose_B=True, clear_accum=True, policy=by_rows)
                    mma.start(b_low, b_q[at, :, :], b_o, transpose_B=True, clear_accum=True, policy=by_rows)
                    turned.take(b_v, at, b_values, C, thread)
                    meet.stored.wait()
                    turned.put(b_out_low, b_out, C, thread)  # of the chunk before; nobody stores that of the first
                    if KEEPS:
                        turned.put(b_low, b_h, K, thread)
                    mma.finish(1)
                    mma.settle(b_x, BV, C)
                    for j, i_c in T.Parallel(BV, C):
                        b_x[j, i_c] = b_values[j, i_c] - b_kept[i % 2, i_c] * b_x[j, i_c]
                    T.copy(b_x, b_x_low)
                    mma.start(b_x_low, b_Ag[at, :, :], b_new, transpose_B=True, clear_accum=True, policy=by_rows)
                    if KEEPS:
                        turned.put(b_x_low, b_w, C, thread)
                    meet.made.arrive()
                    for j, i_k in T.Parallel(BV, K):
                        b_state[j, i_k] *= T.exp(b_b[at, C - 1])
                    mma.finish(0)
                    mma.settle(b_o, BV, C)
                    mma.settle(b_new, BV, C)
                    T.copy(b_new, b_new_low)
                    for j, i_c in T.Parallel(BV, C):
                        b_new[j, i_c] *= b_down[i % 2, i_c]
                    T.copy(b_new, b_in_low)
                    mma.start(b_in_low, b_k[at, :, :], b_state, policy=by_rows)
                    for j, i_c in T.Parallel(BV, C):
                        b_o[j, i_c] *= b_read[i % 2, i_c]
                    mma.start(b_new_low, b_P[at, :, :], b_o, transpose_B=True, policy=by_rows)
                    mma.finish(1)
                    mma.settle(b_state, BV, K)
                    T.copy(b_state, b_low)
                    mma.finish(0)
                    mma.settle(b_o, BV, C)
                    T.copy(b_o, b_out_low)
                    meet.ready.wait()
                meet.free.arrive()
                meet.stored.wait()
                turned.put(b_out_low, b_out, C, thread)
                meet.made.arrive()
                if HAS_FINAL:
                    for j, i in T.Parallel(BV, K):
                        final_state[i_state, i_h, i, i_v * BV + j] = b_state[j, i]
            elif thread < THREADS + COPIERS:
                tx = thread - THREADS
                take_registers.copy()
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
                    meet.copied.wait()
                    if tx < C:
                        a = T.if_then_else(tx < n_left, b_a[at, tx], 0.0)
                        up = T.exp(b_b[at, tx])
                        b_kept[i % 2, tx] = a * up
                        b_read[i % 2, tx] = b_c[at, tx] * up
                        b_down[i % 2, tx] = a * T.exp(b_b[at, C - 1] - b_b[at, tx])
                    meet.ready.arrive()
                    rows.locate(slots_k, slots_v, at_k, at_v, i_h, i_v, tx)
                    meet.free.wait()
                    if i + STAGES - 1 < n_chunks:
                        fetch(
                            i + STAGES - 1, q, k, v, shared_q, shared_k, P, Ag, k_scale, q_scale, g_cumsum, perm, b_q,
                            b_k, b_v, b_P, b_Ag, b_a, b_c, b_b, slots_k, slots_v, at_k, at_v, first_row, n_rows,
                            i_seg < n_shared, i_h, tx,
                        )  # fmt: skip
                    T.ptx_commit_group()
                meet.ready.arrive()
                meet.free.wait()
            else:
                tx = thread - THREADS - COPIERS
                take_registers.store()
                meet.stored.arrive()
                for i in T.serial(n_chunks):
                    meet.made.wait()
                    if i > 0:
                        out.store_rows(b_out, o_rows, first_row + (i - 1) * C, C, i_h, i_v * BV, tx, C, BV)
                    if KEEPS:
                        if i > 0:
                            out.store_state(b_h, h, segment_boundaries[i_seg] + i - 1, i_h, i_v * BV, tx, K, BV)
                        out.store_by_head(b_w, w, first_row + i * C, n_rows - i * C, i_h, i_v * BV, tx, C, BV)
                    meet.stored.arrive()
                meet.made.wait()
                if n_chunks > 0:
                    last = (n_chunks - 1) * C
                    out.store_rows(b_out, o_rows, first_row + last, n_rows - last, i_h, i_v * BV, tx, C, BV)

    return gdn_scan_transposed


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
    transposed.launch(call, __name__, values, arguments)


TEMPLATE = Template(
    "tilelang", "gdn_scan_transposed", "scan", ("gdn",), SPACE, run,
    (__name__, common.MODULE, specialized.MODULE, transposed.MODULE),
)  # fmt: skip
