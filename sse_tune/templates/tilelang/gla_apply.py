"""GLA's rows from a state: the output of a chunk, and the gradient of its values; one kernel for both.

With x the decayed rows, S the state on their side of the chunk, and y the values of the other rows:

    O = qg S + P V,  S before the chunk            dV = kg dS + Pᵀ dO,  dS after it

A block takes a chunk, head and block_v columns, and asks for all of its tiles at once: what overlaps are the blocks of
a multiprocessor. The first product runs while scores and values still arrive. Rows of y past the end of a chunk are 0.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.registry import Call
from sse_tune.templates.tilelang import common

if TYPE_CHECKING:
    import torch

MODULE = "sse_tune.templates.tilelang.gla_apply"


def smem_bytes(problem: Problem, config: Config) -> int:
    """Rows, state, scores and values; a KiB of alignment."""
    c, k, bv = int(config["chunk_size"]), problem.head_dim, int(config["block_v"])
    return common.item_bytes(problem) * (c * k + k * bv + c * c + c * bv) + 1024


SPACE = Space(
    params=(
        Param("block_v", (32, 64, 128), 128, "columns of V in one block"),
        Param("num_warps", (4, 8), 4, "warps per block, four to a warpgroup"),
    ),
    constraints=(
        *common.OPERANDS,
        common.IO_STATES,
        *common.block_v_constraints(),
        # beyond that the sum alone spills
        Constraint("chunk_size * block_v / (32 * num_warps) <= 128",
                   lambda p, c, d: c["chunk_size"] * c["block_v"] <= 128 * 32 * c["num_warps"]),
        Constraint("the tiles fit in shared memory", lambda p, c, d: smem_bytes(p, c) <= d.smem_per_block_bytes),
    ),
)


def factory(
    H: int, K: int, V: int, C: int, L: int, DTYPE: str, THREADS: int, BV: int, PARTITIONS: int, HAS_SHARED: bool,
    HAS_END: bool, AFTER: bool, CAPABILITY: int,
) -> Any:  # fmt: skip
    import tilelang.language as T

    io = common.copies(T, THREADS, L, CAPABILITY)
    mma = common.products(T, THREADS, CAPABILITY)
    NV = V // BV
    by_columns = T.GemmWarpPolicy.FullCol
    R, S, M, B, N = (T.dynamic(name, "int64") for name in ("R", "S", "M", "B", "N"))

    @T.prim_func
    def gla_apply(
        x: T.Tensor((H, M, K), DTYPE),
        y: T.Tensor((R, H, V), DTYPE),
        P: T.Tensor((H, M, C), DTYPE),
        states: T.Tensor((B, H, K, V), DTYPE),
        end_state: T.Tensor((S, H, K, V), "float32"),
        out: T.Tensor((M, H, V), DTYPE),
        perm: T.Tensor((M,), "int32"),
        chunk_table: T.Tensor((N, 5), "int32"),
        n_sequences: T.int32,
        n_blocks: T.int32,
    ):
        with T.Kernel(n_blocks, threads=THREADS) as block:
            tx = T.get_thread_binding()
            i_v = block % NV
            i_h = block // NV % H
            i_c = block // (NV * H)
            b_x = T.alloc_shared((1, C, K), DTYPE)
            b_s = T.alloc_shared((1, K, BV), DTYPE)
            b_P = T.alloc_shared((1, C, C), DTYPE)
            b_y = T.alloc_shared((1, C, BV), DTYPE)  # then the result
            b_out = T.alloc_fragment((C, BV), "float32")
            slots = T.alloc_local((io.passes(C, BV),), "int32")

            i_seg = chunk_table[i_c, 0]
            first = chunk_table[i_c, 1]
            n_rows = chunk_table[i_c, 2]
            i_boundary = chunk_table[i_c, 4 if AFTER else 3]
            if i_seg >= 0:
                i_state = common.state_index(T, i_seg, n_sequences, PARTITIONS, HAS_SHARED)
                io.load_slots(perm, slots, first, n_rows, tx, C, BV)
                io.copy_by_head(x, b_x, 0, first, n_rows, i_h, 0, tx, C, K)
                if i_boundary >= 0:
                    io.copy_state(states, b_s, 0, i_boundary, i_h, i_v * BV, tx, K, BV)
                elif HAS_END:
                    for i, j in T.Parallel(K, BV):
                        b_s[0, i, j] = end_state[i_state, i_h, i, i_v * BV + j]
                else:
                    for i, j in T.Parallel(K, BV):
                        b_s[0, i, j] = 0.0
                T.ptx_commit_group()
                io.copy_by_head(P, b_P, 0, first, n_rows, i_h, 0, tx, C, C)
                io.gather_or_zero(y, b_y, 0, slots, i_h, i_v * BV, n_rows, tx, C, BV)
                T.ptx_commit_group()
                io.arrive(1)
                mma.start(b_x[0, :, :], b_s[0, :, :], b_out, clear_accum=True, policy=by_columns)
                mma.finish(0)
                mma.settle(b_out, C, BV)
                io.arrive(0)
                mma.start(b_P[0, :, :], b_y[0, :, :], b_out, transpose_A=AFTER, policy=by_columns)
                mma.finish(0)
                mma.settle(b_out, C, BV)
                T.sync_threads()
                T.copy(b_out, b_y[0, :, :])
                T.sync_threads()
                io.store_rows(b_y, out, first, n_rows, i_h, i_v * BV, tx, C, BV)

    return gla_apply


def run(
    call: Call, tensors: "Mapping[str, torch.Tensor]", x: str, y: str, states: str, end: str, out: str, *, after: bool
) -> None:
    """Runs with the tensors of these names; `end`: the call's state at the segment's end, if it has one."""
    problem, block_v = call.sizes.problem, int(call.config["block_v"])
    values = common.constants(
        call, BV=block_v, PARTITIONS=problem.partitions, HAS_SHARED=problem.shared, HAS_END=end in tensors, AFTER=after
    )
    blocks = call.sizes.chunks * problem.num_heads * (problem.value_dim // block_v)
    call.launch(
        common.program(MODULE, "factory", values),
        (blocks,),
        dict(
            **common.row_arguments(call, tensors, "P", "perm", "chunk_table"),
            **({"end_state": tensors[end]} if end in tensors else {}),
            x=tensors[x],
            y=tensors[y],
            states=tensors[states],
            out=tensors[out],
            n_blocks=blocks,
        ),
        num_warps=int(call.config["num_warps"]),
        num_stages=1,
    )
