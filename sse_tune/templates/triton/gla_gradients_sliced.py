"""GLA gradients in slices of K: of q, k, gates and router weight; a block per chunk, head and slice.

With h the state before the chunk, dh the gradient of the one after, q̂ = c q, k̂ = a k, and Xq, Xk their gradients:

    dA = tril(dO Vᵀ)
    Xq = e^b (dO hᵀ) + Σ_j dA_ij k̂_j e^(b_i - b_j)      Xk = e^(b_C - b) (V dhᵀ) + Σ_i dA_ij q̂_i e^(b_i - b_j)
    db = q̂ Xq - k̂ Xk,  db_C += Σ_j k̂ e^(b_C - b) (V dhᵀ) + e^(b_C) Σ_v h dh,   dg_i = Σ_(t >= i) db_t

Near gates, as gla_gates has it: with E = e^(b - r), Zq = E q̂, Zk = k̂ / E, the decays of a pair are in Zq and Zk, and

    Xq / E = e^r (dO hᵀ) + dA Zk     E Xk = e^(b_C - r) (V dhᵀ) + dAᵀ Zq     db = Zq (Xq / E) - Zk (E Xk)

so that both sides of a pair enter db with the same rounded factors and cancel where they must. Slices that are not near
are flagged and left to gla_gradients_far, a second launch.

Registers are what limits this kernel: rows are read twice rather than held, <h, dh> is the diagonal of a product, and
what all rows of dg share is added after the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from sse_tune.device import Device
from sse_tune.problem import Problem
from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import common, gla_gates, gla_gradients_far, gla_slices
from sse_tune.templates.triton.common import (
    chunk_entry,
    chunk_rows,
    key_tile,
    load_rows,
    load_scalars,
    state_beside,
    state_index,
    value_tile,
)
from sse_tune.templates.triton.gla_gates import (
    gate_parts,
    half_exponent,
    halves_of_chunk,
    in_second,
    wide_operand,
)
from sse_tune.templates.triton.gla_slices import out_start, store_gradient, store_slice, token_rows

if TYPE_CHECKING:
    import torch

FAR_WARPS = 8  # of the launch for gates that are not near: it holds more at once


def smem_bytes(problem: Problem, config: Config, device: Device) -> int:
    """do, v, h and dh in flight, and as operands where a dot does not take them as they came; or what comes after."""
    c, item = int(config["chunk_size"]), common.item_bytes(problem)
    bk, bv = int(config["block_k"]), int(config["block_v"])
    state = 4 if config["state_dtype"] == "fp32" else item
    wide = max(item, 4 if problem.dtype == "fp16" else 0)
    tiles, stages = 2 * item * c * bv + 2 * state * bk * bv, int(config["num_stages"])
    # beside the call's own states in fp32 those at boundaries are no operands as they came, and need one slot less
    tiles = max(stages * tiles, (stages - 1) * (tiles + 8 * bk * bv))
    operands = (4 if device.capability >= 100 else 2) * state * (c + bk) * bv
    return max(tiles + operands, wide * (2 * c * bk + 2 * c * c), 8 * c * bk) + 9216


SPACE = Space(
    params=(
        Param("block_k", (64, 128), 64, "columns of K in one block"),
        Param("block_v", (64, 128), 64, "columns of V at a time"),
        Param("num_warps", (4, 8), 4, "warps per block"),
        Param("num_stages", (1, 2, 3), 3, "tiles of V in flight"),
    ),
    constraints=(
        common.tile_width("block_k", key_tile),
        common.tile_width("block_v", value_tile),
        # Xq or Xk, db, a decay and Z are held at once, and on sm_80 the dots' operands as well
        Constraint("chunk_size * block_k / (32 * num_warps) <= 32, or 16 before sm_90",
                   lambda p, c, d: c["chunk_size"] * min(c["block_k"], key_tile(p))
                   <= (32 if d.capability >= 90 else 16) * 32 * c["num_warps"]),
        Constraint("chunk_size * chunk_size / (32 * num_warps) <= 64",
                   lambda p, c, d: c["chunk_size"] ** 2 <= 64 * 32 * c["num_warps"]),
        # with tensor memory its pipeliner fails an assertion on this loop, from one run to the next or not
        Constraint("num_stages = 1 from sm_100 on", lambda p, c, d: c["num_stages"] == 1 or d.capability < 100),
        Constraint("the tiles fit in shared memory",
                   lambda p, c, d: smem_bytes(p, c, d) <= d.smem_per_block_bytes),
    ),
)


@triton.jit
def gla_slice_kernel(
    q, k, v, g, do, shared_q, shared_k, shared_g, k_scale, q_scale, h, dh, initial_state, d_final_state, perm, weights,
    chunk_table, dq_rows, dk_rows, dg_rows, de_rows, d_shared_q, d_shared_k, d_shared_g, far, sums, scale, M, n_shared,
    n_shared_rows, n_sequences,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PARTITIONS: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    i_k = tl.program_id(0) % NK
    i_h = (tl.program_id(0) // NK) % H
    i_seg, first_row, n_rows, i_before, i_after = chunk_entry(chunk_table, tl.program_id(0) // (NK * H))
    if i_seg < 0:
        return
    is_shared = i_seg < n_shared
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    i_state = state_index(i_seg, n_sequences, PARTITIONS, HAS_SHARED).to(tl.int64) * H + i_h

    b_dA = tl.zeros((C, C), tl.float32)
    b_xq = tl.zeros((C, BK), tl.float32)
    b_xk = tl.zeros((C, BK), tl.float32)
    b_hdh = tl.zeros((BK, BK), tl.float32)
    b_head, m_row = token_rows(perm, first_row, n_rows, i_h, H, C, L)
    for i_v in range(NV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_do = load_rows(do, b_head, m_row, o_v, V, BV)  # [C, BV]
        b_v = load_rows(v, b_head, m_row, o_v, V, BV)  # [C, BV]
        b_h = state_beside(h, initial_state, i_before, i_state, i_h, o_k, o_v, H, K, V, HAS_INITIAL)  # [BK, BV]
        b_dh = state_beside(dh, d_final_state, i_after, i_state, i_h, o_k, o_v, H, K, V, HAS_FINAL)  # [BK, BV]
        b_dA = tl.dot(b_do, tl.trans(b_v), b_dA, input_precision=PRECISION)
        b_xq = tl.dot(b_do.to(b_h.dtype), tl.trans(b_h), b_xq, input_precision=PRECISION)
        b_xk = tl.dot(b_v.to(b_dh.dtype), tl.trans(b_dh), b_xk, input_precision=PRECISION)
        b_hdh = tl.dot(b_h, tl.trans(b_dh), b_hdh, input_precision=PRECISION)
    b_last = tl.sum(tl.where(tl.arange(0, BK)[:, None] == tl.arange(0, BK)[None, :], b_hdh, 0.0), 1)
    # pairs i = j, which have no decay, give db the same product twice
    b_lower = wide_operand(tl.where(o_c[:, None] >= o_c[None, :], b_dA, 0.0), do.dtype.element_ty)

    b_row, b_slot, b_token, b_lane, m_row = chunk_rows(perm, first_row, n_rows, C, L)
    m_write = m_row & (b_lane < WRITERS)
    b_high, b_low = gate_parts(tl.where(is_shared, shared_g, g), b_token * H + i_h, m_write, o_k, K, BK)  # [C, BK]
    b_first, b_second = halves_of_chunk(b_high, b_low, C, LEVELS)
    b_x, is_near = half_exponent(b_high, b_low, LEVELS - 1, C)
    tl.store(far + tl.program_id(0), tl.where(is_near, 0, 1))
    if not is_near:
        return
    p_q = tl.where(is_shared, shared_q, q)
    p_k = tl.where(is_shared, shared_k, k)
    b_at = i_h.to(tl.int64) * M + b_row
    b_a = load_scalars(k_scale, b_at, m_row)
    b_c = load_scalars(q_scale, b_at, m_row)
    b_x = tl.where(in_second(LEVELS - 1, C), b_x, -b_x) * 1.4426950408889634
    b_head, m_row = token_rows(perm, first_row, n_rows, i_h, H, C, L)
    b_q = load_rows(p_q, b_head, m_row, o_k, K, BK)  # [C, BK]
    b_zq = wide_operand(tl.exp2(b_x) * (b_q * b_c[:, None]), b_q.dtype)
    b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)  # [C, BK]
    b_zk = wide_operand(tl.exp2(-b_x) * (b_k * b_a[:, None]), b_k.dtype)
    b_xk *= tl.exp(b_second)[None, :]
    b_last = tl.sum(b_zk.to(tl.float32) * b_xk, 0) + b_last * tl.exp(b_first + b_second)
    b_xq = tl.dot(b_lower, b_zk, b_xq * tl.exp(b_first)[None, :], input_precision=PRECISION)
    b_xk = tl.dot(tl.trans(b_lower), b_zq, b_xk, input_precision=PRECISION)
    b_db = b_zq.to(tl.float32) * b_xq - b_zk.to(tl.float32) * b_xk

    i_out = out_start(first_row, n_shared_rows, i_h, is_shared, H, K)
    b_e = tl.load(weights + b_slot, mask=m_row, other=0.0)
    b_nothing = tl.where(n_rows > 0, 0.0, 1.0)
    tl.debug_barrier()  # q and k are read anew rather than held
    b_xq *= tl.exp2(b_x + b_nothing)
    p_dq = tl.where(is_shared, d_shared_q, dq_rows) + i_out
    b_qx = store_gradient(p_dq, p_q, b_xq, b_c, b_e, perm, first_row, n_rows, i_h, o_k, H, K, C, L, BK, NORM)
    b_xk *= tl.exp2(b_nothing - b_x)
    p_dk = tl.where(is_shared, d_shared_k, dk_rows) + i_out
    b_kx = store_gradient(p_dk, p_k, b_xk, b_a, b_e, perm, first_row, n_rows, i_h, o_k, H, K, C, L, BK, NORM)

    store_slice(
        dg_rows, d_shared_g, de_rows, sums, b_db, b_last, b_qx, b_kx, perm, first_row, n_rows, i_h, i_k, is_shared,
        n_shared_rows, M, scale, H, K, C, L, WRITERS, READERS, BK,
    )  # fmt: skip


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem, sizes = call.sizes.problem, call.sizes
    block_k, warps = int(call.config["block_k"]), int(call.config["num_warps"])
    slices, blocks = triton.cdiv(problem.key_dim, block_k), sizes.chunks * problem.num_heads
    k_scale = tensors["k_scale"]
    arguments: dict[str, Any] = dict(
        **common.streams(tensors, "q", "k", "g"),
        **common.row_arguments(call, tensors),
        **gla_gates.levels(call),
        **{name: tensors[name] for name in ("v", "do", "k_scale", "q_scale", "h", "dh", "de_rows")},
        **common.gradient_arguments(call, tensors, "q", "k", "g"),
        **common.end_states(tensors, "initial_state", "d_final_state"),
        far=tensors["perm"].new_empty(blocks * slices),
        sums=k_scale.new_empty((2, slices, *k_scale.shape)) if slices > 1 else k_scale,
        scale=call.scale,
        n_sequences=problem.sequences,
        PARTITIONS=problem.partitions,
        HAS_SHARED=problem.shared,
        V=problem.value_dim,
        BK=block_k,
        BV=int(call.config["block_v"]),
    )
    stages = int(call.config["num_stages"])
    call.launch(gla_slice_kernel, (blocks * slices,), arguments, num_warps=warps, num_stages=stages)
    far_blocks, flags = gla_gates.far_launch(blocks * slices)
    # num_stages=1: h and dh are read by products and by <h, dh>: pipelined, Triton 3.6 overwrites them too early
    call.launch(
        gla_gradients_far.gla_far_kernel, (far_blocks,), arguments | flags, num_warps=FAR_WARPS, num_stages=1
    )
    if slices > 1:
        unused = (
            "g", "shared_g", "v", "do", "h", "dh", "initial_state", "d_final_state", "far", "dg_rows", "d_shared_g",
            "n_sequences", "PARTITIONS", "HAS_SHARED", "HAS_INITIAL", "HAS_FINAL", "V", "BV", "LEVELS", "PRECISION",
        )  # fmt: skip
        call.launch(
            gla_slices.gla_slice_sums_kernel,
            (blocks,),
            {name: value for name, value in arguments.items() if name not in unused},
            num_warps=4,
            num_stages=1,
        )


TEMPLATE = Template(
    "triton", "gla_gradients_sliced", "gradients", ("gla",), SPACE, run,
    (__name__, common.MODULE, gla_gates.MODULE, gla_gradients_far.MODULE, gla_slices.MODULE),
)  # fmt: skip
