"""GLA's gates along a chunk, and the exact product of decays e^(b_i - b_j), in one step where the gates allow it.

b falls along a chunk, so e^(b_i - b_j) for i > j is at most 1 but e^(-b_j) alone overflows. Split a block of S rows in
two halves and let r be b at the last row of the first: for i in the second and j in the first

    e^(b_i - b_j) = e^(b_i - r) e^(r - b_j),   both exponents at most 0 for any gates.

One tile, e^(b - r) in second halves and e^(r - b) in first ones, serves all blocks of S rows at once, as factors of a
dot of which only the pairs (second half, first half) of one block are kept. S = C, C/2, ..., 2 cover every pair i > j
once; pairs i = j have no decay. So there is nothing to clamp, and no loop over rows.

Where all exponents of a level are within 40 nats, r serves every pair of a block: e^(b_i - r) of any sign meets
e^(r - b_j), the largest product of two is e^80, and the levels below are done with. Gates of trained models mostly
allow it for whole chunks, which are a path of their own: e^b is e^(b - r) e^r there. The exponents are sums of
log-gates, taken by products with matrices of ones and zeros, so no digits are lost to differences.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from sse_tune.templates.registry import Call
from sse_tune.templates.triton.common import load_rows, log_gate

MODULE = "sse_tune.templates.triton.gla_gates"

NEAR_NATS = tl.constexpr(40.0)  # e^80, the largest product, times any operands is a finite fp32
FAR_FLAGS = 32  # that a block looks after: one block each would take longer to start than all of them to be read


def levels(call: Call) -> dict[str, Any]:
    """How often a chunk can be halved."""
    return dict(LEVELS=call.sizes.chunk_size.bit_length() - 1)


def far_launch(flags: int) -> tuple[int, dict[str, int]]:
    """Blocks of the launch for what is flagged as far, and their arguments."""
    return triton.cdiv(flags, FAR_FLAGS), dict(n_flags=flags, FLAGS=FAR_FLAGS)


@triton.jit
def any_far(far, n_flags, FLAGS: tl.constexpr):
    """Whether a flag is set of those that this block looks after: every num_programs-th one. Chunks beyond the last
    have not written theirs."""
    o_flag = tl.program_id(0) + tl.arange(0, FLAGS) * tl.num_programs(0)
    return tl.max(tl.abs(tl.load(far + o_flag, mask=o_flag < n_flags, other=0))) > 0


@triton.jit
def gate_parts(p_g, b_head, m_write, o_k, K: tl.constexpr, BK: tl.constexpr):
    """The log-gates of a chunk as a sum of two fp16 tiles, 22 bits; rows that do not write keep the state."""
    b_g = log_gate(load_rows(p_g, b_head, m_write, o_k, K, BK), m_write[:, None])
    b_high = b_g.to(tl.float16)
    return b_high, (b_g - b_high.to(tl.float32)).to(tl.float16)


@triton.jit
def gate_sums(m_rows, b_high, b_low):
    """Row i: the sum of the log-gates of the rows j where m_rows[i, j]; the tensor cores add faster than a scan."""
    b_ones = m_rows.to(tl.float16)
    return tl.dot(b_ones, b_high) + tl.dot(b_ones, b_low)


@triton.jit
def in_second(i_half, C: tl.constexpr):
    """Which rows lie in the second half of their block, [C, 1]; a half has 2**i_half rows."""
    return (((tl.arange(0, C) >> i_half) & 1) == 1)[:, None]


@triton.jit
def half_exponent(b_high, b_low, i_half, C: tl.constexpr):
    """The logarithm of the module's tile for halves of 2**i_half rows, [C, BK], and whether all of it is near."""
    o_c = tl.arange(0, C)
    m_half = (o_c >> i_half)[:, None] == (o_c >> i_half)[None, :]
    # up to row i in second halves, after it in first ones
    m_order = in_second(i_half, C) == (o_c[:, None] >= o_c[None, :])
    b_x = gate_sums(m_half & m_order, b_high, b_low)
    return b_x, tl.min(b_x) >= -NEAR_NATS


@triton.jit
def halves_of_chunk(b_high, b_low, C: tl.constexpr, LEVELS: tl.constexpr):
    """The sums of the log-gates over the first half of a chunk and over the second, [BK] each."""
    b_g = b_high.to(tl.float32) + b_low.to(tl.float32)
    m_second = in_second(LEVELS - 1, C)
    return tl.sum(tl.where(m_second, 0.0, b_g), 0), tl.sum(tl.where(m_second, b_g, 0.0), 0)


@triton.jit
def far_decays(b_high, b_low, C: tl.constexpr):
    """e^b and e^(b_C - b) [C, BK], for any gates."""
    o_c = tl.arange(0, C)
    b_up = tl.exp(gate_sums(o_c[:, None] >= o_c[None, :], b_high, b_low))
    return b_up, tl.exp(gate_sums(o_c[:, None] < o_c[None, :], b_high, b_low))


@triton.jit
def pair_factors(b_x, is_near, i_half, C: tl.constexpr):
    """What multiplies rows of q and of k [C, BK], and which pairs i, j [C, C] that is for, one order of them or both:
    those in the two halves of a block, or if near all in one block."""
    m_second = in_second(i_half, C)
    b_other = tl.where(is_near, -b_x, b_x)  # of k in second halves and of q in first ones
    b_eq = tl.exp(tl.where(m_second, b_x, b_other))
    b_ek = tl.exp(tl.where(m_second, b_other, b_x))
    b_half = tl.arange(0, C) >> i_half
    b_apart = b_half[:, None] ^ b_half[None, :]
    return b_eq, b_ek, tl.where(is_near, b_apart <= 1, b_apart == 1)


@triton.jit
def wide_operand(b_x, dtype: tl.constexpr):
    """An operand with the range of fp32: fp16 has not got it, so the dot takes fp32, that is tf32."""
    if dtype == tl.float16:
        return b_x.to(tl.float32)
    else:
        return b_x.to(dtype)
