"""The hazards, by name: what a kernel must get right before it is timed.

Each is one that kernels of this family are known to fail on. It says how it differs from the problem at hand and which
numbers go in; `inputs.build` makes the tensors. Most hazards share sizes, so that a compiler sees few variants.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from sse_tune.device import Device
from sse_tune.errors import ProblemError
from sse_tune.problem import Problem

HARD_GATES = (0.0, -1e-4, -5.0, -50.0, -1e3)
SCALES = ("tiny", "full", "big")
_BIG_MEMORY_BYTES = 120 * 10**9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hazard:
    """One kind of hard input.

    Args:
        doc: what goes wrong with it.
        changes: fields of the problem that it sets.
        lengths: sequence lengths from the chunk size C and whether the scale is tiny; None: one ordinary length, in
            the problem's own layout.
        gates: log-gates drawn from these; None: small ones.
        keys: "random", "duplicate", "silu" or "large".
        beta: "sigmoid", "one" or "two" (GDN).
        logits: "random", "equal", "infinite", "underflow", "hot" or "few".
        states: whether there is an initial state and the final one is asked for.
        gate_dtype: of g, beta and the logits: "fp32", or "io" for the problem's own; None: as the layers have them.
        scale: of q·k; None: K^-1/2.
        checked_sequences: only so many last sequences are compared with the reference; None: all.
        needs: the smallest scale it is run at: "tiny", "full" or "big".
        heads: H; None: at most two.
        own_kernels: the problem's own H and a length as its own, so that it runs what is compiled for the problem.
        rules: the rules it applies to.
        repeats: how often the same bits are asked for.
    """

    doc: str
    changes: tuple[tuple[str, object], ...] = ()
    lengths: Callable[[int, bool], tuple[int, ...]] | None = None
    gates: tuple[float, ...] | None = None
    keys: str = "random"
    beta: str = "sigmoid"
    logits: str = "random"
    states: bool = True
    gate_dtype: str | None = None
    scale: float | None = None
    checked_sequences: int | None = None
    needs: str = "tiny"
    heads: int | None = None
    own_kernels: bool = False
    rules: tuple[str, ...] = ("gla", "gdn")
    repeats: int = 2


def _routing(num_partitions: int, top_k: int, read_k: int | None = None) -> tuple[tuple[str, object], ...]:
    return (("num_partitions", num_partitions), ("top_k", top_k), ("read_k", top_k if read_k is None else read_k))


def _sizes(head_dim: int, head_dim_v: int) -> tuple[tuple[str, object], ...]:
    return (("head_dim", head_dim), ("head_dim_v", head_dim_v))


def _three(c: int, tiny: bool) -> tuple[int, ...]:
    """Three sequences of up to a few chunks: the sizes most hazards share."""
    return (c + 3, c, c // 4 + 1) if tiny else (2 * c + 3, c, c // 2 + 2)


def _edges(c: int, tiny: bool) -> tuple[int, ...]:
    return (0, 1, c - 1, 0, 0, c + 1, 0) if tiny else (0, 1, c - 1, 0, 0, c, c + 1, 2 * c - 1, 1, 2 * c + 1, 0)


_PLAIN = (("num_partitions", 0), ("top_k", 0), ("read_k", 0), ("shared", True))

CASES: dict[str, Hazard] = {
    "ordinary": Hazard(doc="ordinary numbers in the problem's own layout", states=False, own_kernels=True),
    "own_gates": Hazard(
        doc="the gates of `gates` in the problem's own layout", states=False, own_kernels=True, gates=HARD_GATES,
        repeats=20,
    ),
    "own_keys": Hazard(
        doc="the keys of `silu_keys` in the problem's own layout", states=False, own_kernels=True,
        keys="silu", beta="one", gates=(-1e-4, -0.1),
    ),
    "gates": Hazard(
        doc="g of 0, -1e-4, -5, -50 and -1e3 side by side: exp overflows unless masked first",
        lengths=_three, gates=HARD_GATES, repeats=20,
    ),
    "lengths": Hazard(
        doc="empty sequences first, in the middle and last; lengths 1, C-1, C, C+1, 2C-1, 2C+1",
        lengths=_edges,
    ),
    "duplicate_keys": Hazard(
        doc="few different keys and beta up to 2: the triangular solve grows",
        lengths=_three, keys="duplicate", beta="two", gates=(0.0, -1e-4),
    ),
    "silu_keys": Hazard(doc="keys of one sign, beta 1", lengths=_three, keys="silu", beta="one", gates=(-1e-4, -0.1)),
    "no_decay": Hazard(doc="every gate 0: nothing is forgotten", lengths=_three, gates=(0.0,)),
    "full_decay": Hazard(doc="every gate -1e3: nothing is kept", lengths=_three, gates=(-1e3,)),
    "equal_logits": Hazard(doc="all logits equal: ties go to the lowest partition", lengths=_three, logits="equal"),
    "infinite_logits": Hazard(doc="logits of +inf and -inf, rows of them", lengths=_three, logits="infinite"),
    "underflowing_weights": Hazard(doc="router weights that underflow to 0", lengths=_three, logits="underflow"),
    "hot_partition": Hazard(doc="every token chooses one partition first", lengths=_three, logits="hot"),
    "empty_partitions": Hazard(doc="partitions that no token chooses", lengths=_three, logits="few"),
    "all_but_one": Hazard(doc="top_k = N - 1", lengths=_three, changes=_routing(3, 2)),
    "every_partition": Hazard(doc="top_k = N", lengths=_three, changes=_routing(2, 2)),
    "one_partition": Hazard(doc="N = 1: the router's weight has no gradient", lengths=_three, changes=_routing(1, 1)),
    "many_partitions": Hazard(doc="N = 33, no power of two", lengths=_three, changes=_routing(33, 2)),
    "more_readers": Hazard(doc="read_k > top_k: rows that only read", lengths=_three, changes=_routing(4, 1, 3)),
    "fewer_readers": Hazard(doc="read_k < top_k: rows that only write", lengths=_three, changes=_routing(4, 3, 1)),
    "no_shared": Hazard(doc="no always-on partition", lengths=_three, changes=(("shared", False), *_routing(4, 2))),
    "plain": Hazard(doc="the always-on stream alone", lengths=_three, changes=_PLAIN),
    "plain_batch": Hazard(doc="the always-on stream alone, one row", changes=_PLAIN, states=False),
    "norm_none": Hazard(doc="router weight on unnormalised q and k", lengths=_three, changes=(("norm", "none"),)),
    "norm_after": Hazard(doc="router weight on normalised q and k", lengths=_three, changes=(("norm", "after"),)),
    "norm_before": Hazard(doc="norm of the weighted q and k", lengths=_three, changes=(("norm", "before"),)),
    "one_token": Hazard(doc="T = 1", changes=(("batch", 1), ("seq_len", 1), ("num_sequences", None))),
    "batch": Hazard(doc="three rows of C + 1 tokens", changes=(("batch", 3), ("num_sequences", None))),
    "io_gates": Hazard(doc="g, beta and the logits in the problem's dtype; another scale", lengths=_three,
                       gate_dtype="io", scale=0.5),
    "fp32_gates": Hazard(doc="g in fp32 beside keys of 16 bits", lengths=_three, gate_dtype="fp32", rules=("gla",)),
    "large_keys": Hazard(
        doc="keys of norm 1000: fp16 overflows unless the row scales stay fp32",
        lengths=_three, keys="large", changes=(("norm", "after"),),
    ),
    "sizes_48_80": Hazard(doc="K = 48, V = 80: tiles too wide", lengths=_three, changes=_sizes(48, 80), needs="full"),
    "sizes_24_40": Hazard(doc="K = 24, V = 40: tiles too wide", lengths=_three, changes=_sizes(24, 40)),
    "sizes_96": Hazard(doc="K = V = 96", lengths=_three, changes=_sizes(96, 96), needs="full"),
    "sizes_256_512": Hazard(doc="the largest states", lengths=_three, changes=_sizes(256, 512), needs="full"),
    "short_sequences": Hazard(
        doc="4096 sequences of one token", lengths=lambda c, tiny: (1,) * 4096, changes=_sizes(32, 32), heads=1,
        checked_sequences=128, needs="full",
    ),
    "drift": Hazard(doc="12288 tokens: errors must not grow", lengths=lambda c, tiny: (12288,), heads=1, needs="full"),
    "long_drift": Hazard(doc="131072 tokens", lengths=lambda c, tiny: (131072,), heads=1, needs="big",
                         repeats=1),
    "crowded": Hazard(
        doc="enough blocks to fill a GPU many times over: a race shows as other bits on a repeat",
        lengths=lambda c, tiny: (2048,), heads=32, needs="big", repeats=20,
    ),
    "many_blocks": Hazard(
        doc="more segments and chunks than a grid's y and z may count", lengths=lambda c, tiny: (1, 2) * 35000,
        changes=_sizes(32, 32), heads=1, checked_sequences=64, needs="big",
    ),
    "far_offsets": Hazard(
        doc="R·H·K > 2^31: offsets of rows need 64 bits", lengths=lambda c, tiny: (2**20 + 77, 2 * c + 3), states=False,
        changes=(("shared", False), *_routing(2, 1), *_sizes(64, 64)), heads=32, checked_sequences=1, needs="big",
        repeats=1,
    ),
}  # fmt: skip

# what every config of a stage must pass: of the problem's own layout, so that what was compiled to time it serves
OWN = ("ordinary", "own_gates", "own_keys")
# what every whole plan must pass
QUICK = ("ordinary", "gates", "lengths", "duplicate_keys")
# what a winner must pass besides: hazards of the numbers alone, for which nothing more is compiled
FINAL = (
    *QUICK, *OWN[1:], "silu_keys", "no_decay", "full_decay", "equal_logits", "infinite_logits", "underflowing_weights",
    "hot_partition", "empty_partitions",
)  # fmt: skip


def scale_of(device: Device) -> str:
    """What a device is given: "tiny" on a CPU, "full" on a GPU, "big" on one with memory for 64-bit offsets."""
    if device.kind != "cuda":
        return "tiny"
    return "big" if device.memory_bytes >= _BIG_MEMORY_BYTES else "full"


def case_names(problem: Problem, *, quick: bool, scale: str) -> tuple[str, ...]:
    """The hazards that concern a problem's rule, at a scale."""
    if quick:
        return QUICK
    # fp32 would need twice the memory for the same offsets
    largest = "full" if scale == "big" and problem.dtype == "fp32" else scale
    allowed = SCALES[: SCALES.index(largest) + 1]
    return tuple(name for name, hazard in CASES.items() if hazard.needs in allowed and problem.rule in hazard.rules)


def case_problem(name: str, problem: Problem, chunk_size: int, scale: str) -> tuple[Problem, tuple[int, ...]]:
    """The problem of a hazard, taken from the one at hand, and its sequence lengths."""
    if name not in CASES:
        raise ProblemError("the hazard must be known", f"{name!r}", f"choose one of {', '.join(CASES)}")
    hazard, tiny = CASES[name], scale == "tiny"
    c = min(chunk_size, 16) if tiny else chunk_size
    heads = hazard.heads if hazard.heads is not None else (min(problem.num_heads, 2))
    fields: dict[str, object] = {"num_heads": heads}
    if tiny:
        fields |= {"head_dim": min(problem.key_dim, 32), "head_dim_v": min(problem.value_dim, 32)}
        if problem.num_partitions > 8:
            fields |= dict(_routing(8, min(problem.top_k, 3), min(problem.readers, 3)))
    changes = dict(hazard.changes)
    concerns_router = hazard.logits != "random" or "shared" in changes
    if problem.num_partitions == 0 and "num_partitions" not in changes and concerns_router:
        changes |= dict(_routing(4, 2))  # a hazard of the router needs one
    fields |= changes
    if hazard.lengths is not None:
        lengths = hazard.lengths(c, tiny)
        fields |= {"batch": 1, "seq_len": sum(lengths), "num_sequences": len(lengths)}
    else:
        if hazard.own_kernels and not tiny:
            fields["num_heads"] = problem.num_heads
        # divisible by 16 where the problem's own length is: compilers specialise on that
        sequences = problem.num_sequences if "num_sequences" not in changes else None
        usual = 4 * c + 16 if not tiny else 4 * c if sequences is not None else 2 * c
        seq_len = int(str(changes.get("seq_len", c + 1 if name == "batch" else usual)))
        if sequences is not None:
            short = min(sequences, 3)
            lengths = (seq_len - (short - 1) * (c + 1), *((c + 1,) * (short - 1)))
            fields |= {"num_sequences": short}
        else:
            rows = int(str(changes.get("batch", min(problem.batch, 2))))
            lengths = (seq_len,) * rows
            fields |= {"batch": rows}
        fields |= {"seq_len": seq_len}
    return problem.replace(**fields), lengths
