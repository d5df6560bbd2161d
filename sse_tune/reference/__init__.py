"""The operation in plain PyTorch: what every kernel is compared with, and the page to read beside the paper.

`recurrent` is the definition, token by token; `chunked` computes the same by chunks, as the kernels do. Both compute in
the dtype of their inputs (the tests pass float64), run on any device and are differentiable by autograd.
Source: arXiv 2507.16577 (SSE), 2312.06635 (GLA), 2412.06464 (GDN).
"""

from sse_tune.reference.chunked import chunked
from sse_tune.reference.recurrent import recurrent
from sse_tune.reference.routing import Choice, load_balance_loss, route, topk_key_map

__all__ = ["Choice", "chunked", "load_balance_loss", "recurrent", "route", "topk_key_map"]
