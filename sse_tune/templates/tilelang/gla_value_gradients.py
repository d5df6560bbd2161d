"""GLA value gradients: each row's part of the gradient of v, from the state's after its chunk (gla_apply).

    dV = kg dS + Pᵀ dO
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sse_tune.templates.registry import Call, Template
from sse_tune.templates.tilelang import common, gla_apply

if TYPE_CHECKING:
    import torch


def run(call: Call, tensors: "Mapping[str, torch.Tensor]") -> None:
    gla_apply.run(call, tensors, "kg", "do", "dh", "d_final_state", "dv_rows", after=True)


TEMPLATE = Template(
    "tilelang", "gla_value_gradients", "value_gradients", ("gla",), gla_apply.SPACE, run,
    (__name__, common.MODULE, gla_apply.MODULE),
)  # fmt: skip
