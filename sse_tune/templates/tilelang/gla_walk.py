"""GLA's walk along a segment: the state at each boundary, or backwards its gradient; one kernel for both.

With x and y the rows of a chunk, (kg, v) forwards and (qg, dO) backwards:

    S <- e^(b_C) S + xᵀ y

A block keeps a tile of one head's state in registers: rows and columns of a state do not meet, so both can be cut. A
step is one product, shorter than any load takes, so nothing in it may wait for one: rows and decays are on their way to
shared memory num_stages - 1 steps before their use, and the slots that the addresses of the rows of y need as many
steps before that. Rows of y past the end of a chunk are 0, so what they add to the state is. A state of 16 bits leaves
through one of two tiles of shared memory, in the step after the one that made it, while the tensor cores are at that
step's product; one of fp32 from its registers, whose four neighbours hold a sector of a row.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.registry import Call
from sse_tune.templates.tilelang import common

if TYPE_CHECKING:
    import torch

MODULE = "sse_tune.templates.tilelang.gla_walk"


def smem_bytes(problem: Problem, config: Config) -> int:
    """In each slot the rows, their slots and a decay of each row of the state; two tiles of it on their way out; a KiB
    of alignment."""
    c, bk, bv = int(config["chunk_size"]), int(config["block_k"]), int(config["block_v"])
    item = common.item_bytes(problem)
    slot = item * c * (bk + bv) + 4 * (bk + c)
    leaving = item * bk * bv if config["state_dtype"] == "io" else 0
    return int(config["num_stages"]) * slot + leaving + 1024


SPACE = Space(
    params=(
        Param("block_k", (64, 128), 64, "rows of the state one block keeps"),
        Param("block_v", (32, 64, 128), 64, "columns of the state one block keeps"),
        Param("num_warps", (4, 8), 4, "warps per block, four to a warpgroup"),
        Param("num_stages", (2, 3, 4, 6), 4, "chunks in shared memory"),
    ),
    constraints=(
        *common.OPERANDS,
        Constraint("block_k must divide K", lambda p, c, d: p.head_dim % c["block_k"] == 0),
        *common.block_v_constraints(),
        # four warps share a product of 64 rows: more would have none
        Constraint("num_warps <= block_k / 16", lambda p, c, d: c["num_warps"] <= c["block_k"] // 16),
        # beyond that the state alone spills
        Constraint("block_k * block_v / (32 * num_warps) <= 128",
                   lambda p, c, d: c["block_k"] * c["block_v"] <= 128 * 32 * c["num_warps"]),
        Constraint("the tiles in flight fit in shared memory",
                   lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
    ),
)


def factory(
    H: int, K: int, V: int, C: int, L: int, DTYPE: str, STATE_DTYPE: str, THREADS: int, BK: int, BV: int, STAGES: int,
    PARTITIONS: int, HAS_SHARED: bool, HAS_FIRST: bool, HAS_LAST: bool, REVERSE: bool, CAPABILITY: int,
) -> Any:  # fmt: skip
    import tilelang.language as T
    from tilelang.layout import make_swizzled_layout

    io = common.copies(T, THREADS, L, CAPABILITY)
    mma = common.products(T, THREADS, CAPABILITY)
    NK, NV = K // BK, V // BV
    by_rows = T.GemmWarpPolicy.FullRow
    leaves_by_tile = STATE_DTYPE == DTYPE
    ahead = STAGES - 1
    R, S, M, B, N = (T.dynamic(name, "int64") for name in ("R", "S", "M", "B", "N"))

    def chunk_of(step: Any, n_chunks: Any) -> Any:
        return n_chunks - 1 - step if REVERSE else step

    @T.macro
    def fetch(
        step, n_steps, x, y, decay, perm, b_x, b_y, b_decay, b_slots, slots, first_row, n_rows, n_chunks, first_chunk,
        i_h, i_k, i_v, tx,
    ):  # fmt: skip
        """Rows and decay of a step's chunk, whose slots are in registers; slots of the chunk `ahead` steps later."""
        at = step % STAGES
        i = chunk_of(step, n_chunks)
        first = first_row + i * C
        n_left = n_rows - i * C
        io.copy_by_head(x, b_x, at, first, n_left, i_h, i_k * BK, tx, C, BK)
        io.gather_or_zero(y, b_y, at, slots, i_h, i_v * BV, n_left, tx, C, BV)
        if tx < BK // 4:
            T.ptx_cp_async(
                T.access_ptr(b_decay[at, tx * 4], "w", 4),
                T.access_ptr(decay[T.Cast("int64", first_chunk + i), i_h, i_k * BK + tx * 4], "r", 4),
                4,
            )
        if step + ahead < n_steps:
            later = chunk_of(step + ahead, n_chunks) * C
            if tx < C:
                row = T.Cast("int64", first_row + later + T.min(tx, n_rows - later - 1))
                T.ptx_cp_async(
                    T.access_ptr(b_slots[(step + ahead) % STAGES, tx], "w", 1), T.access_ptr(perm[row], "r", 1), 1
                )

    @T.macro
    def take_slots(b_slots, at, slots, tx):
        """The slots of the rows that this thread copies, which came with a chunk before."""
        for p in T.unroll(io.passes(C, BV)):
            slots[p] = b_slots[at, (p * THREADS + tx) // (BV // common.VECTOR)]

    @T.macro
    def store_tile(b_low, at_boundaries, step, n_chunks, first_boundary, i_h, i_k, i_v, tx):
        """The state after a step, to the boundary there."""
        boundary = T.Cast("int64", first_boundary + chunk_of(step, n_chunks) - (1 if REVERSE else 0))
        for p in T.unroll(io.passes(BK, BV)):
            row = (p * THREADS + tx) // (BV // common.VECTOR)
            o_d = (p * THREADS + tx) % (BV // common.VECTOR) * common.VECTOR
            for e in T.vectorized(common.VECTOR):
                at_boundaries[boundary, i_h, i_k * BK + row, i_v * BV + o_d + e] = b_low[row, o_d + e]

    @T.prim_func
    def gla_walk(
        x: T.Tensor((H, M, K), DTYPE),
        y: T.Tensor((R, H, V), DTYPE),
        decay: T.Tensor((N, H, K), "float32"),
        perm: T.Tensor((M,), "int32"),
        segment_rows: T.Tensor((S,), "int32"),
        segment_chunks: T.Tensor((S,), "int32"),
        segment_boundaries: T.Tensor((S,), "int32"),
        first_state: T.Tensor((S, H, K, V), "float32"),
        last_state: T.Tensor((S, H, K, V), "float32"),
        at_boundaries: T.Tensor((B, H, K, V), STATE_DTYPE),
        n_sequences: T.int32,
        n_blocks: T.int32,
    ):
        with T.Kernel(n_blocks, threads=THREADS) as block:
            tx = T.get_thread_binding()
            i_v = block % NV
            i_k = block // NV % NK
            i_h = block // (NV * NK) % H
            i_seg = block // (NV * NK * H)
            b_x = T.alloc_shared((STAGES, C, BK), DTYPE)
            b_y = T.alloc_shared((STAGES, C, BV), DTYPE)
            b_decay = T.alloc_shared((STAGES, BK), "float32", scope="shared")
            b_slots = T.alloc_shared((STAGES, C), "int32", scope="shared")
            b_state = T.alloc_fragment((BK, BV), "float32")
            slots = T.alloc_local((io.passes(C, BV),), "int32")
            if leaves_by_tile:
                b_low = T.alloc_shared((BK, BV), DTYPE)
                T.annotate_layout({b_low: make_swizzled_layout(b_low)})

            first_row = segment_rows[i_seg]
            n_rows = segment_rows[i_seg + 1] - first_row
            n_chunks = T.ceildiv(n_rows, C)
            n_inner = n_chunks - 1  # what follows the last chunk is no boundary
            n_steps = n_chunks if HAS_LAST else n_inner
            first_chunk = segment_chunks[i_seg]
            first_boundary = segment_boundaries[i_seg]
            i_state = common.state_index(T, i_seg, n_sequences, PARTITIONS, HAS_SHARED)

            if HAS_FIRST:
                for i, j in T.Parallel(BK, BV):
                    b_state[i, j] = first_state[i_state, i_h, i_k * BK + i, i_v * BV + j]
            else:
                T.clear(b_state)
            for step in T.unroll(ahead):
                if step < n_steps:
                    start = chunk_of(step, n_chunks) * C
                    io.load_slots(perm, slots, first_row + start, n_rows - start, tx, C, BV)
                    fetch(
                        step, n_steps, x, y, decay, perm, b_x, b_y, b_decay, b_slots, slots, first_row, n_rows,
                        n_chunks, first_chunk, i_h, i_k, i_v, tx,
                    )  # fmt: skip
                T.ptx_commit_group()
            for step in T.serial(n_steps):
                at = step % STAGES
                io.arrive(STAGES - 2)
                for i, j in T.Parallel(BK, BV):
                    b_state[i, j] *= b_decay[at, i]
                mma.start(b_x[at, :, :], b_y[at, :, :], b_state, transpose_A=True, policy=by_rows)
                if step + ahead < n_steps:
                    take_slots(b_slots, (step + ahead) % STAGES, slots, tx)
                if leaves_by_tile:
                    if step > 0:
                        store_tile(b_low, at_boundaries, step - 1, n_chunks, first_boundary, i_h, i_k, i_v, tx)
                T.sync_threads()
                if step + ahead < n_steps:
                    fetch(
                        step + ahead, n_steps, x, y, decay, perm, b_x, b_y, b_decay, b_slots, slots, first_row, n_rows,
                        n_chunks, first_chunk, i_h, i_k, i_v, tx,
                    )  # fmt: skip
                T.ptx_commit_group()
                mma.finish(0)
                mma.settle(b_state, BK, BV)
                if leaves_by_tile:
                    T.copy(b_state, b_low)
                elif step < n_inner:
                    i_boundary = T.Cast("int64", first_boundary + chunk_of(step, n_chunks) - (1 if REVERSE else 0))
                    for i, j in T.Parallel(BK, BV):
                        at_boundaries[i_boundary, i_h, i_k * BK + i, i_v * BV + j] = b_state[i, j]
            if HAS_LAST:
                for i, j in T.Parallel(BK, BV):
                    last_state[i_state, i_h, i_k * BK + i, i_v * BV + j] = b_state[i, j]
            elif leaves_by_tile:
                if n_steps > 0:
                    T.sync_threads()
                    store_tile(b_low, at_boundaries, n_steps - 1, n_chunks, first_boundary, i_h, i_k, i_v, tx)

    return gla_walk


def run(
    call: Call, tensors: "Mapping[str, torch.Tensor]", x: str, y: str, states: str, ends: tuple[str, str], reverse: bool
) -> None:
    """Walks with the tensors of these names; `ends`: those of the state it starts from and of the one it leaves."""
    problem, config = call.sizes.problem, call.config
    block_k, block_v = int(config["block_k"]), int(config["block_v"])
    io_dtype = common.DTYPES[problem.dtype]
    values = common.constants(
        call, STATE_DTYPE=io_dtype if config["state_dtype"] == "io" else "float32", BK=block_k, BV=block_v,
        STAGES=int(config["num_stages"]), PARTITIONS=problem.partitions, HAS_SHARED=problem.shared,
        HAS_FIRST=ends[0] in tensors, HAS_LAST=ends[1] in tensors, REVERSE=reverse,
    )  # fmt: skip
    tables = ("perm", "segment_rows", "segment_chunks", "segment_boundaries", "decay")
    present = {role: tensors[name] for role, name in zip(("first_state", "last_state"), ends) if name in tensors}
    blocks = call.sizes.segments * problem.num_heads * (problem.key_dim // block_k) * (problem.value_dim // block_v)
    call.launch(
        common.program(MODULE, "factory", values),
        (blocks,),
        dict(
            **common.row_arguments(call, tensors, *tables),
            **present,
            x=tensors[x],
            y=tensors[y],
            at_boundaries=tensors[states],
            n_blocks=blocks,
        ),
        num_warps=int(config["num_warps"]),
        num_stages=int(config["num_stages"]),
    )
