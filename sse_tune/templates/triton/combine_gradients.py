"""Combine gradients: a token's gradients are the sums of its rows' parts; the router's goes through the softmax.

    d_x = Σ over lanes of dx_rows[inv[t, lane] - first sparse row]: readers for q, writers for k, v, g and beta
    de_p = Σ over heads, of the lane that chose p;  dlogit = e∘(de - Σ e·de)

All in fp32 and in slot order. The always-on stream's own q, k, g and beta rows are already at their tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import combine, common, routing
from sse_tune.templates.triton.combine import sum_rows
from sse_tune.templates.triton.routing import router_softmax

if TYPE_CHECKING:
    import torch

ROUTER_BLOCK_T = 16


@triton.jit
def sum_scalars_kernel(
    rows, inv, out, R, first_row, n_rows, H: tl.constexpr, L: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """out[t, h] = sum over lanes of rows[h, inv[t, lane] - first_row]: one number a row and head."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_h = tl.arange(0, BH)
    m_t = o_t < R
    m_tile = m_t[:, None] & (o_h < H)[None, :]
    b_sum = tl.zeros((BT, BH), tl.float32)
    for lane in range(FIRST, LAST):
        b_row = tl.load(inv + o_t.to(tl.int64) * L + lane, mask=m_t, other=first_row) - first_row
        b_sum += tl.load(rows + o_h.to(tl.int64)[None, :] * n_rows + b_row[:, None], mask=m_tile, other=0.0)
    tl.store(out + o_t.to(tl.int64)[:, None] * H + o_h[None, :], b_sum.to(out.dtype.element_ty), mask=m_tile)


@triton.jit
def router_gradient_kernel(
    router_logits, chosen, inv, de_rows, d_router_logits, R, first_row, n_rows,
    N: tl.constexpr, BN: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, L: tl.constexpr,
    HAS_SHARED: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_n = tl.arange(0, BN)
    o_h = tl.arange(0, BH)
    m_t = o_t < R
    b_raw, b_x, b_e = router_softmax(router_logits, o_t, m_t, N, BN)
    b_de = tl.zeros((BT, BN), tl.float32)
    for lane in range(HAS_SHARED, L):
        o_slot = o_t.to(tl.int64) * L + lane
        b_row = tl.load(inv + o_slot, mask=m_t, other=first_row) - first_row
        b_p = tl.load(chosen + o_slot, mask=m_t, other=0)
        p_part = de_rows + o_h.to(tl.int64)[None, :] * n_rows + b_row[:, None]
        b_part = tl.load(p_part, mask=m_t[:, None] & (o_h < H)[None, :], other=0.0)
        b_de += tl.where(o_n[None, :] == b_p[:, None], tl.sum(b_part, 1)[:, None], 0.0)
    b_d = b_e * (b_de - tl.sum(b_e * b_de, 1)[:, None])
    tl.store(
        d_router_logits + o_t.to(tl.int64)[:, None] * N + o_n[None, :], b_d.to(d_router_logits.dtype.element_ty),
        mask=m_t[:, None] & (o_n < N)[None, :],
    )  # fmt: skip


def _sum_scalars(call: Call, rows: torch.Tensor, inv: torch.Tensor, out: torch.Tensor, first: int, last: int) -> None:
    heads = call.sizes.problem.num_heads
    block_h = triton.next_power_of_2(heads)
    block_t = max(1, 1024 // block_h)
    call.launch(
        sum_scalars_kernel,
        (triton.cdiv(out.shape[0], block_t),),
        dict(rows=rows, inv=inv, out=out, R=out.shape[0], first_row=call.sizes.shared_rows, n_rows=rows.shape[1],
             H=heads, L=inv.shape[1], FIRST=first, LAST=last, BT=block_t, BH=block_h),
        num_warps=4,
        num_stages=1,
    )  # fmt: skip


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem = call.sizes.problem
    inv, shared = tensors["inv"], int(problem.shared)
    writers, readers = shared + problem.top_k, shared + problem.readers
    sum_rows(call, tensors["dv_rows"], inv, tensors["d_v"], 0, writers)
    if not problem.num_partitions:
        return
    sum_rows(call, tensors["dq_rows"], inv, tensors["d_q"], shared, readers, first_row=call.sizes.shared_rows)
    sum_rows(call, tensors["dk_rows"], inv, tensors["d_k"], shared, writers, first_row=call.sizes.shared_rows)
    if problem.rule == "gla":
        sum_rows(call, tensors["dg_rows"], inv, tensors["d_g"], shared, writers, first_row=call.sizes.shared_rows)
    else:
        _sum_scalars(call, tensors["dg_rows"], inv, tensors["d_g"], shared, writers)
        _sum_scalars(call, tensors["dbeta_rows"], inv, tensors["d_beta"], shared, writers)
    call.launch(
        router_gradient_kernel,
        (triton.cdiv(call.sizes.tokens, ROUTER_BLOCK_T),),
        dict(
            router_logits=tensors["router_logits"],
            chosen=tensors["chosen"],
            inv=inv,
            de_rows=tensors["de_rows"],
            d_router_logits=tensors["d_router_logits"],
            R=call.sizes.tokens,
            first_row=call.sizes.shared_rows,
            n_rows=tensors["de_rows"].shape[1],
            N=problem.num_partitions,
            BN=triton.next_power_of_2(max(problem.num_partitions, 2)),
            H=problem.num_heads,
            BH=triton.next_power_of_2(problem.num_heads),
            L=problem.lanes,
            HAS_SHARED=shared,
            BT=ROUTER_BLOCK_T,
        ),
        num_warps=1,
        num_stages=1,
    )


TEMPLATE = Template(
    "triton", "combine_gradients", "combine_gradients", ("gla", "gdn"), combine.SUM_SPACE, run,
    (__name__, combine.MODULE, routing.__name__, common.MODULE),
)  # fmt: skip
