"""The rules tensors of the operation must keep; each raises a ProblemError with the values and the remedy."""

from __future__ import annotations

import itertools
import math
import operator

import torch

from sse_tune import problem
from sse_tune.errors import ProblemError
from sse_tune.runtime.pipeline import DTYPES, STREAM

DTYPE_NAMES = {DTYPES[name]: name for name in problem.DTYPES}  # of the streams; sums inside may be wider


def check_devices(tensors: dict[str, torch.Tensor]) -> None:
    device = tensors["q"].device
    if device.type not in ("cpu", "cuda"):
        raise ProblemError("tensors must be on a CPU or a CUDA GPU", f"q on {device}", "move them with .to('cuda')")
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ProblemError(
                "all tensors must be on one device", f"q on {device}, {name} on {tensor.device}",
                f"move it with {name}.to(q.device)",
            )


def extents(name: str, tensor: torch.Tensor, layout: str, dims: int) -> tuple[int, ...]:
    if tensor.dim() != dims:
        raise ProblemError(
            f"`{name}` must be {layout}", f"a shape of {list(tensor.shape)}", f"reshape {name} to {dims} dimensions"
        )
    # torch.compile may trace a size as a symbol; the plan depends on it, so it becomes a number here
    return tuple(operator.index(extent) for extent in tensor.shape)


def check_streams(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether there is an always-on partition with streams of its own."""
    needed = [f"shared_{name}" for name in STREAM if name in tensors]
    given = [f"shared_{name}" for name in STREAM if f"shared_{name}" in tensors]
    if given and "router_logits" not in tensors:
        raise ProblemError(
            "without `router_logits` the one stream is q, k, g and beta themselves", f"{', '.join(given)} too",
            "pass router_logits, or hand the shared streams as q, k, g and beta",
        )
    if "shared_beta" in given and "beta" not in tensors:
        raise ProblemError(
            "`beta` is given for both streams (GDN) or for neither (GLA)", "shared_beta without beta", "pass beta too"
        )
    if given and given != needed:
        missing = [name for name in needed if name not in given]
        raise ProblemError(
            "the always-on partition needs all of its streams", f"{', '.join(given)} without {', '.join(missing)}",
            "pass all of them, or none",
        )
    return bool(given)


def check_shapes(
    tensors: dict[str, torch.Tensor], tokens: tuple[int, int], num_heads: int, head_dim: int, head_dim_v: int,
    num_partitions: int,
) -> None:
    gdn = "beta" in tensors
    key, scalar = (*tokens, num_heads, head_dim), (*tokens, num_heads)
    expected: dict[str, tuple[tuple[int, ...], str]] = {
        "k": (key, "[B, T, H, K]"),
        "v": ((*tokens, num_heads, head_dim_v), "[B, T, H, V]"),
        "g": (scalar, "[B, T, H] for GDN") if gdn else (key, "[B, T, H, K] for GLA"),
        "beta": (scalar, "[B, T, H]"),
        "router_logits": ((*tokens, num_partitions), "[B, T, N]"),
    }
    for name in STREAM:
        expected[f"shared_{name}"] = expected["k" if name == "q" else name]
    for name, (shape, layout) in expected.items():
        if name not in tensors or tuple(tensors[name].shape) == shape:
            continue
        remedy = f"give {name} the sizes of q"
        if name in ("k", "v") and tensors[name].dim() == 4 and tensors[name].shape[2] != num_heads:
            remedy = "give q, k and v the same heads: repeat the fewer ones with repeat_interleave"
        elif name in ("g", "shared_g"):
            remedy = "pass one log-gate per head with beta, one per key dimension without"
        raise ProblemError(
            f"`{name}` must be {layout} = {list(shape)}, as q of {list(tensors['q'].shape)} says",
            f"{list(tensors[name].shape)}", remedy,
        )


def check_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    dtype = tensors["q"].dtype
    if dtype not in DTYPE_NAMES:
        raise ProblemError(
            "q, k and v must be bfloat16, float16 or float32", f"q of {dtype}",
            "convert them; float64 is what sse_tune.reference is for",
        )
    for name in ("k", "v", "shared_q", "shared_k"):
        if name in tensors and tensors[name].dtype != dtype:
            raise ProblemError(
                "q, k and v of both streams must have one dtype", f"q of {dtype}, {name} of {tensors[name].dtype}",
                f"convert it with {name}.to(q.dtype)",
            )
    for name in ("g", "beta", "shared_g", "shared_beta", "router_logits"):
        if name in tensors and tensors[name].dtype not in DTYPE_NAMES:
            raise ProblemError(
                f"`{name}` must be bfloat16, float16 or float32", f"{tensors[name].dtype}",
                f"convert it with {name}.float()",
            )


def check_numbers(
    num_partitions: int, top_k: int | None, read_k: int | None, scale: float | None, qk_l2norm: bool,
    gate_before_norm: bool,
) -> None:
    if num_partitions and top_k is None:
        raise ProblemError(
            "`top_k` says how many partitions each token writes", "top_k=None", "pass top_k with router_logits"
        )
    if num_partitions and top_k == 0:
        raise ProblemError(
            "1 <= top_k <= N must hold", f"top_k=0, N={num_partitions}", "pass router_logits=None for none"
        )
    for name, value in (("top_k", top_k), ("read_k", read_k)):
        # here and not with the problem's own checks: problems are looked up by their fields, and 1 == True == 1.0
        if num_partitions and value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ProblemError(
                f"1 <= {name} <= N must hold for an integer", f"{name}={value!r}, N={num_partitions}",
                f"pass int({name})",
            )
    if gate_before_norm and not qk_l2norm:
        raise ProblemError(
            "`gate_before_norm` says where the gate stands to the norm", "gate_before_norm=True, qk_l2norm=False",
            "set qk_l2norm=True too, or leave both out",
        )
    if scale is not None and (
        isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale)
    ):
        raise ProblemError("`scale` must be a finite number", f"scale={scale!r}", "pass a float, or None for K^-1/2")


def check_head_groups(head_groups: int, num_heads: int) -> None:
    if isinstance(head_groups, bool) or not isinstance(head_groups, int) or head_groups < 1 or num_heads % head_groups:
        raise ProblemError(
            "`head_groups` must be an integer above 0 that divides H", f"head_groups={head_groups!r}, H={num_heads}",
            "pass 1, or another divisor of H",
        )


def check_cu_seqlens(cu_seqlens: torch.Tensor, batch: int, seq_len: int) -> int:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ProblemError(
            "`cu_seqlens` must be [S + 1] int32 or int64 with S >= 1",
            f"{list(cu_seqlens.shape)} of {cu_seqlens.dtype}", "pass the first token of each sequence and T",
        )
    if batch != 1:
        raise ProblemError(
            "packed sequences need B = 1", f"B={batch} with cu_seqlens", "concatenate the sequences along T"
        )
    return operator.index(cu_seqlens.shape[0]) - 1


def check_offsets(cu_seqlens: torch.Tensor, seq_len: int) -> None:
    if _readable(cu_seqlens):
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != seq_len:
            raise ProblemError(
                "`cu_seqlens` must start at 0 and end at T", f"{offsets[0]}..{offsets[-1]}, T={seq_len}",
                "pass cumulative lengths: [0, len_0, len_0 + len_1, ..., T]",
            )
        for index, (start, stop) in enumerate(itertools.pairwise(offsets)):
            if stop < start:
                raise ProblemError(
                    "`cu_seqlens` must never decrease", f"{start} then {stop} at sequence {index}",
                    "pass cumulative lengths, not lengths",
                )


def check_initial_state(tensors: dict[str, torch.Tensor], shape: tuple[int, ...]) -> None:
    state = tensors.get("initial_state")
    if state is not None and (tuple(state.shape) != shape or state.dtype != torch.float32):
        raise ProblemError(
            f"`initial_state` must be [S, P, H, K, V] = {list(shape)} float32",
            f"{list(state.shape)} of {state.dtype}",
            "pass the final_state of the call before: P is 1 + N with an always-on partition, N without",
        )


def check_gates(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("g", "shared_g"):
        if name in tensors and _readable(tensors[name]) and bool((tensors[name] > 0).any()):
            raise ProblemError(
                f"`{name}` is a log-gate in natural log: at most 0",
                f"a largest value of {float(tensors[name].max()):g}",
                "pass log-sigmoid or -exp(A)·softplus(x), not the gate itself",
            )


def _readable(tensor: torch.Tensor) -> bool:
    """Whether looking at the values costs no synchronisation and is possible at all."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
