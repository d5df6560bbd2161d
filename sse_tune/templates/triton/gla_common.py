"""What the GLA kernels share: gates along a chunk, and the exact product of decays e^(b_i - b_j) by halves.

b falls along a chunk, so e^(b_i - b_j) for i > j is at most 1 but e^(-b_j) alone overflows. Split a block of S rows in
two halves and let r be b at the last row of the first: for i in the second and j in the first

    e^(b_i - b_j) = e^(b_i - r) e^(r - b_j),   both exponents at most 0 for any gates.

One tile E_S, e^(b - r) in second halves and e^(r - b) in first ones, serves all blocks of S rows at once, as factors of
a dot of which only the pairs (second half, first half) of one block are kept. The exponents are sums of log-gates, and
a product with a matrix of ones and zeros takes them. S = C, C/2, ..., 2 cover every pair i > j
once; pairs i = j have no decay. So there is nothing to clamp, and no loop over rows. Blocks of 16 rows may
instead take one reference in their middle, where exponents of both signs stay within 40 nats.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from sse_tune.device import Device
from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint
from sse_tune.templates.registry import Call
from sse_tune.templates.triton.common import (
    item_bytes,
    key_tile,
    load_rows,
    log_gate,
    tile_width,
    value_tile,
)

MODULE = "sse_tune.templates.triton.gla_common"

MIDPOINT_LEVELS = tl.constexpr(4)  # blocks of 16 rows
MIDPOINT_NATS = tl.constexpr(40.0)  # e^80, the largest product, times any operands is a finite fp32


def walk_smem_bytes(problem: Problem, config: Config, device: Device, key_tiles: int) -> int:
    """Shared memory a walk along a segment asks for: in flight `key_tiles` tiles C·K of q and k, one of fp32 gates, and
    of those that a dot reads in place, C·BV and C·C, one more; then a tile C·K on its way from one layout to another,
    or as operands, and the state as an operand."""
    c, bk, item = int(config["chunk_size"]), key_tile(problem), item_bytes(problem)
    bv = int(config["block_v"])
    stages, in_place = int(config["num_stages"]), item * (c * bv + c * c)
    flight = (stages - 1) * (key_tiles * item + 4) * c * bk + stages * in_place
    operands = max(4, key_tiles * item) * c * bk + item * bk * bv
    # Blackwell's dots take both operands from shared memory
    return flight + operands + (item * c * bk if device.capability >= 100 else 0) + 8192


def walk_constraints(key_tiles: int) -> tuple[Constraint, ...]:
    """The constraints of a kernel that walks along a segment with block_v columns of a state in registers."""
    return (
        tile_width("block_v", value_tile),
        # beyond 128 fp32 a thread the state alone spills
        Constraint("K * block_v / (32 * num_warps) <= 128",
                   lambda p, c, d: key_tile(p) * c["block_v"] <= 128 * 32 * c["num_warps"]),
        # b, an exponential and the rows are held at once, in fp32
        Constraint("chunk_size * K / (32 * num_warps) <= 64",
                   lambda p, c, d: c["chunk_size"] * key_tile(p) <= 64 * 32 * c["num_warps"]),
        Constraint("the tiles in flight fit in shared memory",
                   lambda p, c, d: walk_smem_bytes(p, c, d, key_tiles) <= d.smem_per_block_bytes),
    )


def split_arguments(call: Call) -> dict[str, Any]:
    """How the pairs of a chunk are taken: LEVELS levels of halves, the smallest of them about their middles or not."""
    return dict(MIDPOINT=call.config["diagonal"] == "midpoint", LEVELS=call.sizes.chunk_size.bit_length() - 1)


@triton.jit
def gate_parts(p_g, b_head, m_write, o_k, K: tl.constexpr, BK: tl.constexpr):
    """The log-gates of a chunk as a sum of two fp16 tiles, 22 bits; rows that do not write keep the state."""
    b_g = log_gate(load_rows(p_g, b_head, m_write, o_k, K, BK), m_write[:, None])
    b_high = b_g.to(tl.float16)
    return b_high, (b_g - b_high.to(tl.float32)).to(tl.float16)


@triton.jit
def gate_sums(m_rows, b_high, b_low):
    """Row i: the sum of the log-gates of the rows j where m_rows[i, j]. No differences are taken, so none loses digits,
    and the tensor cores add faster than a scan along rows would."""
    b_ones = m_rows.to(tl.float16)
    return tl.dot(b_ones, b_high) + tl.dot(b_ones, b_low)


@triton.jit
def gates_up_to(b_high, b_low, C: tl.constexpr):
    """b, the sum up to and with each row."""
    o_c = tl.arange(0, C)
    return gate_sums(o_c[:, None] >= o_c[None, :], b_high, b_low)


@triton.jit
def gates_after(b_high, b_low, C: tl.constexpr):
    """b_C - b, the sum after each row."""
    o_c = tl.arange(0, C)
    return gate_sums(o_c[:, None] < o_c[None, :], b_high, b_low)


@triton.jit
def gates_in_all(b_high, b_low):
    """b_C, the sum over the chunk, [BK]."""
    return tl.sum(b_high.to(tl.float32) + b_low.to(tl.float32), 0)


@triton.jit
def walk_gates(p_g, b_head, m_write, o_k, C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr):
    """b [C, BK], b_C - b [C, BK] and b_C [BK] for a walk along a segment.

    There a scan along rows and a difference are cheaper than products, which would tie the layout of the rows to that
    of the state; the digits that strong gates take from the difference matter to fp32 alone."""
    if EXACT:
        b_high, b_low = gate_parts(p_g, b_head, m_write, o_k, K, BK)
        b_b, b_rest = gates_up_to(b_high, b_low, C), gates_after(b_high, b_low, C)
        b_end = gates_in_all(b_high, b_low)
    else:
        b_g = load_rows(p_g, b_head, m_write, o_k, K, BK)
        b_b = tl.cumsum(log_gate(b_g, m_write[:, None]), 0)
        b_end = tl.sum(tl.where(tl.arange(0, C)[:, None] == C - 1, b_b, 0.0), 0)
        b_rest = b_end[None, :] - b_b
    return b_b, b_rest, b_end


@triton.jit
def in_second(i_half, C: tl.constexpr):
    """Which rows lie in the second half of their block, [C, 1]; a half has 2**i_half rows."""
    return (((tl.arange(0, C) >> i_half) & 1) == 1)[:, None]


@triton.jit
def half_exponent(b_high, b_low, i_half, C: tl.constexpr):
    """The logarithm of E_S of the module's docstring for halves of 2**i_half rows, [C, BK]."""
    o_c = tl.arange(0, C)
    m_half = (o_c >> i_half)[:, None] == (o_c >> i_half)[None, :]
    # up to row i in second halves, after it in first ones
    m_order = in_second(i_half, C) == (o_c[:, None] >= o_c[None, :])
    return gate_sums(m_half & m_order, b_high, b_low)


@triton.jit
def half_pairs(i_half, C: tl.constexpr):
    """[C, C], where two rows lie in the two halves of one block."""
    b_half = tl.arange(0, C) >> i_half
    return (b_half[:, None] ^ b_half[None, :]) == 1


@triton.jit
def wide_operand(b_x, dtype: tl.constexpr):
    """An operand with the range of fp32: fp16 has not got it, so the dot takes fp32, that is tf32."""
    if dtype == tl.float16:
        return b_x.to(tl.float32)
    else:
        return b_x.to(dtype)
