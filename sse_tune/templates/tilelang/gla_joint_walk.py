"""GLA's walk along a segment with the rows that its states give; one kernel for both passes.

With S the state on a chunk's near side, and x, z and y the rows of the chunk, (qg, kg, v) forwards and (kg, qg, dO)
backwards:

    O = x S + P y (backwards Pᵀ y)        S <- e^(b_C) S + zᵀ y

A block keeps block_v columns of one head's state in registers. None of a step's three products needs another's result,
so they run together, on the state as it came in, rounded to 16 bits: an operand that is also what the backward pass
keeps of it. Rows, scores and decays are on their way to shared memory num_stages - 1 steps before their use, and the
slots that the addresses of the rows of y need as many steps before that; the last step's rows and the state leave while
the products run. Rows of y past the end of a chunk are 0, so what they add is.

Three barriers a step: what was copied for it and all that the step before read and wrote is done; the operand is there;
the rows of the step before have left the tile that those of this one go to. The compiler would add eight.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.registry import Call
from sse_tune.templates.tilelang import common

if TYPE_CHECKING:
    import torch

MODULE = "sse_tune.templates.tilelang.gla_joint_walk"


def smem_bytes(problem: Problem, config: Config) -> int:
    """In each slot the rows, scores, slots and a decay of each row of the state; the state as an operand and the rows
    on their way out; a KiB of alignment."""
    c, k, bv = int(config["chunk_size"]), problem.head_dim, int(config["block_v"])
    item = common.item_bytes(problem)
    slot = item * (2 * c * k + c * c + c * bv) + 4 * (k + c)
    return int(config["num_stages"]) * slot + item * (k + c) * bv + 1024


SPACE = Space(
    params=(
        Param("block_v", (32, 64, 128), 64, "columns of the state one block keeps"),
        Param("num_warps", (4, 8), 4, "warps per block, four to a warpgroup"),
        Param("num_stages", (2, 3, 4), 2, "chunks in shared memory"),
    ),
    constraints=(
        *common.OPERANDS,
        common.IO_STATES,
        *common.block_v_constraints(),
        # beyond that the state and the product beside it spill
        Constraint("(K + chunk_size) * block_v / (32 * num_warps) <= 160",
                   lambda p, c, d: (p.head_dim + c["chunk_size"]) * c["block_v"] <= 160 * 32 * c["num_warps"]),
        Constraint("the tiles in flight fit in shared memory",
                   lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
    ),
)


def factory(
    H: int, K: int, V: int, C: int, L: int, DTYPE: str, THREADS: int, BV: int, STAGES: int, PARTITIONS: int,
    HAS_SHARED: bool, HAS_FIRST: bool, HAS_LAST: bool, KEEPS: bool, REVERSE: bool, CAPABILITY: int,
) -> Any:  # fmt: skip
    import tilelang.language as T
    from tilelang.layout import make_swizzled_layout

    io = common.copies(T, THREADS, L, CAPABILITY)
    mma = common.products(T, THREADS, CAPABILITY)
    NV = V // BV
    by_columns, by_rows = T.GemmWarpPolicy.FullCol, T.GemmWarpPolicy.FullRow
    ahead = STAGES - 1
    R, S, M, B, N = (T.dynamic(name, "int64") for name in ("R", "S", "M", "B", "N"))

    def chunk_of(step: Any, n_chunks: Any) -> Any:
        return n_chunks - 1 - step if REVERSE else step

    @T.macro
    def fetch(
        step, x, z, y, P, decay, perm, b_x, b_z, b_y, b_P, b_decay, b_slots, slots, first_row, n_rows, n_chunks,
        first_chunk, i_h, i_v, tx,
    ):  # fmt: skip
        """What a step needs of its chunk, whose slots are in registers; slots of the chunk `ahead` steps later."""
        at = step % STAGES
        i = chunk_of(step, n_chunks)
        first = first_row + i * C
        n_left = n_rows - i * C
        io.copy_by_head(x, b_x, at, first, n_left, i_h, 0, tx, C, K)
        io.copy_by_head(z, b_z, at, first, n_left, i_h, 0, tx, C, K)
        io.copy_by_head(P, b_P, at, first, n_left, i_h, 0, tx, C, C)
        io.gather_or_zero(y, b_y, at, slots, i_h, i_v * BV, n_left, tx, C, BV)
        if tx < K // 4:
            T.ptx_cp_async(
                T.access_ptr(b_decay[at, tx * 4], "w", 4),
                T.access_ptr(decay[T.Cast("int64", first_chunk + i), i_h, tx * 4], "r", 4),
                4,
            )
        if step + ahead < n_chunks:
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
    def store_out(b_rows, out, step, n_chunks, first_row, n_rows, i_h, i_v, tx):
        """The rows that a step made."""
        i = chunk_of(step, n_chunks)
        io.store_rows(b_rows, out, first_row + i * C, n_rows - i * C, i_h, i_v * BV, tx, C, BV)

    @T.prim_func
    def gla_joint_walk(
        x: T.Tensor((H, M, K), DTYPE),
        z: T.Tensor((H, M, K), DTYPE),
        y: T.Tensor((R, H, V), DTYPE),
        P: T.Tensor((H, M, C), DTYPE),
        decay: T.Tensor((N, H, K), "float32"),
        perm: T.Tensor((M,), "int32"),
        segment_rows: T.Tensor((S,), "int32"),
        segment_chunks: T.Tensor((S,), "int32"),
        segment_boundaries: T.Tensor((S,), "int32"),
        first_state: T.Tensor((S, H, K, V), "float32"),
        last_state: T.Tensor((S, H, K, V), "float32"),
        at_boundaries: T.Tensor((B, H, K, V), DTYPE),
        out: T.Tensor((M, H, V), DTYPE),
        n_sequences: T.int32,
        n_blocks: T.int32,
    ):
        with T.Kernel(n_blocks, threads=THREADS) as block:
            tx = T.get_thread_binding()
            i_v = block % NV
            i_h = block // NV % H
            i_seg = block // (NV * H)
            b_x = T.alloc_shared((STAGES, C, K), DTYPE)
            b_z = T.alloc_shared((STAGES, C, K), DTYPE)
            b_y = T.alloc_shared((STAGES, C, BV), DTYPE)
            b_P = T.alloc_shared((STAGES, C, C), DTYPE)
            b_decay = T.alloc_shared((STAGES, K), "float32", scope="shared")
            b_slots = T.alloc_shared((STAGES, C), "int32", scope="shared")
            b_low = T.alloc_shared((K, BV), DTYPE)
            b_rows = T.alloc_shared((C, BV), DTYPE)
            T.annotate_layout({b_rows: make_swizzled_layout(b_rows)})
            b_state = T.alloc_fragment((K, BV), "float32")
            b_out = T.alloc_fragment((C, BV), "float32")
            slots = T.alloc_local((io.passes(C, BV),), "int32")

            first_row = segment_rows[i_seg]
            n_rows = segment_rows[i_seg + 1] - first_row
            n_chunks = T.ceildiv(n_rows, C)
            first_chunk = segment_chunks[i_seg]
            i_state = common.state_index(T, i_seg, n_sequences, PARTITIONS, HAS_SHARED)
            if KEEPS:
                first_boundary = segment_boundaries[i_seg] - (0 if REVERSE else 1)

            if HAS_FIRST:
                for i, j in T.Parallel(K, BV):
                    b_state[i, j] = first_state[i_state, i_h, i, i_v * BV + j]
            else:
                T.clear(b_state)
            for step in T.unroll(ahead):
                if step < n_chunks:
                    start = chunk_of(step, n_chunks) * C
                    io.load_slots(perm, slots, first_row + start, n_rows - start, tx, C, BV)
                    fetch(
                        step, x, z, y, P, decay, perm, b_x, b_z, b_y, b_P, b_decay, b_slots, slots, first_row, n_rows,
                        n_chunks, first_chunk, i_h, i_v, tx,
                    )  # fmt: skip
                T.ptx_commit_group()
            for step in T.serial(n_chunks):
                at = step % STAGES
                io.arrive(STAGES - 2)
                T.copy(b_state, b_low)
                io.fence()
                for i, j in T.Parallel(K, BV):
                    b_state[i, j] *= b_decay[at, i]
                T.sync_threads()
                mma.start(b_x[at, :, :], b_low, b_out, clear_accum=True, policy=by_columns)
                mma.start(b_P[at, :, :], b_y[at, :, :], b_out, transpose_A=REVERSE, policy=by_columns)
                mma.start(b_z[at, :, :], b_y[at, :, :], b_state, transpose_A=True, policy=by_rows)
                if step + ahead < n_chunks:
                    take_slots(b_slots, (step + ahead) % STAGES, slots, tx)
                    fetch(
                        step + ahead, x, z, y, P, decay, perm, b_x, b_z, b_y, b_P, b_decay, b_slots, slots, first_row,
                        n_rows, n_chunks, first_chunk, i_h, i_v, tx,
                    )  # fmt: skip
                T.ptx_commit_group()
                if step > 0:
                    store_out(b_rows, out, step - 1, n_chunks, first_row, n_rows, i_h, i_v, tx)
                    if KEEPS:
                        boundary = first_boundary + chunk_of(step, n_chunks)
                        io.store_state(b_low, at_boundaries, boundary, i_h, i_v * BV, tx, K, BV)
                mma.finish(0)
                mma.settle(b_out, C, BV)
                mma.settle(b_state, K, BV)
                T.sync_threads()
                T.copy(b_out, b_rows)
            if n_chunks > 0:
                T.sync_threads()
                store_out(b_rows, out, n_chunks - 1, n_chunks, first_row, n_rows, i_h, i_v, tx)
            if HAS_LAST:
                for i, j in T.Parallel(K, BV):
                    last_state[i_state, i_h, i, i_v * BV + j] = b_state[i, j]

    return gla_joint_walk


def run(
    call: Call, tensors: "Mapping[str, torch.Tensor]", rows: tuple[str, str, str], states: str, ends: tuple[str, str],
    out: str, *, reverse: bool,
) -> None:  # fmt: skip
    """Walks with the tensors of these names: `rows` x, z and y; `states` is written where a backward pass follows;
    `ends` are the state it starts from and the one it leaves."""
    keeps = call.sizes.problem.trains
    values = common.walk_constants(
        call, HAS_FIRST=ends[0] in tensors, HAS_LAST=ends[1] in tensors, KEEPS=keeps, REVERSE=reverse
    )
    tables = ("perm", "segment_rows", "segment_chunks", "segment_boundaries", "decay", "P")
    present = {role: tensors[name] for role, name in zip(("first_state", "last_state"), ends) if name in tensors}
    arguments = dict(
        **common.row_arguments(call, tensors, *tables),
        **present,
        **{role: tensors[name] for role, name in zip("xzy", rows)},
        **({"at_boundaries": tensors[states]} if keeps else {}),
        out=tensors[out],
    )
    kernel = dataclasses.replace(common.program(MODULE, "factory", values), own_barriers=True)
    common.launch_walk(call, kernel, arguments)
