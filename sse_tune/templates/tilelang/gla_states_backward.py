"""GLA states backward: the gradient of the state at each boundary.

    dS <- e^(b_C) dS + qgᵀ dO

A walk along each segment from its end (gla_walk), from the gradient of the final state to that of the initial one.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sse_tune.templates.registry import Call, Template
from sse_tune.templates.tilelang import common, gla_walk

if TYPE_CHECKING:
    import torch


def run(call: Call, tensors: "Mapping[str, torch.Tensor]") -> None:
    gla_walk.run(call, tensors, "qg", "do", "dh", ("d_final_state", "d_initial_state"), reverse=True)


TEMPLATE = Template(
    "tilelang", "gla_states_backward", "states_backward", ("gla",), gla_walk.SPACE, run,
    (__name__, common.MODULE, gla_walk.MODULE),
)  # fmt: skip
