"""Where sequences start: the first token of each and the number of tokens, int32, contiguous, on the tokens' device.

Those of a plain batch follow from its shape alone, and are kept for it: to make them takes a launch, which costs the
host more than all else it looks at in a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

_kept: dict[tuple[int, int, torch.device], Tensor] = {}
_MAX_KEPT = 4096  # shapes; none is ever dropped, since a CUDA graph may hold its address


def given_offsets(cu_seqlens: Tensor) -> Tensor:
    """Of packed sequences."""
    return cu_seqlens.to(torch.int32).contiguous()


def even_offsets(batch: int, seq_len: int, device: torch.device) -> Tensor:
    """Of sequences of one length."""
    # made on the device: a copy from a Python list would wait for it
    return torch.arange(0, (batch + 1) * seq_len, seq_len, dtype=torch.int32, device=device)


def kept_offsets(batch: int, seq_len: int, device: torch.device) -> Tensor:
    """`even_offsets`, the same tensor for the same shape: not to be written. The first call of a shape waits for the
    current stream, so that every stream can read them."""
    found = _kept.get((batch, seq_len, device))
    if found is not None:
        return found
    with torch.inference_mode(False):  # a training step may come after, and save them
        made = even_offsets(batch, seq_len, device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():  # written when the graph runs, in memory of the graph
                return made
            torch.cuda.current_stream().synchronize()
    if len(_kept) < _MAX_KEPT:
        _kept[batch, seq_len, device] = made
    return made


def offsets_of(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Of checked arguments, without a launch where sequences have one length."""
    return kept_offsets(q.shape[0], q.shape[1], q.device) if cu_seqlens is None else given_offsets(cu_seqlens)
