"""The contract between stages: what its buffers take."""

import pytest
import torch

from sse_tune.device import ARCHS
from sse_tune.problem import Problem
from sse_tune.space import Config
from sse_tune.templates.buffers import BUFFERS, Sizes
from sse_tune.templates.roofline import stage_bytes
from sse_tune.templates.stages import GRAPHS, stage_contract, stages_of

OUTERS = {
    rule: tuple(Config(chunk_size=64, state_dtype="io", states=states, split=split) for states, split in choices)
    for rule, choices in {
        "gdn": (("recompute", 0), ("recompute", 16), ("store", 0), ("store", 16)),
        "gla": (("store", 0), ("joint", 0), ("recompute", 0)),
    }.items()
}
PRESETS = ("spikingbrain2-5b", "sse-gla", "sse-gdn", "sse-gla-128")


def buffers_of(problem, outer):
    stages = stages_of(problem, outer)
    return {name for stage in stages for name in (*stage.reads, *stage.writes) if name in BUFFERS}


@pytest.mark.parametrize("preset", PRESETS)
def test_memory_does_not_grow_with_partitions_beyond_the_states(preset):
    few, many = (Problem.preset(preset, num_partitions=n) for n in (4, 256))
    for outer in OUTERS[many.rule]:
        grown = {
            name: BUFFERS[name].bytes(Sizes.of(many, outer), outer) - BUFFERS[name].bytes(Sizes.of(few, outer), outer)
            for name in buffers_of(many, outer)
        }
        # tables of a few integers for each segment and chunk, and one number for each chunk and key
        assert {name for name, more in grown.items() if more} <= {
            "segment_rows", "segment_chunks", "segment_boundaries", "chunk_table", "h_dh", "decay",
        }  # fmt: skip
        states = (256 - 4) * many.num_heads * many.key_dim * many.value_dim * 4
        assert sum(grown.values()) < 0.05 * states


def test_every_buffer_is_written_once_before_it_is_read():
    for rule, outer in [(name, outer) for name, outers in OUTERS.items() for outer in outers]:
        written = set()
        for stage in stages_of(Problem.preset("spikingbrain2-5b", rule=rule), outer):
            assert {name for name in stage.reads if name in BUFFERS} <= written, stage.name
            assert not written & {name for name in stage.writes if name in BUFFERS}, stage.name
            written |= {name for name in stage.writes if name in BUFFERS}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("lengths", [(8192,), (1, 63, 64, 65, 0, 127, 128), (1,) * 300])
def test_static_bounds_hold_for_any_routing(preset, lengths):
    """The bounds on chunks and boundaries, against the worst that rows can do to them."""
    problem = Problem.preset(preset, seq_len=sum(lengths), num_sequences=len(lengths))
    sizes = Sizes(problem, 64)
    rows = list(lengths)
    for length in lengths:
        sparse = length * problem.top_k
        # as many segments as can be with one row in their last chunk
        parts = [64 * (sparse // problem.num_partitions // 64) + 1] * (problem.num_partitions - 1)
        parts = parts if sum(parts) <= sparse else [0] * (problem.num_partitions - 1)
        rows += [*parts, sparse - sum(parts)]
    assert sum(rows) == sizes.rows
    assert sum(-(-n // 64) for n in rows) <= sizes.chunks
    assert sum(max(-(-n // 64) - 1, 0) for n in rows) <= sizes.boundaries


@pytest.mark.parametrize("rule", ["gdn", "gla"])
def test_the_always_on_stream_alone_sums_up_nothing(rule):
    """Its rows are the tokens: a copy of them would be a tenth of the forward pass."""
    beside = Problem.preset("spikingbrain2-5b", rule=rule)
    alone = beside.replace(num_partitions=0, top_k=0, read_k=0)
    for outer in OUTERS[rule]:
        names, fewer = ([stage.name for stage in stages_of(problem, outer)] for problem in (beside, alone))
        assert fewer == [name for name in names if name not in ("combine", "combine_gradients")]
        touched = {name for stage in stages_of(alone, outer) for name in (*stage.reads, *stage.writes)}
        assert {"o", "d_v"} <= touched and not touched & {"o_rows", "dv_rows"}


@pytest.mark.parametrize("split", [1, 2, 16])
def test_slots_and_windows_hold_one_group_each(split):
    """Whatever the segments: what lies between two groups has a slot of its own, and no window of the chunk table the
    start, or the end, of two groups."""
    random = torch.Generator().manual_seed(split)
    for _ in range(20):
        lengths = torch.randint(0, 9, (7,), generator=random) * torch.randint(1, 9, (7,), generator=random)
        rows = (64 * split * lengths // 4 + torch.randint(-3, 4, (7,), generator=random)).clamp(min=0).tolist()
        problem = Problem.preset("sse-gdn", seq_len=max(1, sum(rows)), num_partitions=7, top_k=1, shared=False)
        sizes, slots, starts, ends = Sizes(problem, 64, split), [], [], []
        chunk = boundary = 0
        for n in rows:
            chunks = -(-n // 64)
            for group in range(-(-chunks // split) - 1):  # what lies between it and the next one
                slots.append((boundary + (group + 1) * split - 1) // split)
                ends.append((chunk + (group + 1) * split - 1) // split)
                starts.append((chunk + (group + 1) * split) // split)
            chunk, boundary = chunk + chunks, boundary + max(chunks - 1, 0)
        assert slots == sorted(set(slots))
        assert all(slot < sizes.group_slots for slot in slots)
        for windows in (starts, ends):
            assert windows == sorted(set(windows))
            assert all(window < sizes.windows for window in windows)


def test_only_stages_that_walk_see_how_segments_are_split():
    problem = Problem.preset("spikingbrain2-5b", seq_len=2048)
    outers = [OUTERS["gdn"][0].replace(split=split) for split in (0, 64, 128)]  # groups longer than the sequence
    for name in [stage.name for stage in stages_of(problem, outers[1])]:
        seen = {
            stage_contract(name, problem, outer)
            for outer in outers
            if name in {stage.name for stage in stages_of(problem, outer)}
        }
        walks = {"group_states": 2, "group_gradients": 2, "scan": 3, "recompute": 3, "state_gradient": 3}
        assert len(seen) == walks.get(name, 1), name


@pytest.mark.parametrize("split", [0, 16])
def test_keeping_states_changes_the_scan_alone(split):
    """What was measured of all other stages holds at both outer points."""
    problem = Problem.preset("spikingbrain2-5b")
    again, kept = (OUTERS["gdn"][0].replace(states=states, split=split) for states in ("recompute", "store"))
    names, fewer = ([stage.name for stage in stages_of(problem, outer)] for outer in (again, kept))
    assert fewer == [name for name in names if name != "recompute"]
    differ = {name for name in fewer if stage_contract(name, problem, again) != stage_contract(name, problem, kept)}
    assert differ == {"scan"}


@pytest.mark.parametrize(
    ("rule", "direction", "default", "choices"),
    [
        ("gdn", "fwd+bwd", "recompute", {"recompute", "store"}),
        ("gdn", "fwd", "recompute", {"recompute"}),  # there is no backward pass to keep them for
        ("gla", "fwd+bwd", "store", {"recompute", "store", "joint"}),
        ("gla", "fwd", "store", {"recompute", "store", "joint"}),
    ],
)
def test_states_are_a_choice_with_a_default_for_each_rule(rule, direction, default, choices):
    problem, space = Problem.preset("sse-gla-128", rule=rule, direction=direction), GRAPHS["staged"]
    assert {outer["states"] for outer in space.configs(problem, ARCHS["sm_90"])} == choices
    assert space.default(problem, ARCHS["sm_90"])["states"] == default
    assert space.by_nearness(problem, ARCHS["sm_90"])[0]["states"] == default


def test_the_roofline_counts_what_is_kept():
    """At 8192 tokens 603 MB are written by the scan instead of by a walk of their own, and read as before."""
    problem = Problem.preset("spikingbrain2-5b", seq_len=8192)
    again, kept = OUTERS["gdn"][0], OUTERS["gdn"][2]
    sizes = Sizes.of(problem, kept)
    both = BUFFERS["h"].bytes(sizes, kept) + BUFFERS["w"].bytes(sizes, kept)
    assert 600e6 < both < 606e6
    by_name = [{stage.name: stage_bytes(stage, problem, o) for stage in stages_of(problem, o)} for o in (again, kept)]
    assert by_name[1]["scan"] - by_name[0]["scan"] == both
    assert by_name[0]["recompute"] > both
    assert all(by_name[1][name] == by_name[0][name] for name in by_name[1] if name != "scan")


@pytest.mark.parametrize(
    ("rule", "dtype", "expected"),
    [("gla", "bf16", "bf16"), ("gla", "fp16", "fp32"), ("gla", "fp32", "fp32"), ("gdn", "bf16", "fp32")],
)
def test_parts_of_the_gates_gradients_are_16_bits_only_where_their_range_fits(rule, dtype, expected):
    problem = Problem.preset("sse-gla-128").replace(rule=rule, dtype=dtype)
    outer = GRAPHS["staged"].default(problem, ARCHS["sm_90"])
    assert BUFFERS["dg_rows"].dtype_in(problem, outer) == expected
