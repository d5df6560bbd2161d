"""GLA states with the output: the output of every row, and for a backward pass the state at each boundary.

    O = qg S + P V        S <- e^(b_C) S + kgᵀ V

A walk along each segment (gla_joint_walk).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import gla_joint_walk

if TYPE_CHECKING:
    import torch


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    ends = ("initial_state", "final_state")
    gla_joint_walk.run(call, tensors, ("qg", "kg", "v"), "h", ends, "o_rows", reverse=False)


TEMPLATE = Template(
    "triton", "gla_states_output", "states_output", ("gla",), gla_joint_walk.SPACE, run,
    (__name__, *gla_joint_walk.SOURCES),
)  # fmt: skip
