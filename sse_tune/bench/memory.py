"""What does not fit in memory is left out of a comparison with its reason; the rest is measured all the same."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import traceback
from collections.abc import Iterator

import torch

from sse_tune.tuning.outcomes import classify


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A part of a comparison that was not measured.

    Args:
        name: of the side, or what else was too large.
        direction: "fwd", or "fwd+bwd".
        reason: in one line.
    """

    name: str
    direction: str
    reason: str


@contextlib.contextmanager
def leaving_out(name: str, direction: str, left_out: list[LeftOut]) -> Iterator[None]:
    """Ends a block that runs out of memory, and notes it; every other failure goes on."""
    try:
        yield
    except Exception as error:
        outcome, shown = classify(error)
        if outcome != "out_of_memory":
            raise
        # the first two sentences say how much was asked for; the others are advice to a programmer
        left_out.append(LeftOut(name, direction, ". ".join(shown.split(". ")[:2])))
        free(error)


def free(error: BaseException | None = None) -> None:
    """Gives the GPU back what nothing refers to any more: what comes next may need it in one piece.

    Args:
        error: that ended the calls whose tensors are not needed any more; it still refers to them.
    """
    if error is not None:
        traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
