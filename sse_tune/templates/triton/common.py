"""What the Triton kernels share: from chunk to rows, roles of rows, row scales, tiles with ragged edges.

Kernel conventions: `i_` index, `o_` offsets, `p_` pointer, `b_` block of values, `m_` mask; capitals are constexpr.
Offsets of rows are 64-bit: R·H·K passes 2**31 from a million tokens on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint
from sse_tune.templates.buffers import ITEM_BYTES
from sse_tune.templates.registry import Call

if TYPE_CHECKING:
    import torch

MODULE = "sse_tune.templates.triton.common"


# Columns of the narrowest tile. Triton 3.6 for sm_90 gives tiles of less than 128 bytes a narrower swizzle, and reads
# them transposed out of range or wrong; fp32 needs 64 columns all the same: docs/log.md, 2026-11-24.
NARROWEST_TILE = 64


def key_tile(problem: Problem) -> int:
    """Columns of a tile that covers K: a power of two, as tl.arange and tl.dot ask for."""
    return max(NARROWEST_TILE, triton.next_power_of_2(problem.key_dim))


def value_tile(problem: Problem) -> int:
    """Columns of a tile that covers V."""
    return max(NARROWEST_TILE, triton.next_power_of_2(problem.value_dim))


def tile_width(name: str, whole: Callable[[Problem], int]) -> Constraint:
    """The bounds of a parameter that cuts K or V into tiles."""
    return Constraint(
        f"{name} must be at least {NARROWEST_TILE}, and at most the power of two that covers the head size",
        lambda p, c, d: NARROWEST_TILE <= c[name] <= whole(p),
    )


# each of their dots is three of tf32, with operands of their own
FP32_ON_BLACKWELL = Constraint(
    "fp32 fits in Blackwell's tensor memory in chunks of at most 32",
    lambda p, c, d: d.capability < 100 or p.dtype != "fp32" or c["chunk_size"] <= 32,
)


# tf32 keeps ten bits, bf16x3 sixteen: on nearly parallel keys the inverse loses what is left of them
FP32_SOLVE = Constraint(
    "fp32 needs an fp32 solve", lambda p, c, d: p.dtype != "fp32" or c["solve_precision"] == "tf32x3"
)


def dot_precision(problem: Problem) -> str:
    """`input_precision` of the dots: fp32 operands keep fp32 accuracy in three tf32 products."""
    return "tf32x3" if problem.dtype == "fp32" else "tf32"


def row_arguments(call: Call, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments every chunk kernel takes: the rows' slots and the constants of the problem."""
    problem = call.sizes.problem
    return dict(
        perm=tensors["perm"],
        weights=tensors["weights"],
        M=call.sizes.rows,
        n_shared=problem.sequences if problem.shared else 0,
        H=problem.num_heads,
        K=problem.key_dim,
        C=call.sizes.chunk_size,
        L=problem.lanes,
        WRITERS=int(problem.shared) + problem.top_k,
        READERS=int(problem.shared) + problem.readers,
        NORM=problem.norm,
        PRECISION=dot_precision(problem),
    )


def streams(tensors: Mapping[str, torch.Tensor], *names: str) -> dict[str, Any]:
    """The sparse and the always-on stream's tensor of each name."""
    return {full: tensors[full] for name in names for full in (name, f"shared_{name}")}


def segment_arguments(call: Call, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The table of segments, for the walks along them."""
    problem = call.sizes.problem
    return dict(
        segment_rows=tensors["segment_rows"],
        segment_boundaries=tensors["segment_boundaries"],
        n_sequences=problem.sequences,
        PARTITIONS=problem.partitions,
        HAS_SHARED=problem.shared,
    )


def launch_walk(call: Call, kernel: Any, arguments: dict[str, Any]) -> None:
    """Launches a kernel that keeps block_v columns of a state: a block for each of them, each head, and segment or
    group."""
    problem, block_v = call.sizes.problem, int(call.config["block_v"])
    call.launch(
        kernel,
        (call.sizes.walks * problem.num_heads * triton.cdiv(problem.value_dim, block_v),),
        dict(arguments, V=problem.value_dim, BK=key_tile(problem), BV=block_v),
        num_warps=int(call.config["num_warps"]),
        num_stages=int(call.config["num_stages"]),
    )


def end_states(tensors: Mapping[str, torch.Tensor], first: str, last: str, *others: str) -> dict[str, Any]:
    """The states at a segment's two ends, which a call may be without, and what there is beside them."""
    stand_in = tensors["weights"]  # never read: a pointer must be some tensor's
    return {
        **{name: tensors.get(name, stand_in) for name in (first, last, *others)},
        "HAS_INITIAL": first in tensors,
        "HAS_FINAL": last in tensors,
    }


def gradient_arguments(call: Call, tensors: Mapping[str, torch.Tensor], *names: str) -> dict[str, Any]:
    """What the stages by chunk that write gradients take: the table of chunks, and where sparse and always-on rows go.

    The sparse rows' buffers stand in for the always-on stream's gradients, never written, when there is none."""
    return dict(
        chunk_table=tensors["chunk_table"],
        n_shared_rows=call.sizes.shared_rows,
        **{f"d{name}_rows": tensors[f"d{name}_rows"] for name in names},
        **{f"d_shared_{name}": tensors.get(f"d_shared_{name}", tensors[f"d{name}_rows"]) for name in names},
    )


def item_bytes(problem: Problem) -> int:
    return ITEM_BYTES[problem.dtype]


def scan_smem_bytes(problem: Problem, config: Config, row_tiles: int, tiles: int) -> int:
    """Shared memory a walk along a segment asks for: `row_tiles` tiles C·K, as many C·C and `tiles` tiles C·BV for each
    chunk in flight, and the operands: the state, and what a step makes."""
    c, bk = int(config["chunk_size"]), key_tile(problem)
    bv = int(config["block_v"])
    flight = int(config["num_stages"]) * (row_tiles * (c * bk + c * c) + tiles * c * bv)
    return item_bytes(problem) * (flight + bk * bv + c * c + 2 * c * bv) + 4096


def scan_constraints(row_tiles: int, tiles: int = 1) -> tuple[Constraint, ...]:
    """The constraints of a kernel that keeps block_v columns of a state in registers."""
    return (
        tile_width("block_v", value_tile),
        # beyond 64 fp32 a thread the state and the products beside it spill
        Constraint("K * block_v / (32 * num_warps) <= 64",
                   lambda p, c, d: key_tile(p) * c["block_v"] <= 64 * 32 * c["num_warps"]),
        Constraint("the tiles in flight fit in shared memory",
                   lambda p, c, d: scan_smem_bytes(p, c, row_tiles, tiles) <= d.smem_per_block_bytes),
        FP32_ON_BLACKWELL,
    )


@triton.jit
def chunk_slots(perm, first_row, n_rows, C: tl.constexpr):
    """Slots of a chunk's rows; 0 for those masked off, which all are where n_rows <= 0.

    A walk carries those of its next chunk from step to step. Loaded in one step with the rows that lie there, they are
    copied asynchronously behind the rows of the chunk before, and waiting for them is waiting for all: nothing would
    stay in flight."""
    o_c = tl.arange(0, C)
    return tl.load(perm + (tl.cast(first_row, tl.int64) + o_c), mask=o_c < n_rows, other=0)


@triton.jit
def rows_of(b_slot, first_row, n_rows, C: tl.constexpr, L: tl.constexpr):
    """Rows and tokens (64-bit), lanes and mask of a chunk of n_rows <= C rows in these slots."""
    o_c = tl.arange(0, C)
    b_token = b_slot // L
    return tl.cast(first_row, tl.int64) + o_c, b_token.to(tl.int64), b_slot - b_token * L, o_c < n_rows


@triton.jit
def chunk_rows(perm, first_row, n_rows, C: tl.constexpr, L: tl.constexpr):
    """Rows and tokens (64-bit), slots, lanes and mask of a chunk of n_rows <= C rows; those masked off have slot 0."""
    b_slot = chunk_slots(perm, first_row, n_rows, C)
    b_row, b_token, b_lane, m_row = rows_of(b_slot, first_row, n_rows, C, L)
    return b_row, b_slot, b_token, b_lane, m_row


@triton.jit
def chunk_entry(chunk_table, i_c):
    """Segment (-1: no such chunk), first row, rows, boundary before and after (-1: none) of a chunk."""
    p_entry = chunk_table + i_c.to(tl.int64) * 5
    return (
        tl.load(p_entry), tl.load(p_entry + 1), tl.load(p_entry + 2), tl.load(p_entry + 3), tl.load(p_entry + 4)
    )  # fmt: skip


@triton.jit
def walk_block(
    segment_rows, segment_boundaries, n_sequences,
    H: tl.constexpr, PARTITIONS: tl.constexpr, HAS_SHARED: tl.constexpr, NV: tl.constexpr,
):  # fmt: skip
    """What a block of `launch_walk` is: its tile of V, head and segment; the segment's first row, rows and first
    boundary; and where the segment's end states lie."""
    i_v = tl.program_id(0) % NV
    i_h = (tl.program_id(0) // NV) % H
    i_seg = tl.program_id(0) // (NV * H)
    first_row = tl.load(segment_rows + i_seg)
    n_rows = tl.load(segment_rows + i_seg + 1) - first_row
    i_state = state_index(i_seg, n_sequences, PARTITIONS, HAS_SHARED).to(tl.int64) * H + i_h
    return i_v, i_h, i_seg, first_row, n_rows, tl.load(segment_boundaries + i_seg), i_state


@triton.jit
def load_scalars(p_base, b_at, m_row):
    """One number a row of a [H, M] tensor, 0 where masked off; b_at = i_h * M + row."""
    return tl.load(p_base + b_at, mask=m_row, other=0.0)


@triton.jit
def load_gate_sums(g_cumsum, b_at, m_row, n_rows, C: tl.constexpr):
    """b of a chunk's rows and b of its last row, which the rows masked off repeat: no exponent is above 0 for them."""
    b_b = tl.load(g_cumsum + b_at, mask=m_row, other=0.0)
    b_last = tl.sum(tl.where(tl.arange(0, C) == n_rows - 1, b_b, 0.0), 0)
    return tl.where(m_row, b_b, b_last), b_last


@triton.jit
def row_scale(b_square, b_weight, NORM: tl.constexpr):
    """What multiplies a row of k (or q, then times `scale`), from its squared norm and router weight."""
    if NORM == "none":
        return b_weight
    elif NORM == "after":
        return b_weight * tl.rsqrt(b_square + 1e-6)
    else:
        return b_weight * tl.rsqrt(b_weight * b_weight * b_square + 1e-6)


@triton.jit
def row_scale_gradient(b_x, b_row, b_scale, b_weight, m_role, NORM: tl.constexpr):
    """From X, the gradient of the scaled row, to the gradients of the row and of its router weight.

    `b_scale` is `row_scale` of the row, without the attention scale. Never divides by the weight, which may be 0.
    """
    b_square = tl.sum(b_row * b_row, 1)
    b_dot = tl.sum(b_x * b_row, 1)
    if NORM == "none":
        b_grad = b_scale[:, None] * b_x
        b_weight_grad = b_dot
    elif NORM == "after":
        b_rho = tl.rsqrt(b_square + 1e-6)
        b_grad = b_scale[:, None] * (b_x - (b_rho * b_rho * b_dot)[:, None] * b_row)
        b_weight_grad = b_rho * b_dot
    else:
        b_rho = tl.rsqrt(b_weight * b_weight * b_square + 1e-6)
        b_grad = b_scale[:, None] * (b_x - (b_scale * b_scale * b_dot)[:, None] * b_row)
        b_weight_grad = b_dot * 1e-6 * b_rho * b_rho * b_rho
    return b_grad, tl.where(m_role, b_weight_grad, 0.0)


@triton.jit
def load_rows(p_base, b_row, m_row, o_d, D: tl.constexpr, BD: tl.constexpr):
    """A tile of rows of D contiguous values; rows masked off and columns past D read 0."""
    p_tile = p_base + b_row[:, None] * D + o_d[None, :]
    if D % BD == 0:
        return tl.load(p_tile, mask=m_row[:, None], other=0.0)
    else:
        return tl.load(p_tile, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def store_rows(p_base, b_tile, b_row, m_row, o_d, D: tl.constexpr, BD: tl.constexpr):
    """The inverse of `load_rows`."""
    p_tile = p_base + b_row[:, None] * D + o_d[None, :]
    if D % BD == 0:
        tl.store(p_tile, b_tile.to(p_base.dtype.element_ty), mask=m_row[:, None])
    else:
        tl.store(p_tile, b_tile.to(p_base.dtype.element_ty), mask=m_row[:, None] & (o_d < D)[None, :])


@triton.jit
def load_state(p_base, i_state, o_k, o_v, m_state, K: tl.constexpr, V: tl.constexpr):
    """Tile [BK, BV] of state number `i_state` (64-bit) of a [*, K, V] tensor; 0 unless m_state."""
    p_tile = p_base + i_state * (K * V) + o_k[:, None] * V + o_v[None, :]
    return tl.load(p_tile, mask=m_state & (o_k < K)[:, None] & (o_v < V)[None, :], other=0.0)


@triton.jit
def store_state(p_base, b_state, i_state, o_k, o_v, m_state, K: tl.constexpr, V: tl.constexpr):
    """The inverse of `load_state`."""
    p_tile = p_base + i_state * (K * V) + o_k[:, None] * V + o_v[None, :]
    m_tile = m_state & (o_k < K)[:, None] & (o_v < V)[None, :]
    tl.store(p_tile, b_state.to(p_base.dtype.element_ty), mask=m_tile)


@triton.jit
def state_beside(
    at_boundaries, at_end, i_boundary, i_state, i_h, o_k, o_v,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_END: tl.constexpr,
):  # fmt: skip
    """The state on one side of a chunk: that of a boundary, or at the segment's end the call's own, or 0."""
    m_inside = i_boundary >= 0
    i_inside = tl.where(m_inside, i_boundary, 0).to(tl.int64) * H + i_h
    b_state = load_state(at_boundaries, i_inside, o_k, o_v, m_inside, K, V)
    if HAS_END:
        b_state += load_state(at_end, i_state, o_k, o_v, i_boundary < 0, K, V).to(b_state.dtype)
    return b_state


@triton.jit
def state_index(i_seg, n_sequences, PARTITIONS: tl.constexpr, HAS_SHARED: tl.constexpr):
    """Where a segment's state lies in [S, P, H, K, V]: segments 0..S-1 are the shared partition of each sequence."""
    if HAS_SHARED:
        if PARTITIONS == 1:
            return i_seg
        else:
            i_sparse = i_seg - n_sequences
            i_s = i_sparse // (PARTITIONS - 1)
            i_own = i_sparse - i_s * (PARTITIONS - 1)
            return tl.where(i_seg < n_sequences, i_seg * PARTITIONS, i_s * PARTITIONS + 1 + i_own)
    else:
        return i_seg


@triton.jit
def decay(b_to, b_from, m_pair):
    """e^(to - from) where the mask holds, else 0; masked first, so that no exponent is above 0."""
    return tl.where(m_pair, tl.exp(tl.where(m_pair, (b_to - b_from).to(tl.float32), 0.0)), 0.0)


@triton.jit
def log_gate(b_g, m_write):
    """The log-gate of rows that write, 0 for the others. Below -128 e^g is 0 in fp32 either way, and a bounded
    gate keeps the digits of the sums it enters."""
    return tl.where(m_write, tl.maximum(b_g.to(tl.float32), -128.0), 0.0)


@triton.jit
def halves(b_x):
    """An fp32 tile as two of bf16 whose sum has sixteen of its bits."""
    b_high = b_x.to(tl.bfloat16)
    return b_high, (b_x - b_high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def dot_bf16x3(b_x, b_y):
    """The product of two fp32 tiles in three of their bf16 halves: sixteen bits of each. Written out, since Triton 3.6
    takes its own "bf16x3" apart in a layout that holds whole columns in every thread."""
    b_x_high, b_x_low = halves(b_x)
    b_y_high, b_y_low = halves(b_y)
    b_sum = tl.dot(b_x_low, b_y_high)
    b_sum = tl.dot(b_x_high, b_y_low, b_sum)
    return tl.dot(b_x_high, b_y_high, b_sum)


@triton.jit
def dot_fp32(b_x, b_y, PRECISION: tl.constexpr):
    """The product of two fp32 tiles to "bf16x3", "tf32x3" or "tf32"."""
    if PRECISION == "bf16x3":
        return dot_bf16x3(b_x, b_y)
    else:
        return tl.dot(b_x, b_y, input_precision=PRECISION)
