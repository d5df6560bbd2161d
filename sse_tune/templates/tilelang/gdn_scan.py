"""GDN scan: the state of each segment from chunk to chunk, and the output of every row, in one kernel.

With S the state before the chunk, b the in-chunk cumsum of g, and Ag and P of `prepare`:

    W = V - diag(e^b a) K S        V' = Ag W
    O = diag(c e^b) Q S + P V'     S <- e^(b_C) S + Kᵀ diag(a e^(b_C - b)) V'

A block keeps block_v columns of one head's state in registers and walks its segment. The next chunks' rows are on
their way to shared memory meanwhile, their slots loaded a chunk earlier still; copies are issued, and the last chunk's
output is stored, while the tensor cores are at K S and Q S. Plans that keep their states have it store S and W too,
from their operands of 16 bits: S beside the output, W while the tensor cores are at Ag W.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sse_tune.space import Constraint, Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.stages import scan_keeps_states
from sse_tune.templates.tilelang import common

if TYPE_CHECKING:
    import torch


def smem_bytes(problem, config) -> int:
    return common.walk_smem_bytes(problem, config, keys=2, squares=2, values=1, operands=2)


SPACE = Space(
    params=(
        Param("block_v", (32, 64, 128), 64, "columns of the state one block keeps"),
        Param("num_warps", (4, 8), 4, "warps per block, four to a warpgroup"),
        Param("num_stages", (1, 2, 3), 2, "chunks in shared memory"),
    ),
    constraints=(
        *common.OPERANDS,
        common.WHOLE_SEGMENTS,
        # what is stored from a tile is not converted
        Constraint("states that the scan keeps must be of the problem's dtype",
                   lambda p, c, d: c["state_dtype"] == "io" or not scan_keeps_states(p, c)),
        *common.block_v_constraints(),
        # beyond that the state and the products beside it spill
        Constraint("(K + 2 * chunk_size) * block_v / (32 * num_warps) <= 192",
                   lambda p, c, d: (p.head_dim + 2 * c["chunk_size"]) * c["block_v"] <= 192 * 32 * c["num_warps"]),
        Constraint("the tiles in flight fit in shared memory",
                   lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
    ),
)


def factory(
    H: int, K: int, V: int, C: int, L: int, DTYPE: str, THREADS: int, BV: int, STAGES: int, PARTITIONS: int,
    HAS_SHARED: bool, HAS_INITIAL: bool, HAS_FINAL: bool, KEEPS: bool, CAPABILITY: int,
) -> Any:  # fmt: skip
    import tilelang.language as T

    io = common.copies(T, THREADS, L, CAPABILITY)
    mma = common.products(T, THREADS, CAPABILITY)
    NV = V // BV
    by_columns, by_rows = T.GemmWarpPolicy.FullCol, T.GemmWarpPolicy.FullRow
    R, S, M, B = (T.dynamic(name, "int64") for name in ("R", "S", "M", "B"))

    @T.macro
    def fetch(
        i, q, k, v, shared_q, shared_k, P, Ag, k_scale, q_scale, g_cumsum, perm, b_q, b_k, b_v, b_P, b_Ag, b_a, b_c,
        b_b, slots_k, slots_v, first_row, n_rows, is_shared, i_h, i_v, tx,
    ):  # fmt: skip
        at = i % STAGES
        first = first_row + i * C
        n_left = n_rows - i * C
        if is_shared:
            io.gather(shared_k, b_k, at, slots_k, i_h, 0, tx, C, K)
            io.gather(shared_q, b_q, at, slots_k, i_h, 0, tx, C, K)
        else:
            io.gather(k, b_k, at, slots_k, i_h, 0, tx, C, K)
            io.gather(q, b_q, at, slots_k, i_h, 0, tx, C, K)
        io.gather(v, b_v, at, slots_v, i_h, i_v * BV, tx, C, BV)
        io.copy_by_head(P, b_P, at, first, n_left, i_h, 0, tx, C, C)
        io.copy_by_head(Ag, b_Ag, at, first, n_left, i_h, 0, tx, C, C)
        io.copy_scalars(k_scale, b_a, at, first, n_left, i_h, tx, C)
        io.copy_scalars(q_scale, b_c, at, first, n_left, i_h, tx, C)
        io.copy_scalars(g_cumsum, b_b, at, first, n_left, i_h, tx, C)
        if n_left > C:
            io.load_slots(perm, slots_k, first + C, n_left - C, tx, C, K)
            io.load_slots(perm, slots_v, first + C, n_left - C, tx, C, BV)

    @T.prim_func
    def gdn_scan(
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
        with T.Kernel(n_blocks, threads=THREADS) as block:
            tx = T.get_thread_binding()
            i_v = block % NV
            i_h = block // NV % H
            i_seg = block // (NV * H)
            b_q = T.alloc_shared((STAGES, C, K), DTYPE)
            b_k = T.alloc_shared((STAGES, C, K), DTYPE)
            b_v = T.alloc_shared((STAGES, C, BV), DTYPE)  # then W
            b_P = T.alloc_shared((STAGES, C, C), DTYPE)
            b_Ag = T.alloc_shared((STAGES, C, C), DTYPE)
            b_a = T.alloc_shared((STAGES, C), "float32", scope="shared")
            b_c = T.alloc_shared((STAGES, C), "float32", scope="shared")
            b_b = T.alloc_shared((STAGES, C), "float32", scope="shared")
            b_kept = T.alloc_shared((C,), "float32", scope="shared")
            b_read = T.alloc_shared((C,), "float32", scope="shared")
            b_down = T.alloc_shared((C,), "float32", scope="shared")
            b_low = T.alloc_shared((K, BV), DTYPE)
            b_new = T.alloc_shared((C, BV), DTYPE)  # then O
            b_in = T.alloc_shared((C, BV), DTYPE)
            b_state = T.alloc_fragment((K, BV), "float32")
            b_x = T.alloc_fragment((C, BV), "float32")
            b_o = T.alloc_fragment((C, BV), "float32")
            slots_k = T.alloc_local((io.passes(C, K),), "int32")
            slots_v = T.alloc_local((io.passes(C, BV),), "int32")

            first_row = segment_rows[i_seg]
            n_rows = segment_rows[i_seg + 1] - first_row
            n_chunks = T.ceildiv(n_rows, C)
            i_state = common.state_index(T, i_seg, n_sequences, PARTITIONS, HAS_SHARED)

            if HAS_INITIAL:
                for i, j in T.Parallel(K, BV):
                    b_state[i, j] = initial_state[i_state, i_h, i, i_v * BV + j]
            else:
                T.clear(b_state)
            if n_chunks > 0:
                io.load_slots(perm, slots_k, first_row, n_rows, tx, C, K)
                io.load_slots(perm, slots_v, first_row, n_rows, tx, C, BV)
            for i in T.unroll(STAGES - 1):
                if i < n_chunks:
                    fetch(
                        i, q, k, v, shared_q, shared_k, P, Ag, k_scale, q_scale, g_cumsum, perm, b_q, b_k, b_v, b_P,
                        b_Ag, b_a, b_c, b_b, slots_k, slots_v, first_row, n_rows, i_seg < n_shared, i_h, i_v, tx,
                    )  # fmt: skip
                T.ptx_commit_group()
            for i in T.serial(n_chunks):
                at = i % STAGES
                n_left = n_rows - i * C
                if STAGES == 1:
                    T.sync_threads()
                    fetch(
                        i, q, k, v, shared_q, shared_k, P, Ag, k_scale, q_scale, g_cumsum, perm, b_q, b_k, b_v, b_P,
                        b_Ag, b_a, b_c, b_b, slots_k, slots_v, first_row, n_rows, i_seg < n_shared, i_h, i_v, tx,
                    )  # fmt: skip
                    T.ptx_commit_group()
                    io.arrive(0)
                else:
                    io.arrive(STAGES - 2)
                if tx < C:
                    a = T.if_then_else(tx < n_left, b_a[at, tx], 0.0)
                    up = T.exp(b_b[at, tx])
                    b_kept[tx] = a * up
                    b_read[tx] = b_c[at, tx] * up
                    b_down[tx] = a * T.exp(b_b[at, C - 1] - b_b[at, tx])
                T.copy(b_state, b_low)
                io.fence()
                T.sync_threads()
                mma.start(b_k[at, :, :], b_low, b_x, clear_accum=True, policy=by_columns)
                mma.start(b_q[at, :, :], b_low, b_o, clear_accum=True, policy=by_columns)
                if STAGES > 1:
                    if i + STAGES - 1 < n_chunks:
                        fetch(
                            i + STAGES - 1, q, k, v, shared_q, shared_k, P, Ag, k_scale, q_scale, g_cumsum, perm, b_q,
                            b_k, b_v, b_P, b_Ag, b_a, b_c, b_b, slots_k, slots_v, first_row, n_rows,
                            i_seg < n_shared, i_h, i_v, tx,
                        )  # fmt: skip
                    T.ptx_commit_group()
                if i > 0:
                    io.store_rows(b_new, o_rows, first_row + (i - 1) * C, C, i_h, i_v * BV, tx, C, BV)
                    if KEEPS:
                        io.store_state(b_low, h, segment_boundaries[i_seg] + i - 1, i_h, i_v * BV, tx, K, BV)
                mma.finish(1)
                mma.settle(b_x, C, BV)
                for i_c, j in T.Parallel(C, BV):
                    b_x[i_c, j] = b_v[at, i_c, j] - b_kept[i_c] * b_x[i_c, j]
                T.copy(b_x, b_v[at, :, :])
                io.fence()
                T.sync_threads()
                mma.start(b_Ag[at, :, :], b_v[at, :, :], b_x, clear_accum=True, policy=by_columns)
                if KEEPS:
                    io.store_by_head(b_v, w, first_row + i * C, n_left, i_h, i_v * BV, tx, C, BV, at)
                mma.finish(0)
                mma.settle(b_x, C, BV)
                mma.settle(b_o, C, BV)
                T.copy(b_x, b_new)
                for i_c, j in T.Parallel(C, BV):
                    b_x[i_c, j] *= b_down[i_c]
                T.copy(b_x, b_in)
                io.fence()
                for i_c, j in T.Parallel(C, BV):
                    b_o[i_c, j] *= b_read[i_c]
                for i_k, j in T.Parallel(K, BV):
                    b_state[i_k, j] *= T.exp(b_b[at, C - 1])
                T.sync_threads()
                mma.start(b_P[at, :, :], b_new, b_o, policy=by_columns)
                mma.start(b_k[at, :, :], b_in, b_state, transpose_A=True, policy=by_rows)
                mma.finish(0)
                mma.settle(b_o, C, BV)
                mma.settle(b_state, K, BV)
                T.sync_threads()
                T.copy(b_o, b_new)
            if n_chunks > 0:
                T.sync_threads()
                last = (n_chunks - 1) * C
                io.store_rows(b_new, o_rows, first_row + last, n_rows - last, i_h, i_v * BV, tx, C, BV)
            if HAS_FINAL:
                for i, j in T.Parallel(K, BV):
                    final_state[i_state, i_h, i, i_v * BV + j] = b_state[i, j]

    return gdn_scan


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
    common.launch_walk(call, common.program(__name__, "factory", values), arguments)


TEMPLATE = Template("tilelang", "gdn_scan", "scan", ("gdn",), SPACE, run, (__name__, common.MODULE))
