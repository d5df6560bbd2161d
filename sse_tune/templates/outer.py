"""The outer choices of the staged graph: what its stages share, and what limits it before any template is asked."""

from __future__ import annotations

from sse_tune.space import Config, Constraint, Param, Space
from sse_tune.templates.buffers import Sizes

WALK_COLUMNS = 64  # of V, in the blocks that the load of a walk is counted by


def walk_steps(sizes: Sizes) -> tuple[float, float]:
    """Of a stage that walks, a step being one chunk of one head and WALK_COLUMNS columns of V: those that wait for one
    another in the longest walk, and all."""
    longest = min(sizes.split, sizes.longest_chunks) if sizes.split else sizes.longest_chunks
    tiles = -(-sizes.problem.value_dim // WALK_COLUMNS)
    return longest, sizes.rows / sizes.chunk_size * sizes.problem.num_heads * tiles


STAGE_CHOICES = ("states", "split")  # which stages there are; the other choices are how they work

STAGED_OUTER = Space(
    params=(
        Param("chunk_size", (16, 32, 64, 128), 64, "C, rows of one chunk"),
        Param("state_dtype", ("io", "fp32"), "io", "of the stored chunk states: the problem's dtype, or fp32"),
        Param("states", ("recompute", "store", "joint"), "recompute",
              "gone through with the output, and once more for the gradients; or kept at boundaries the first time; "
              "or kept by walks that make the rows too (GLA)",
              rule_defaults=(("gla", "store"),)),
        Param("split", (0, 16, 32, 64, 128), 0, "GDN: chunks of a group, all groups walked side by side; 0: no groups"),
    ),
    constraints=(
        # every row tile is held in registers next to the state: C·K fp32 beyond this spills on all targets
        Constraint("chunk_size * K <= 16384", lambda p, c, d: c["chunk_size"] * p.head_dim <= 16384),
        Constraint("C=128 needs 16-bit operands", lambda p, c, d: c["chunk_size"] < 128 or p.dtype != "fp32"),
        Constraint("fp32 states differ from io only for 16-bit dtypes in training",
                   lambda p, c, d: c["state_dtype"] == "io" or (p.dtype != "fp32" and p.trains)),
        Constraint("GDN's scan makes its rows with the states already, see `store`",
                   lambda p, c, d: p.rule == "gla" or c["states"] != "joint"),
        # a forward pass alone would be the same plan under both names
        Constraint("GDN keeps its states for the backward pass only",
                   lambda p, c, d: p.rule == "gla" or c["states"] == "recompute" or p.trains),
        Constraint("GLA splits nothing: stored states do without a walk, see `states`",
                   lambda p, c, d: c["split"] == 0 or p.rule == "gdn"),
        Constraint("a transition of K * K fits in a block's registers up to K = 128",
                   lambda p, c, d: c["split"] == 0 or p.key_dim <= 128),
    ),
)


def forward_part(rule: str, outer: Config) -> Config:
    """A training plan's choices for its forward stages alone: nothing is kept for a backward pass."""
    alone: dict[str, str] = {"state_dtype": "io"} | ({"states": "recompute"} if rule == "gdn" else {})
    return outer.replace(**{name: value for name, value in alone.items() if name in outer})
