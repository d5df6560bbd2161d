"""What the TileLang kernels share: copies of gathered rows and of tiles into shared memory, and their constraints.

Every copy is cp.async of 16 bytes a thread (4 for scalars) into a slot of shared memory, some chunks ahead of its use.
Rows past the end of a chunk copy the chunk's last row again: what comes of them is finite, and is masked where it would
be added to a row's or stored. No copy ever reads past a segment, so nothing but the rows a stage owns is touched.

A factory imports TileLang itself: listing the templates must not load a compiler. Its module has no
`from __future__ import annotations`: TileLang reads the annotations of a kernel as they are evaluated.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint
from sse_tune.templates.buffers import ITEM_BYTES
from sse_tune.templates.registry import Call, Program

if TYPE_CHECKING:
    import torch

MODULE = "sse_tune.templates.tilelang.common"
VECTOR = 8  # 16-bit values of one copy
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}

OPERANDS = (
    Constraint("TileLang templates need 16-bit operands", lambda p, c, d: p.dtype in DTYPES),
    # operand tiles are cut into blocks of 64 columns, the width of the swizzle
    Constraint("K must be a multiple of 64", lambda p, c, d: p.head_dim % 64 == 0),
    # fewer rows would leave part of every tensor-core instruction idle
    Constraint("chunk_size must be 64 or 128", lambda p, c, d: c["chunk_size"] in (64, 128)),
)


# copies do not convert, nor does what is stored from a tile
IO_STATES = Constraint("stored states must be of the problem's dtype", lambda p, c, d: c["state_dtype"] == "io")
WHOLE_SEGMENTS = Constraint("TileLang's walks go along whole segments, not groups", lambda p, c, d: c["split"] == 0)


def block_v_constraints() -> tuple[Constraint, ...]:
    """The bounds of a parameter that cuts V into tiles."""
    return (Constraint("block_v must divide V", lambda p, c, d: p.value_dim % c["block_v"] == 0),)


def item_bytes(problem: Problem) -> int:
    return ITEM_BYTES[problem.dtype]


def constants(call: Call, **more: int | float | str | bool) -> dict[str, int | float | str | bool]:
    """What every kernel's code depends on, and more of its own."""
    problem = call.sizes.problem
    return {
        "H": problem.num_heads, "K": problem.key_dim, "V": problem.value_dim, "C": call.sizes.chunk_size,
        "L": problem.lanes, "DTYPE": DTYPES[problem.dtype], "THREADS": 32 * int(call.config["num_warps"]), **more,
    }  # fmt: skip


def program(module: str, factory: str, values: Mapping[str, int | float | str | bool]) -> Program:
    return Program(module, factory, tuple(sorted(values.items())), (module, MODULE))


def walk_constants(call: Call, **more: int | float | str | bool) -> dict[str, int | float | str | bool]:
    """`constants` of a kernel that walks along a segment with block_v columns of its state."""
    problem = call.sizes.problem
    return constants(
        call, BV=int(call.config["block_v"]), STAGES=int(call.config["num_stages"]), PARTITIONS=problem.partitions,
        HAS_SHARED=problem.shared, **more,
    )  # fmt: skip


def launch_walk(call: Call, kernel: Program, arguments: dict[str, Any]) -> None:
    """A block for each block_v columns of V, each head and segment."""
    problem = call.sizes.problem
    blocks = call.sizes.segments * problem.num_heads * (problem.value_dim // int(call.config["block_v"]))
    call.launch(
        kernel,
        (blocks,),
        dict(arguments, n_blocks=blocks),
        num_warps=int(call.config["num_warps"]),
        num_stages=int(call.config["num_stages"]),
    )


def row_arguments(call: Call, tensors: "Mapping[str, torch.Tensor]", *names: str) -> dict[str, Any]:
    """Tensors of these names, and the numbers every kernel takes."""
    problem = call.sizes.problem
    return dict(
        **{name: tensors[name] for name in names},
        M=call.sizes.rows,
        n_shared=problem.sequences if problem.shared else 0,
        n_sequences=problem.sequences,
    )


def streams(tensors: "Mapping[str, torch.Tensor]", *names: str) -> dict[str, Any]:
    """The sparse and the always-on stream's tensor of each name."""
    return {full: tensors[full] for name in names for full in (name, f"shared_{name}")}


def walk_smem_bytes(problem: Problem, config: Config, keys: int, squares: int, values: int, operands: int) -> int:
    """Shared memory of a walk: in each slot `keys` tiles C·K, `squares` tiles C·C, `values` tiles C·BV and three
    numbers a row; the state as an operand, and `operands` tiles C·BV that a step makes; a KiB of alignment."""
    c, k, bv = int(config["chunk_size"]), problem.key_dim, int(config["block_v"])
    slot = item_bytes(problem) * (keys * c * k + squares * c * c + values * c * bv) + 3 * 4 * c
    made = item_bytes(problem) * (k * bv + operands * c * bv) + 4 * 4 * c
    return int(config["num_stages"]) * slot + made + 1024


def copies(T: Any, threads: int, lanes: int, capability: int) -> SimpleNamespace:
    """The macros of the copies, for blocks of `threads` threads. A tile of `rows` rows of `width` values is taken in
    passes of all threads, VECTOR values each."""
    has_proxies = capability >= 90

    def passes(rows: int, width: int) -> int:
        assert rows * width % (threads * VECTOR) == 0, (rows, width, threads)
        return rows * width // (threads * VECTOR)

    def element(tile: Any, row: Any, column: Any, at: Any = 0) -> Any:
        """Of a tile without slots, or of a slot it has."""
        return tile[row, column] if len(tile.shape) == 2 else tile[at, row, column]

    @T.macro
    def fence():
        """What this thread wrote to shared memory is seen by the tensor cores after the next barrier."""
        if has_proxies:
            T.fence_proxy_async()

    @T.macro
    def arrive(pending):
        """All threads' copies but those of the last `pending` groups are there for all threads."""
        T.ptx_wait_group(pending)
        fence()
        T.sync_threads()

    @T.macro
    def load_slots(perm, slots, first, n_left, tx, rows, width):
        """The slots of the rows that this thread copies; those past the end: of the last row."""
        for p in T.unroll(passes(rows, width)):
            row = (p * threads + tx) // (width // VECTOR)
            slots[p] = perm[T.Cast("int64", first + T.min(row, n_left - 1))]

    @T.macro
    def gather(source, tile, at, slots, i_h, column, tx, rows, width):
        """A tile of rows by their tokens."""
        for p in T.unroll(passes(rows, width)):
            i = p * threads + tx
            o_d = i % (width // VECTOR) * VECTOR
            token = T.Cast("int64", T.truncdiv(slots[p], lanes))
            T.ptx_cp_async(
                T.access_ptr(tile[at, i // (width // VECTOR), o_d], "w", VECTOR),
                T.access_ptr(source[token, i_h, column + o_d], "r", VECTOR),
                VECTOR,
            )

    @T.macro
    def gather_or_zero(source, tile, at, slots, i_h, column, n_left, tx, rows, width):
        """A tile of rows by their tokens; those past the end are 0."""
        for p in T.unroll(passes(rows, width)):
            i = p * threads + tx
            o_d = i % (width // VECTOR) * VECTOR
            token = T.Cast("int64", T.truncdiv(slots[p], lanes))
            T.ptx_cp_async(
                T.access_ptr(tile[at, i // (width // VECTOR), o_d], "w", VECTOR),
                T.access_ptr(source[token, i_h, column + o_d], "r", VECTOR),
                VECTOR,
                predicate=i // (width // VECTOR) < n_left,
            )

    @T.macro
    def copy_by_head(source, tile, at, first, n_left, i_h, column, tx, rows, width):
        """A tile of rows of a [H, M, *] tensor."""
        for p in T.unroll(passes(rows, width)):
            i = p * threads + tx
            o_d = i % (width // VECTOR) * VECTOR
            row = T.Cast("int64", first + T.min(i // (width // VECTOR), n_left - 1))
            T.ptx_cp_async(
                T.access_ptr(tile[at, i // (width // VECTOR), o_d], "w", VECTOR),
                T.access_ptr(source[i_h, row, column + o_d], "r", VECTOR),
                VECTOR,
            )

    @T.macro
    def copy_rows(source, tile, at, first, n_left, i_h, column, tx, rows, width):
        """A tile of rows of a [M, H, *] tensor."""
        for p in T.unroll(passes(rows, width)):
            i = p * threads + tx
            o_d = i % (width // VECTOR) * VECTOR
            row = T.Cast("int64", first + T.min(i // (width // VECTOR), n_left - 1))
            T.ptx_cp_async(
                T.access_ptr(tile[at, i // (width // VECTOR), o_d], "w", VECTOR),
                T.access_ptr(source[row, i_h, column + o_d], "r", VECTOR),
                VECTOR,
            )

    @T.macro
    def copy_state(source, tile, at, i_boundary, i_h, column, tx, rows, width):
        """Columns of a state of a [*, H, K, V] tensor."""
        for p in T.unroll(passes(rows, width)):
            i = p * threads + tx
            o_d = i % (width // VECTOR) * VECTOR
            T.ptx_cp_async(
                T.access_ptr(tile[at, i // (width // VECTOR), o_d], "w", VECTOR),
                T.access_ptr(
                    source[T.Cast("int64", i_boundary), i_h, i // (width // VECTOR), column + o_d], "r", VECTOR
                ),
                VECTOR,
            )

    @T.macro
    def copy_scalars(source, numbers, at, first, n_left, i_h, tx, rows):
        """One fp32 number a row of a [H, M] tensor."""
        if tx < rows:
            row = T.Cast("int64", first + T.min(tx, n_left - 1))
            T.ptx_cp_async(
                T.access_ptr(numbers[at, tx], "w", 1), T.access_ptr(source[i_h, row], "r", 1), 1
            )

    @T.macro
    def store_by_head(tile, target, first, n_left, i_h, column, tx, rows, width, at=0):
        """A tile of shared memory, or a slot of it, to rows of a [H, M, *] tensor."""
        for p in T.unroll(passes(rows, width)):
            i = p * threads + tx
            row = i // (width // VECTOR)
            o_d = i % (width // VECTOR) * VECTOR
            if row < n_left:
                for e in T.vectorized(VECTOR):
                    target[i_h, T.Cast("int64", first + row), column + o_d + e] = element(tile, row, o_d + e, at)

    @T.macro
    def store_state(tile, target, i_boundary, i_h, column, tx, rows, width):
        """A tile of shared memory to columns of a state of a [*, H, K, V] tensor."""
        for p in T.unroll(passes(rows, width)):
            i = p * threads + tx
            row = i // (width // VECTOR)
            o_d = i % (width // VECTOR) * VECTOR
            for e in T.vectorized(VECTOR):
                target[T.Cast("int64", i_boundary), i_h, row, column + o_d + e] = element(tile, row, o_d + e)

    @T.macro
    def store_rows(tile, target, first, n_left, i_h, column, tx, rows, width):
        """A tile of shared memory to rows of a [M, H, *] tensor."""
        for p in T.unroll(passes(rows, width)):
            i = p * threads + tx
            row = i // (width // VECTOR)
            o_d = i % (width // VECTOR) * VECTOR
            if row < n_left:
                for e in T.vectorized(VECTOR):
                    target[T.Cast("int64", first + row), i_h, column + o_d + e] = element(tile, row, o_d + e)

    return SimpleNamespace(
        passes=passes, fence=fence, arrive=arrive, load_slots=load_slots, gather=gather, gather_or_zero=gather_or_zero,
        copy_by_head=copy_by_head, copy_rows=copy_rows, copy_state=copy_state, copy_scalars=copy_scalars,
        store_rows=store_rows, store_by_head=store_by_head, store_state=store_state,
    )  # fmt: skip


def products(T: Any, threads: int, capability: int) -> SimpleNamespace:
    """Matrix products that run on while their threads do something else, where the tensor cores can: `start` takes the
    arguments of `T.gemm`, `finish(n)` waits for all but the last n started, and `settle` follows for each sum that is
    finished: without it a compiler could move the sum's next use before the wait."""
    is_asynchronous = capability == 90

    @T.macro
    def finish(pending):
        if is_asynchronous:
            T.wait_wgmma(pending)

    @T.macro
    def settle(fragment, rows, columns):
        if is_asynchronous:
            T.warpgroup_fence_operand(fragment, num_regs=rows * columns // threads)

    return SimpleNamespace(start=T.wgmma_gemm if is_asynchronous else T.gemm, finish=finish, settle=settle)


def state_index(T: Any, i_seg: Any, n_sequences: Any, partitions: int, has_shared: bool) -> Any:
    """Where a segment's state lies in [S, P, H, K, V]: segments 0..S-1 are the shared partition of each sequence."""
    if not has_shared or partitions == 1:
        return T.Cast("int64", i_seg)
    i_sparse = i_seg - n_sequences
    i_s = T.truncdiv(i_sparse, partitions - 1)
    i_own = i_sparse - i_s * (partitions - 1)
    return T.Cast(
        "int64", T.if_then_else(i_seg < n_sequences, i_seg * partitions, i_s * partitions + 1 + i_own)
    )
