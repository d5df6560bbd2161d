"""What to compute: `Problem`, the presets of released models, and the bucket of problems that share one answer."""

from __future__ import annotations

import dataclasses
import math
import re

from sse_tune.errors import ProblemError

RULES = ("gla", "gdn")
DTYPES = ("bf16", "fp16", "fp32")
NORMS = ("none", "after", "before")
DIRECTIONS = ("fwd", "fwd+bwd")
MAX_HEAD_DIM = 256
MAX_HEAD_DIM_V = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One SSE operation, by its sizes.

    Args:
        rule: "gla" (log-gate per key dimension) or "gdn" (scalar log-gate and a delta rule with beta).
        seq_len: T, tokens per batch row; with `num_sequences` set, all packed tokens together.
        num_heads: H.
        head_dim: K, 1..256.
        head_dim_v: V, 1..512; None: K.
        batch: B; 1 when packed.
        num_partitions: N sparse partitions; 0: the always-on stream alone.
        top_k: partitions each token writes; 0 exactly when `num_partitions` is 0.
        read_k: partitions each token reads; None: `top_k`.
        shared: whether there is an always-on partition.
        norm: "none"; "after": the router's gate multiplies l2-normalised keys and queries; "before": the norm is
            taken of the gated ones.
        dtype: of q, k, v and o: "bf16", "fp16" or "fp32".
        num_sequences: S packed sequences given by `cu_seqlens`; None: B rows of T tokens.
        direction: "fwd", or "fwd+bwd" for training.

    Raises:
        ProblemError: a bound above does not hold.
    """

    rule: str
    seq_len: int
    num_heads: int
    head_dim: int
    head_dim_v: int | None = None
    batch: int = 1
    num_partitions: int = 4
    top_k: int = 2
    read_k: int | None = None
    shared: bool = True
    norm: str = "none"
    dtype: str = "bf16"
    num_sequences: int | None = None
    direction: str = "fwd+bwd"

    def __post_init__(self) -> None:
        if self.head_dim_v is None:
            object.__setattr__(self, "head_dim_v", self.head_dim)
        if self.read_k is None:
            object.__setattr__(self, "read_k", self.top_k)
        for name, allowed in (("rule", RULES), ("dtype", DTYPES), ("norm", NORMS), ("direction", DIRECTIONS)):
            if getattr(self, name) not in allowed:
                raise ProblemError(
                    f"`{name}` must be one of {', '.join(allowed)}",
                    f"{name}={getattr(self, name)!r}",
                    f"choose one of {', '.join(allowed)}",
                )
        for name, low, high in (
            ("batch", 1, None),
            ("seq_len", 1, None),
            ("num_heads", 1, None),
            ("head_dim", 1, MAX_HEAD_DIM),
            ("head_dim_v", 1, MAX_HEAD_DIM_V),
            ("num_partitions", 0, 1024),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low or (high and value > high):
                bound = f"{low}..{high}" if high else f"at least {low}"
                raise ProblemError(f"`{name}` must be an integer, {bound}", f"{name}={value!r}", "change the size")
        if self.num_partitions == 0:
            if self.top_k or self.read_k or not self.shared:
                raise ProblemError(
                    "without sparse partitions only the always-on stream runs: top_k = read_k = 0 and shared",
                    f"top_k={self.top_k}, read_k={self.read_k}, shared={self.shared}",
                    "set num_partitions, or top_k=0 and shared=True",
                )
        else:
            for name in ("top_k", "read_k"):
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= self.num_partitions:
                    raise ProblemError(
                        f"1 <= {name} <= N must hold",
                        f"{name}={value!r}, N={self.num_partitions}",
                        f"pass a {name} between 1 and the number of partitions",
                    )
        if self.num_sequences is not None and (self.batch != 1 or self.num_sequences < 1):
            raise ProblemError(
                "packed sequences need batch 1 and at least one sequence",
                f"batch={self.batch}, num_sequences={self.num_sequences}",
                "concatenate the sequences along T",
            )

    @classmethod
    def preset(cls, name: str, **changes: object) -> Problem:
        """The problem of a released model or configuration, with any field changed by keyword.

        Raises:
            ProblemError: no such preset, or no such field.
        """
        if name not in PRESETS:
            raise ProblemError("the preset must be known", f"{name!r}", f"choose one of {', '.join(PRESETS)}")
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(changes) - fields)
        if unknown:
            known = ", ".join(sorted(fields))
            raise ProblemError("a problem's fields must be known", ", ".join(unknown), f"use {known}")
        return cls(**{"seq_len": 8192, **PRESETS[name], **changes})  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, fields: dict[str, object]) -> Problem:
        """The inverse of `to_dict`; refuses unknown and missing fields."""
        known = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != known:
            raise ProblemError(
                "a stored problem has exactly the fields of `Problem`",
                f"unknown {sorted(set(fields) - known)}, missing {sorted(known - set(fields))}",
                "export it again with this version",
            )
        return cls(**fields)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    def replace(self, **changes: object) -> Problem:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def key_dim(self) -> int:
        return self.head_dim

    @property
    def value_dim(self) -> int:
        assert self.head_dim_v is not None
        return self.head_dim_v

    @property
    def gate_dtype(self) -> str:
        """Of the log-gates as the layers hand them over, and as plans are compiled and timed; calls take fp32 ones and
        the problem's dtype. GLA's are as wide as the keys, and in their dtype as in its authors' layers."""
        return self.dtype if self.rule == "gla" else "fp32"

    @property
    def readers(self) -> int:
        assert self.read_k is not None
        return self.read_k

    @property
    def lanes(self) -> int:
        """Rows a token takes part in: the shared one, if any, first, then one per partition it reads or writes."""
        return int(self.shared) + max(self.top_k, self.readers)

    @property
    def sequences(self) -> int:
        """S, sequences with states of their own."""
        return self.num_sequences or self.batch

    @property
    def partitions(self) -> int:
        """States per sequence: the shared one, if any, and N."""
        return int(self.shared) + self.num_partitions

    @property
    def trains(self) -> bool:
        return self.direction == "fwd+bwd"

    @property
    def bucket(self) -> Bucket:
        rows = self.batch * self.seq_len * self.lanes * self.num_heads
        return Bucket(
            rule=self.rule,
            dtype=self.dtype,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            head_dim_v=self.value_dim,
            num_partitions=self.num_partitions,
            top_k=self.top_k,
            read_k=self.readers,
            shared=self.shared,
            norm=self.norm,
            packed=self.num_sequences is not None,
            direction=self.direction,
            rows_log2=math.ceil(math.log2(rows)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """The problems that share one tuned answer: all sizes but the length, and the power of two of rows × heads."""

    rule: str
    dtype: str
    num_heads: int
    head_dim: int
    head_dim_v: int
    num_partitions: int
    top_k: int
    read_k: int
    shared: bool
    norm: str
    packed: bool
    direction: str
    rows_log2: int

    @property
    def name(self) -> str:
        """A file name that says all: `gdn-bf16-h32-k128-v128-n4-t2r2-shared-before-fwd+bwd-2p20`."""
        return "-".join(
            (
                self.rule,
                self.dtype,
                f"h{self.num_heads}",
                f"k{self.head_dim}",
                f"v{self.head_dim_v}",
                f"n{self.num_partitions}",
                f"t{self.top_k}r{self.read_k}",
                "shared" if self.shared else "alone",
                self.norm,
                "packed" if self.packed else "batch",
                self.direction,
                f"2p{self.rows_log2}",
            )
        )

    @classmethod
    def from_name(cls, name: str) -> Bucket:
        """The inverse of `name`.

        Raises:
            ProblemError: `name` is not a bucket's.
        """
        match = _BUCKET_NAME.fullmatch(name)
        if match is None:
            raise ProblemError("a bucket's name must have its twelve parts", f"{name!r}", "see Bucket.name")
        part = match.groupdict()
        return cls(
            rule=part["rule"],
            dtype=part["dtype"],
            num_heads=int(part["h"]),
            head_dim=int(part["k"]),
            head_dim_v=int(part["v"]),
            num_partitions=int(part["n"]),
            top_k=int(part["t"]),
            read_k=int(part["r"]),
            shared=part["shared"] == "shared",
            norm=part["norm"],
            packed=part["packed"] == "packed",
            direction=part["direction"],
            rows_log2=int(part["log2"]),
        )


_BUCKET_NAME = re.compile(
    rf"(?P<rule>{'|'.join(RULES)})-(?P<dtype>{'|'.join(DTYPES)})-h(?P<h>\d+)-k(?P<k>\d+)-v(?P<v>\d+)-n(?P<n>\d+)"
    rf"-t(?P<t>\d+)r(?P<r>\d+)-(?P<shared>shared|alone)-(?P<norm>{'|'.join(NORMS)})-(?P<packed>packed|batch)"
    rf"-(?P<direction>fwd\+bwd|fwd)-2p(?P<log2>\d+)"
)

# Where each comes from: docs/presets.md. `demo` is small enough to tune on two CPU cores within a minute.
PRESETS: dict[str, dict[str, object]] = {
    "spikingbrain2-5b": dict(rule="gdn", num_heads=32, head_dim=128, num_partitions=4, top_k=2, norm="before"),
    "sse-gla": dict(rule="gla", num_heads=6, head_dim=256, num_partitions=4, top_k=2),
    "sse-gdn": dict(
        rule="gdn", num_heads=6, head_dim=256, head_dim_v=512, num_partitions=4, top_k=1, norm="before"
    ),
    "sse-gla-128": dict(rule="gla", num_heads=16, head_dim=128, num_partitions=4, top_k=1),
    "demo": dict(rule="gdn", seq_len=1024, num_heads=8, head_dim=16, norm="after", dtype="fp32"),
}
