"""GLA output: the output of every row, from the state before its chunk and the rows of its chunk (gla_apply).

    O = qg S + P V
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sse_tune.templates.registry import Call, Template
from sse_tune.templates.tilelang import common, gla_apply

if TYPE_CHECKING:
    import torch


def run(call: Call, tensors: "Mapping[str, torch.Tensor]") -> None:
    gla_apply.run(call, tensors, "qg", "v", "h", "initial_state", "o_rows", after=False)


TEMPLATE = Template(
    "tilelang", "gla_output", "output", ("gla",), gla_apply.SPACE, run, (__name__, common.MODULE, gla_apply.MODULE)
)
