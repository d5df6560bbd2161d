"""What a walk with its state in registers is made of: three kinds of warps, where they meet, and turned tiles.

A product takes its left operand from the registers of the warps that multiply. With columns of V along the rows of the
products, what one product leaves is the left operand of the next: the state and what is added to it never go through
shared memory, and a warp, which has ROWS columns of V for itself, waits for no other one.

Beside the warps that multiply, some copy chunks ahead and raise the gates, and some store what leaves the chain. It is
turned as it is put into shared memory, eight by eight numbers at once (stmatrix), and so are the tiles of rows that are
an operand (ldmatrix).

    READY    the chunk's tiles are there: those that multiply wait        FREE    the chunk before is done with
    MADE     what is to be stored is there: the storers wait              STORED  it has been read
    COPIED   among those that copy

Who only arrives goes on. Nobody arrives twice at a barrier without the other side between: each waits for the other
once a step.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param
from sse_tune.templates.registry import Call
from sse_tune.templates.tilelang import common, specialized

MODULE = "sse_tune.templates.tilelang.transposed"
ROWS = 16  # of a product by each warp
STORERS = 128  # threads
COPIER_REGISTERS, STORER_REGISTERS = 72, 72
READY, FREE, MADE, STORED, COPIED = 3, 4, 5, 6, 7  # 0 is __syncthreads', 1 and 2 are sums'
PARAMS = (
    Param("block_v", (64, 128), 64, "columns of the state one block keeps"),
    Param("num_warps", (4, 8), 4, "warps per block that multiply, four to a warpgroup"),
    Param("copy_warps", (4, 8), 8, "warps beside them that copy"),
    Param("num_stages", (2, 3), 3, "chunks in shared memory"),
)
PRELUDE = """
#include <tl_templates/cuda/ldsm.h>

__device__ __forceinline__ void put_turned(void* row, const void* operand, int first) {
  const int* numbers = reinterpret_cast<const int*>(operand) + first;
  tl::ptx_stmatrix_m8n8_x4_trans(row, numbers[0], numbers[1], numbers[2], numbers[3]);
}

__device__ __forceinline__ void take_turned(const void* row, void* operand, int first) {
  tl::ptx_ldmatrix_x4_trans(row, reinterpret_cast<int*>(operand) + first);
}
"""


def consumer_registers(consumers: int, copiers: int) -> int:
    """Of a thread that multiplies: what the others leave."""
    warpgroups = (consumers + copiers + STORERS) // 128
    every = 65536 // (128 * warpgroups) // 8 * 8 * warpgroups
    others = (copiers * COPIER_REGISTERS + STORERS * STORER_REGISTERS) // 128
    return min(240, (every - others) // (consumers // 128) // 8 * 8)


def _registers(problem: Problem, config: Config) -> int:
    """Of a thread that multiplies, at the most: the state twice, as sum and operand, two tiles C·BV and two operands of
    that size; and 32 for numbers of rows and addresses."""
    return (3 * problem.head_dim + 6 * int(config["chunk_size"])) // 4 + 32


CONSTRAINTS = (
    *common.OPERANDS,
    common.WHOLE_SEGMENTS,
    *common.block_v_constraints(),
    Constraint("warps that hand over registers, and stmatrix, need sm_90", lambda p, c, d: d.capability >= 90),
    Constraint("block_v must be 16 * num_warps, the rows of the warps' products",
               lambda p, c, d: c["block_v"] == ROWS * c["num_warps"]),
    Constraint("(3 * K + 6 * chunk_size) / 4 <= registers of a thread that multiplies - 32",
               lambda p, c, d: _registers(p, c) <= consumer_registers(
                   32 * int(c["num_warps"]), 32 * int(c["copy_warps"]))),
)  # fmt: skip


def meeting(T: Any, number: int, threads: int) -> SimpleNamespace:
    """A named barrier of so many threads. Compilers do not know that one orders memory, so barriers of the warp, which
    they do know, keep reads and writes of shared memory on their side of it."""

    @T.macro
    def arrive():
        T.sync_warp()
        T.named_barrier_arrive(number, threads)

    @T.macro
    def wait():
        T.sync_warp()
        T.sync_threads(number, threads)
        T.sync_warp()

    return SimpleNamespace(arrive=arrive, wait=wait)


def meetings(T: Any, consumers: int, copiers: int) -> SimpleNamespace:
    """All of them, by name."""
    threads = dict(
        ready=(READY, consumers + copiers), free=(FREE, consumers + copiers), made=(MADE, consumers + STORERS),
        stored=(STORED, consumers + STORERS), copied=(COPIED, copiers),
    )  # fmt: skip
    return SimpleNamespace(**{name: meeting(T, *of) for name, of in threads.items()})


def registers(T: Any, consumers: int, copiers: int) -> SimpleNamespace:
    """Each kind of warps takes its share of the registers."""

    @T.macro
    def consume():
        T.set_max_nreg(consumer_registers(consumers, copiers), 1)

    @T.macro
    def copy():
        T.set_max_nreg(COPIER_REGISTERS, 0)

    @T.macro
    def store():
        T.set_max_nreg(STORER_REGISTERS, 0)

    return SimpleNamespace(consume=consume, copy=copy, store=store)


def turns(T: Any) -> SimpleNamespace:
    """Between operands [block_v, width], of which a warp has ROWS rows, and tiles [width, block_v]."""

    def place(tile, b, thread, at=None):
        """This thread's row of the four 8 x 8 matrices that are the warp's of 16 rows of a tile, from row 16 b on."""
        row = b * 16 + thread % 32 // 16 * 8 + thread % 8
        column = thread // 32 * ROWS + thread // 8 % 2 * 8
        return tile[row, column] if at is None else tile[at, row, column]

    @T.macro
    def put(operand, tile, width, thread):
        for b in T.unroll(width // 16):
            T.call_extern("handle", "put_turned", T.access_ptr(place(tile, b, thread), "w", 8), operand.data, 4 * b)

    @T.macro
    def take(tile, at, operand, width, thread):
        for b in T.unroll(width // 16):
            T.call_extern(
                "handle", "take_turned", T.access_ptr(place(tile, b, thread, at), "r", 8), operand.data, 4 * b
            )

    return SimpleNamespace(put=put, take=take)


def launch(call: Call, module: str, values: dict[str, Any], arguments: dict[str, Any]) -> None:
    """A block for each block_v columns of V, each head and segment."""
    copy_warps = int(call.config["copy_warps"])
    kernel = common.program(module, "factory", {**values, "COPIERS": 32 * copy_warps})
    kernel = dataclasses.replace(
        kernel, sources=(*kernel.sources, specialized.MODULE, MODULE), own_barriers=True
    )
    warps = int(call.config["num_warps"]) + copy_warps + STORERS // 32
    common.launch_walk(dataclasses.replace(call, config=Config({**call.config, "num_warps": warps})), kernel, arguments)
