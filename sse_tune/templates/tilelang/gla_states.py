"""GLA states: the state at each boundary, kept for the output and for the gradients.

    S <- e^(b_C) S + kgᵀ V

A walk along each segment (gla_walk).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sse_tune.templates.registry import Call, Template
from sse_tune.templates.tilelang import common, gla_walk

if TYPE_CHECKING:
    import torch


def run(call: Call, tensors: "Mapping[str, torch.Tensor]") -> None:
    gla_walk.run(call, tensors, "kg", "v", "h", ("initial_state", "final_state"), reverse=False)


TEMPLATE = Template(
    "tilelang", "gla_states", "states", ("gla",), gla_walk.SPACE, run, (__name__, common.MODULE, gla_walk.MODULE)
)
