"""GLA states backward with the gradient of the values: of every row, and of the state at each boundary.

    dV = kg dS + Pᵀ dO        dS <- e^(b_C) dS + qgᵀ dO

A walk along each segment from its end (gla_joint_walk).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import gla_joint_walk

if TYPE_CHECKING:
    import torch


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    ends = ("d_final_state", "d_initial_state")
    gla_joint_walk.run(call, tensors, ("kg", "qg", "do"), "dh", ends, "dv_rows", reverse=True)


TEMPLATE = Template(
    "triton", "gla_states_value_gradients", "states_value_gradients", ("gla",), gla_joint_walk.SPACE, run,
    (__name__, *gla_joint_walk.SOURCES),
)  # fmt: skip
