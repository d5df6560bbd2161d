"""Combine: the output of a token is the sum of its rows' outputs, in fp32 and in slot order: no atomics.

    o_t = Σ over lanes that read of o_rows[inv[t, lane]]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sse_tune.space import Constraint, Param, Space
from sse_tune.templates.registry import Call, Template

if TYPE_CHECKING:
    import torch

MODULE = __name__
SUM_SPACE = Space(
    params=(
        Param("block_t", (1, 2, 4, 8), 2, "tokens per block"),
        Param("block_d", (128, 256, 512, 1024, 2048), 1024, "values of a token per block"),
        Param("num_warps", (1, 2, 4, 8), 4, "warps per block"),
    ),
    constraints=(
        Constraint("block_t * block_d / (32 * num_warps) in 4..32",
                   lambda p, c, d: 4 <= c["block_t"] * c["block_d"] // (32 * c["num_warps"]) <= 32),
    ),
)


@triton.jit
def sum_rows_kernel(
    rows, inv, out, R, D, first_row, L: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[t] = sum of rows[inv[t, lane] - first_row] over lanes FIRST..LAST-1, rows of D contiguous values."""
    n_d = tl.cdiv(D, BD)
    o_t = (tl.program_id(0) // n_d) * BT + tl.arange(0, BT)
    o_d = (tl.program_id(0) % n_d) * BD + tl.arange(0, BD)
    m_t = o_t < R
    m_tile = m_t[:, None] & (o_d < D)[None, :]
    b_sum = tl.zeros((BT, BD), tl.float32)
    for lane in range(FIRST, LAST):
        b_row = tl.load(inv + o_t.to(tl.int64) * L + lane, mask=m_t, other=first_row).to(tl.int64) - first_row
        b_sum += tl.load(rows + b_row[:, None] * D + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32)
    tl.store(out + o_t.to(tl.int64)[:, None] * D + o_d[None, :], b_sum.to(out.dtype.element_ty), mask=m_tile)


def sum_rows(
    call: Call, rows: torch.Tensor, inv: torch.Tensor, out: torch.Tensor, first: int, last: int, *, first_row: int = 0
) -> None:
    """`out` [R, ...] from `rows` [rows from `first_row` on, ...] of equal trailing sizes, over lanes first..last-1."""
    width = out.numel() // out.shape[0]
    block_t, block_d = int(call.config["block_t"]), int(call.config["block_d"])
    call.launch(
        sum_rows_kernel,
        (triton.cdiv(out.shape[0], block_t) * triton.cdiv(width, block_d),),
        dict(rows=rows, inv=inv, out=out, R=out.shape[0], D=width, first_row=first_row, L=inv.shape[1], FIRST=first,
             LAST=last, BT=block_t, BD=block_d),
        num_warps=int(call.config["num_warps"]),
        num_stages=1,
    )  # fmt: skip


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    problem = call.sizes.problem
    sum_rows(call, tensors["o_rows"], tensors["inv"], tensors["o"], 0, int(problem.shared) + problem.readers)


TEMPLATE = Template("triton", "combine", "combine", ("gla", "gdn"), SUM_SPACE, run, (__name__,))
