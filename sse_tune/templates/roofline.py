"""The floor of a problem: how long each stage must take at least, given how fast a device copies and multiplies.

A stage takes no less than its bytes at the copy rate, nor less than its FLOPs at the matrix rate; both follow from
`stages.py`. Where a step of a walk has a declared length, a stage that walks takes no less than its dependent steps
either, nor than the steps that fall to one of the blocks which run at a time: what few heads and long sequences wait
for. The floor of the staged graph is the sum over its stages, since buffers between them go through memory. A backend
that fuses stages can be faster than that sum, never faster than `fused_us`. `bench` puts measured rates in and no
step; a search, which only compares outer choices with each other, the declared ones of `DATA_CENTRE`.
"""

from __future__ import annotations

import dataclasses

from sse_tune.device import Device
from sse_tune.problem import Problem
from sse_tune.space import Config
from sse_tune.templates.buffers import BUFFERS, ITEM_BYTES, Sizes
from sse_tune.templates.outer import walk_steps
from sse_tune.templates.stages import GRAPHS, Stage, stages_of


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a device does at most, measured: bytes read and written, and FLOPs of a matrix product.

    `step_us`: of a walk of GDN's, a chunk of 64 rows; 0: not known, and no part of the floor. There is no bound to be
    measured.
    """

    copy_bytes_per_s: float
    matmul_flops_per_s: float
    step_us: float = 0.0


@dataclasses.dataclass(frozen=True)
class StageFloor:
    """The least time of one stage: the longest of moving its bytes, doing its FLOPs and walking its chunks."""

    name: str
    bytes: int
    flops: float
    memory_us: float
    compute_us: float
    walk_us: float = 0.0

    @property
    def time_us(self) -> float:
        return max(self.memory_us, self.compute_us, self.walk_us)


@dataclasses.dataclass(frozen=True)
class Floor:
    """The least time of a problem.

    Args:
        ceilings: what it was computed from.
        stages: of the staged graph.
        fused_us: a bound for any implementation: inputs and results once, and the same FLOPs.
    """

    ceilings: Ceilings
    stages: tuple[StageFloor, ...]
    fused_us: float

    @property
    def time_us(self) -> float:
        return sum(stage.time_us for stage in self.stages)


BLOCKS_PER_MULTIPROCESSOR = 2  # of a walk, at a time

# what a search counts with: the ratio of the two rates decides, and data-centre GPUs do not differ much in it; steps as
# long as today's are, since what is compared is how to avoid them
DATA_CENTRE = Ceilings(3e12, 300e12, step_us=4.0)


def floor_of(problem: Problem, device: Device, ceilings: Ceilings, outer: Config | None = None) -> Floor:
    """The least time of a problem at the given ceilings.

    Args:
        problem: what is computed.
        device: whose constraints the default outer choices must pass.
        ceilings: of that device.
        outer: outer choices of the staged graph; None: its defaults.
    """
    chosen = outer if outer else GRAPHS["staged"].default(problem, device)
    stages = tuple(
        StageFloor(
            stage.name,
            moved := stage_bytes(stage, problem, chosen),
            flops := _stage_flops(stage, problem, int(chosen["chunk_size"])),
            1e6 * moved / ceilings.copy_bytes_per_s,
            1e6 * flops / ceilings.matmul_flops_per_s,
            stage.walks * _walk_us(Sizes.of(problem, chosen), device, ceilings),
        )
        for stage in stages_of(problem, chosen)
    )
    compute_us = sum(stage.compute_us for stage in stages)
    return Floor(ceilings, stages, max(compute_us, 1e6 * call_bytes(problem, chosen) / ceilings.copy_bytes_per_s))


def call_bytes(problem: Problem, outer: Config) -> int:
    """The tensors of a call, each once: what even a single kernel must move."""
    touched = {name for stage in stages_of(problem, outer) for name in (*stage.reads, *stage.writes)}
    item, heads = ITEM_BYTES[problem.dtype], problem.num_heads
    tokens = problem.batch * problem.seq_len
    gate = problem.key_dim if problem.rule == "gla" else 1
    widths = {
        "q": problem.key_dim,
        "k": problem.key_dim,
        "v": problem.value_dim,
        "o": problem.value_dim,
        "g": gate,
        "beta": 1,
    }
    total = 0
    for name in touched - BUFFERS.keys():
        plain = name.removeprefix("d_").removeprefix("shared_") if name != "do" else "o"
        streams = 2 if problem.shared and problem.num_partitions and name in ("q", "k", "g", "beta") else 1
        if plain == "router_logits":
            total += tokens * problem.num_partitions * 4
        elif plain in widths:
            total += streams * tokens * heads * widths[plain] * item
    return total  # states and cu_seqlens, a few kilobytes a sequence, are left out


def _walk_us(sizes: Sizes, device: Device, ceilings: Ceilings) -> float:
    """The time of a walk's steps: the longest one's, or if that is more what falls to each block of the device."""
    longest, total = walk_steps(sizes)
    step_us = ceilings.step_us * sizes.chunk_size / 64
    return step_us * max(longest, total / (BLOCKS_PER_MULTIPROCESSOR * device.multiprocessors))


def _stage_flops(stage: Stage, problem: Problem, chunk_size: int) -> float:
    """FLOPs of a stage over all rows and heads, padding not counted."""
    rows = problem.batch * problem.seq_len * problem.lanes
    return stage.flops(problem, chunk_size) * rows * problem.num_heads


def stage_bytes(stage: Stage, problem: Problem, outer: Config) -> int:
    """Bytes a stage must move: every input and output once, gathered rows once per row."""
    sizes = Sizes.of(problem, outer)
    item = ITEM_BYTES[problem.dtype]
    row_heads = sizes.rows * problem.num_heads
    token_heads = sizes.tokens * problem.num_heads
    gate_width = problem.key_dim if problem.rule == "gla" else 1
    states = sizes.segments * problem.num_heads * problem.key_dim * problem.value_dim * 4
    logits = sizes.tokens * problem.num_partitions * 4
    per_row = {
        "q": problem.key_dim * item, "k": problem.key_dim * item, "v": problem.value_dim * item,
        "do": problem.value_dim * item, "g": gate_width * item, "beta": item,
    }
    per_token = {
        "o": problem.value_dim * item, "d_v": problem.value_dim * item,
    }
    for stream in ("d_", "d_shared_"):
        per_token |= {
            f"{stream}q": problem.key_dim * item, f"{stream}k": problem.key_dim * item,
            f"{stream}g": gate_width * item, f"{stream}beta": item,
        }
    whole = {
        "router_logits": logits, "d_router_logits": logits, "cu_seqlens": 4 * (problem.sequences + 1),
        "initial_state": states, "final_state": states, "d_initial_state": states, "d_final_state": states,
    }
    total = 0
    for name in (*stage.reads, *stage.writes):
        if name in BUFFERS:
            total += BUFFERS[name].bytes(sizes, outer)
        elif name in per_row:
            total += per_row[name] * row_heads
        elif name in per_token:
            total += per_token[name] * token_heads
        else:
            total += whole[name]
    return total
