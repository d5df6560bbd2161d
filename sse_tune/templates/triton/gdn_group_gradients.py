"""GDN group gradients: the gradient of the state between two groups of a segment, the groups side by side (gdn_groups).

The walk of `gdn_state_gradient`, of dS alone, through every group but first ones: from zero, or in a segment's last
group from the gradient of its final state. Then the carry, with the transitions of the forward pass transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.space import Param, Space
from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import common, gdn_groups
from sse_tune.templates.triton.common import (
    chunk_slots,
    key_tile,
    load_gate_sums,
    load_rows,
    load_scalars,
    load_state,
    rows_of,
    store_state,
)
from sse_tune.templates.triton.gdn_groups import group_in_window, group_place

if TYPE_CHECKING:
    import torch

SPACE = Space(
    params=(
        Param("block_v", (32, 64, 128), 64, "columns of the state one block keeps"),
        Param("num_warps", (2, 4, 8), 4, "warps per block"),
        Param("num_stages", (1, 2, 3), 1, "chunks in flight"),
    ),
    constraints=gdn_groups.constraints(row_tiles=2),
)


@triton.jit
def gdn_group_gradients_kernel(
    q, k, shared_q, shared_k, do, P, Ag, k_scale, q_scale, g_cumsum, perm, weights, segment_rows, segment_boundaries,
    chunk_table, d_initial_state, d_final_state, group_dh, M, n_shared, n_segments, n_sequences, n_all_chunks,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, PARTITIONS: tl.constexpr,
    WRITERS: tl.constexpr, READERS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, SPLIT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    i_h = (tl.program_id(0) // NV) % H
    i_seg, i_chunk = group_in_window(
        chunk_table, segment_boundaries, tl.program_id(0) // (NV * H), n_all_chunks, SPLIT, False
    )
    if i_seg < 0:
        return
    first_row, n_left, _, i_state, i_before, i_after = group_place(
        segment_rows, segment_boundaries, i_seg, i_chunk, n_sequences, H, C, PARTITIONS, HAS_SHARED, SPLIT
    )
    p_q = tl.where(i_seg < n_shared, shared_q, q)
    p_k = tl.where(i_seg < n_shared, shared_k, k)
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = (tl.program_id(0) % NV) * BV + tl.arange(0, BV)

    b_ds = tl.zeros((BK, BV), tl.float32)
    if HAS_FINAL:
        b_ds = load_state(d_final_state, i_state + i_h, o_k, o_v, i_after < 0, K, V)
    n_chunks = tl.cdiv(n_left, C)
    last = tl.maximum(n_chunks - 1, 0) * C  # 0 where there is no row either
    b_slot = chunk_slots(perm, first_row + last, n_left - last, C)
    for i_back in range(0, n_chunks):
        i = n_chunks - 1 - i_back
        n_rows = tl.minimum(n_left - i * C, C)
        b_row, b_token, b_lane, m_row = rows_of(b_slot, first_row + i * C, n_rows, C, L)
        b_slot = chunk_slots(perm, first_row + (i - 1) * C, tl.where(i > 0, C, 0), C)
        b_head = b_token * H + i_h
        b_at = i_h.to(tl.int64) * M + b_row
        b_k = load_rows(p_k, b_head, m_row, o_k, K, BK)
        b_q = load_rows(p_q, b_head, m_row, o_k, K, BK)
        b_do = load_rows(do, b_head, m_row, o_v, V, BV)
        b_a = load_scalars(k_scale, b_at, m_row)
        b_c = load_scalars(q_scale, b_at, m_row)
        b_b, b_last = load_gate_sums(g_cumsum, b_at, m_row, n_rows, C)
        b_Ag = load_rows(Ag, b_at, m_row, o_c, C, C)
        b_P = load_rows(P, b_at, m_row, o_c, C, C)

        b_up = tl.exp(b_b.to(tl.float32))
        b_down = b_a * tl.exp((b_last - b_b).to(tl.float32))
        b_dnew = b_down[:, None] * tl.dot(b_k, b_ds.to(b_k.dtype), input_precision=PRECISION)
        b_dnew += tl.dot(tl.trans(b_P), b_do, input_precision=PRECISION)
        b_dw = tl.dot(tl.trans(b_Ag), b_dnew.to(b_k.dtype), input_precision=PRECISION)
        b_read = ((b_c * b_up)[:, None] * b_do.to(tl.float32)).to(b_k.dtype)
        b_erased = ((b_a * b_up)[:, None] * b_dw).to(b_k.dtype)
        b_ds = tl.exp(b_last.to(tl.float32)) * b_ds + tl.dot(tl.trans(b_q), b_read, input_precision=PRECISION)
        b_ds -= tl.dot(tl.trans(b_k), b_erased, input_precision=PRECISION)
    store_state(group_dh, b_ds, i_before.to(tl.int64) * H + i_h, o_k, o_v, True, K, V)


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem, block_v = call.sizes.problem, int(call.config["block_v"])
    names = ("do", "P", "Ag", "k_scale", "q_scale", "g_cumsum", "group_dh")
    call.launch(
        gdn_group_gradients_kernel,
        (call.sizes.windows * problem.num_heads * triton.cdiv(problem.value_dim, block_v),),
        dict(
            **common.streams(tensors, "q", "k"),
            **common.row_arguments(call, tensors),
            **common.segment_arguments(call, tensors),
            **common.end_states(tensors, "d_initial_state", "d_final_state"),
            **gdn_groups.arguments(call, tensors),
            **{name: tensors[name] for name in names},
            V=problem.value_dim,
            BK=key_tile(problem),
            BV=block_v,
        ),
        num_warps=int(call.config["num_warps"]),
        num_stages=int(call.config["num_stages"]),
    )
    gdn_groups.launch_carry(call, tensors, "group_dh", reverse=True)


TEMPLATE = Template(
    "triton", "gdn_group_gradients", "group_gradients", ("gdn",), SPACE, run,
    (__name__, common.MODULE, gdn_groups.MODULE),
)  # fmt: skip
