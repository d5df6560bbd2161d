"""What walks by specialized warps share: warps that copy and store beside those that multiply, and where they meet.

A step of a walk is a chain of products, each of which waits for the one before. Addresses, copies and stores are as
many instructions again, and in the same warps they stand in that chain. Here warps of their own have them, behind the
others in the block: the producers are ahead of the consumers' chain by as many chunks as there are slots, and meet them
at named barriers. At most of them one side only arrives and goes on:

    READY    the chunk's tiles are there, and what was to be stored has been read: the consumers wait
    STATE    the state of the step is there as an operand, and the chunk before is done with: the producers wait
    VALUES   the rows of the step are there, which the producers are to store: the producers wait
    OWN      consumers among themselves        COPIED   producers among themselves        LAST   all, once, at the end

A side that arrived at a barrier twice without the other between would open it alone. It cannot: each side waits for the
other once a step.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param
from sse_tune.templates.registry import Call
from sse_tune.templates.tilelang import common

MODULE = "sse_tune.templates.tilelang.specialized"
READY, STATE, VALUES, OWN, COPIED, LAST = 3, 4, 5, 6, 7, 8  # 0 is __syncthreads', 1 and 2 are sums'
PARAMS = (
    Param("block_v", (32, 64, 128), 64, "columns of the state one block keeps"),
    Param("num_warps", (4, 8), 4, "warps per block that multiply, four to a warpgroup"),
    Param("copy_warps", (4, 8), 8, "warps beside them that copy and store"),
    Param("num_stages", (2, 3), 2, "chunks in shared memory"),
)


def consumer_registers(consumers: int, producers: int) -> int:
    """Of a thread that multiplies; the producers hand over what they do not need."""
    warpgroups, multiplying = (consumers + producers) // 128, consumers // 128
    if warpgroups == 2:
        return 255
    all_registers = 65536 // (128 * warpgroups) // 8 * 8 * warpgroups
    return min(240, (all_registers - producers // 128 * _producer_registers(consumers)) // multiplying // 8 * 8)


def _producer_registers(consumers: int) -> int:
    return 128 if consumers == 128 else 96


REGISTERS = Constraint(
    "(K + 2 * chunk_size) * block_v / (32 * num_warps) <= registers of a thread that multiplies - 63",
    lambda p, c, d: (p.head_dim + 2 * c["chunk_size"]) * c["block_v"]
    <= (consumer_registers(32 * int(c["num_warps"]), 32 * int(c["copy_warps"])) - 63) * 32 * c["num_warps"],
)


def smem_bytes(problem: Problem, config: Config, operands: int, scaled: int = 0, states: int = 0) -> int:
    """Of a walk with two tiles of keys, two of scores, one of values and `states` of the state in each slot; `operands`
    tiles C·BV that a step makes, `scaled` that are made for it, twice each; six numbers a row."""
    c, bv = int(config["chunk_size"]), int(config["block_v"])
    made = 2 * scaled * c + states * int(config["num_stages"]) * problem.key_dim
    walk = common.walk_smem_bytes(problem, config, keys=2, squares=2, values=1, operands=operands)
    return walk + common.item_bytes(problem) * made * bv + 2 * 3 * 4 * c


def roles(T: Any, consumers: int, producers: int, capability: int) -> SimpleNamespace:
    """The macros of the two sides. What is named by a number the compilers do not know for a barrier, so barriers of
    the warp, which they do know, keep reads and writes of shared memory on their side of it."""
    threads = consumers + producers
    trades = threads > 256 and capability >= 90

    @T.macro
    def consume():
        """The thread takes the registers that the producers leave."""
        if trades:
            T.set_max_nreg(consumer_registers(consumers, producers), 1)

    @T.macro
    def produce():
        if trades:
            T.set_max_nreg(_producer_registers(consumers), 0)

    @T.macro
    def arrive(number):
        T.sync_warp()
        T.named_barrier_arrive(number, threads)

    @T.macro
    def wait(number, count):
        T.sync_warp()
        T.sync_threads(number, count)
        T.sync_warp()

    return SimpleNamespace(consume=consume, produce=produce, arrive=arrive, wait=wait, all=threads)


def chunks(
    T: Any, io: SimpleNamespace, producers: int, lanes: int, heads: int, C: int, K: int, V: int, BV: int
) -> SimpleNamespace:
    """What producers copy of a chunk. Rows are gathered by their tokens in two steps, so that addresses are there
    before the slot is free: `locate`, then `fetch_keys` and `gather`."""

    @T.macro
    def load_slots(perm, slots_k, slots_v, first, n_left, tx):
        io.load_slots(perm, slots_k, first, n_left, tx, C, K)
        io.load_slots(perm, slots_v, first, n_left, tx, C, BV)

    @T.macro
    def locate_rows(slots, places, i_h, column, tx, width, whole):
        """Where the rows that this thread copies begin, by their slots; `whole` is the width of a row."""
        for p in T.unroll(C * width // (producers * common.VECTOR)):
            o_d = (p * producers + tx) % (width // common.VECTOR) * common.VECTOR
            token = T.Cast("int64", T.truncdiv(slots[p], lanes))
            places[p] = (token * heads + i_h) * whole + column + o_d

    @T.macro
    def locate(slots_k, slots_v, at_k, at_v, i_h, i_v, tx):
        locate_rows(slots_k, at_k, i_h, 0, tx, K, K)
        locate_rows(slots_v, at_v, i_h, i_v * BV, tx, BV, V)

    def piece(tile, at, p, tx, width):
        i = p * producers + tx
        return tile[at, i // (width // common.VECTOR), i % (width // common.VECTOR) * common.VECTOR]

    @T.macro
    def gather(source, tile, at, places, tx, width):
        """A tile of rows."""
        for p in T.unroll(C * width // (producers * common.VECTOR)):
            T.ptx_cp_async(
                T.access_ptr(piece(tile, at, p, tx, width), "w", common.VECTOR),
                T.access_ptr(source[0, 0, places[p]], "r", common.VECTOR),
                common.VECTOR,
            )

    @T.macro
    def gather_or_zero(source, tile, at, places, n_left, tx, width):
        """A tile of rows; those past the end are 0."""
        for p in T.unroll(C * width // (producers * common.VECTOR)):
            T.ptx_cp_async(
                T.access_ptr(piece(tile, at, p, tx, width), "w", common.VECTOR),
                T.access_ptr(source[0, 0, places[p]], "r", common.VECTOR),
                common.VECTOR,
                predicate=(p * producers + tx) // (width // common.VECTOR) < n_left,
            )

    @T.macro
    def fetch_keys(q, k, shared_q, shared_k, b_q, b_k, at, at_k, is_shared, tx):
        if is_shared:
            gather(shared_k, b_k, at, at_k, tx, K)
            gather(shared_q, b_q, at, at_k, tx, K)
        else:
            gather(k, b_k, at, at_k, tx, K)
            gather(q, b_q, at, at_k, tx, K)

    @T.macro
    def fetch_scores(P, Ag, k_scale, q_scale, g_cumsum, b_P, b_Ag, b_a, b_c, b_b, at, first, n_left, i_h, tx):
        io.copy_by_head(P, b_P, at, first, n_left, i_h, 0, tx, C, C)
        io.copy_by_head(Ag, b_Ag, at, first, n_left, i_h, 0, tx, C, C)
        io.copy_scalars(k_scale, b_a, at, first, n_left, i_h, tx, C)
        io.copy_scalars(q_scale, b_c, at, first, n_left, i_h, tx, C)
        io.copy_scalars(g_cumsum, b_b, at, first, n_left, i_h, tx, C)

    return SimpleNamespace(
        load_slots=load_slots, locate=locate, gather=gather, gather_or_zero=gather_or_zero, fetch_keys=fetch_keys,
        fetch_scores=fetch_scores,
    )  # fmt: skip


def launch(call: Call, module: str, values: dict[str, Any], arguments: dict[str, Any]) -> None:
    """A block for each block_v columns of V, each head and segment."""
    copy_warps = int(call.config["copy_warps"])
    kernel = common.program(module, "factory", {**values, "PRODUCERS": 32 * copy_warps})
    kernel = dataclasses.replace(kernel, sources=(*kernel.sources, MODULE), own_barriers=True)
    config = Config({**call.config, "num_warps": int(call.config["num_warps"]) + copy_warps})
    common.launch_walk(dataclasses.replace(call, config=config), kernel, arguments)
