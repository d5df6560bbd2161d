"""GLA states: the state at each boundary, the chunks side by side (gla_split)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sse_tune.templates.registry import Call, Template
from sse_tune.templates.triton import common, gla_split, gla_walk

if TYPE_CHECKING:
    import torch


def run(call: Call, tensors: Mapping[str, torch.Tensor]) -> None:
    gla_split.run(call, tensors, "kg", "v", "h", ("initial_state", "final_state"), reverse=False)


TEMPLATE = Template(
    "triton", "gla_states_split", "states", ("gla",), gla_split.SPACE, run,
    (__name__, common.MODULE, gla_walk.MODULE, gla_split.MODULE),
)  # fmt: skip
