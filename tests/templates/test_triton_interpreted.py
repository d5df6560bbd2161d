"""Every Triton template in Triton's interpreter, against the reference: small sizes, fp32, all the roles of rows.

What runs here is what a GPU would run, kernel by kernel and mask by mask; what it cannot show is the compiler, the
precision of tensor cores and races. Buffers are poisoned, so a row or a tail nobody wrote shows as NaN.
"""

import dataclasses

import pytest
import torch

from sse_tune.plan import StageChoice
from sse_tune.problem import Problem
from sse_tune.reference import route
from sse_tune.runtime.pipeline import Execution
from sse_tune.space import Config
from sse_tune.templates import registry
from sse_tune.templates.buffers import Sizes
from sse_tune.templates.registry import default_plan, templates_for, templates_of
from sse_tune.templates.stages import GRAPHS, stages_of
from sse_tune.templates.triton.gla_gates import FAR_FLAGS
from tests.templates.against_reference import DEVICE, compare, kernels, make_inputs, outer_of, problem_of

pytestmark = pytest.mark.interpret

INF = float("inf")
RULES = pytest.mark.parametrize("rule", ["gla", "gdn"])
ROUTINGS = pytest.mark.parametrize("template", ["routing", "routing_recount"])
NORMS = pytest.mark.parametrize("norm", ["none", "after", "before"])


@RULES
@NORMS
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "alone"])
def test_matches_the_reference(rule, norm, shared, poisoned_empty):
    problem = problem_of(rule, norm, seq_len=35, num_partitions=4, shared=shared, head_dim_v=32)
    compare(problem, make_inputs(problem, initial=True), poisoned_empty, outer=outer_of(problem, chunk_size=16))


@RULES
@NORMS
def test_plain(rule, norm, poisoned_empty):
    problem = problem_of(rule, norm, num_partitions=0, top_k=0, batch=2, seq_len=19)
    compare(problem, make_inputs(problem), poisoned_empty, outer=outer_of(problem, chunk_size=16))


@RULES
@pytest.mark.parametrize(("top_k", "read_k"), [(1, 3), (3, 1), (2, 4)])
def test_readers_unlike_writers(rule, top_k, read_k, poisoned_empty):
    problem = problem_of(rule, "after", num_partitions=4, top_k=top_k, read_k=read_k, shared=top_k != 2)
    compare(problem, make_inputs(problem), poisoned_empty, outer=outer_of(problem, chunk_size=16))


@RULES
@pytest.mark.parametrize("lengths", [(0, 7, 0, 0, 17, 16, 0), (0, 0, 1), (1,) * 9, (15, 1, 16)], ids=str)
def test_packed_sequences(rule, lengths, poisoned_empty):
    problem = problem_of(rule, "before", seq_len=sum(lengths), num_sequences=len(lengths), num_heads=1)
    inputs = make_inputs(problem, list(lengths), initial=True)
    compare(problem, inputs, poisoned_empty, outer=outer_of(problem, chunk_size=16))


# chunks of 128 take 16-bit operands, and of GDN more shared memory than sm_90 has
@pytest.mark.parametrize(("rule", "chunk_size"), [("gla", 32), ("gla", 64), ("gla", 128), ("gdn", 32), ("gdn", 64)])
def test_chunk_sizes(rule, chunk_size, poisoned_empty):
    dtype = "fp16" if chunk_size == 128 else "fp32"
    problem = problem_of(rule, "after", seq_len=40, num_heads=1, num_partitions=2, top_k=1, dtype=dtype)
    compare(problem, make_inputs(problem), poisoned_empty, outer=outer_of(problem, chunk_size=chunk_size))


@RULES
@pytest.mark.parametrize(("key_dim", "value_dim"), [(8, 32), (24, 20), (32, 5), (1, 1)])
def test_head_sizes(rule, key_dim, value_dim, poisoned_empty):
    problem = problem_of(rule, head_dim=key_dim, head_dim_v=value_dim, seq_len=20, num_heads=2)
    inputs = make_inputs(problem, initial=True)
    compare(problem, inputs, poisoned_empty, outer=outer_of(problem, chunk_size=16))


@RULES
@pytest.mark.parametrize(
    "changes",
    [dict(seq_len=1), dict(num_partitions=1, top_k=1), dict(num_partitions=5, top_k=4), dict(batch=3, seq_len=9)],
    ids=str,
)
def test_small_and_extreme_counts(rule, changes, poisoned_empty):
    problem = problem_of(rule, "after", **changes)
    compare(problem, make_inputs(problem), poisoned_empty, outer=outer_of(problem, chunk_size=16))


@RULES
@pytest.mark.parametrize("final", [True, False], ids=["state-unread", "no-final-state"])
@pytest.mark.parametrize("initial", [True, False], ids=["initial", "zeros"])
def test_states_that_are_absent(rule, initial, final, poisoned_empty):
    problem = problem_of(rule, num_heads=1)
    compare(
        problem, make_inputs(problem, initial=initial), poisoned_empty, outer=outer_of(problem, chunk_size=16),
        final=final, d_final=False,
    )  # fmt: skip


@RULES
def test_forward_only_gives_the_same_output(rule, poisoned_empty):
    problem = problem_of(rule)
    inputs, outer = make_inputs(problem), outer_of(problem, chunk_size=16)
    forward, _ = kernels(problem.replace(direction="fwd"), inputs, poisoned_empty, outer, final=False)
    do = torch.zeros_like(inputs.v)
    both, _ = kernels(problem, inputs, poisoned_empty, outer, final=False, do=do)
    assert torch.equal(forward["o"], both["o"])


@RULES
@pytest.mark.parametrize("gate", [0.0, 1e-4, 5.0, 50.0, 1e3])
def test_gates_from_none_to_forgetting_all(rule, gate, poisoned_empty):
    problem = problem_of(rule, num_heads=1, seq_len=33, num_partitions=2, top_k=1)
    compare(problem, make_inputs(problem, gate=gate), poisoned_empty, outer=outer_of(problem, chunk_size=16))


@RULES
def test_gates_mixed_by_channel(rule, poisoned_empty):
    problem = problem_of(rule, num_heads=2, seq_len=33, num_partitions=2, top_k=1)
    inputs = make_inputs(problem)
    levels = torch.tensor([0.0, -1e-4, -5.0, -50.0, -1e3])
    g = levels[torch.arange(inputs.g.numel()) * 7 % 5].reshape(inputs.g.shape)
    compare(problem, dataclasses.replace(inputs, g=g, shared_g=g.flip(0)), poisoned_empty,
            outer=outer_of(problem, chunk_size=16))


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_repeated_keys_in_the_solve(beta, poisoned_empty):
    problem = problem_of("gdn", "after", num_heads=1, seq_len=40, num_partitions=0, top_k=0)
    inputs = make_inputs(problem)
    k = inputs.k[:2].repeat(20, 1, 1)
    inputs = dataclasses.replace(inputs, k=k, beta=torch.full_like(inputs.beta, beta), g=inputs.g * 1e-3)
    compare(problem, inputs, poisoned_empty, outer=outer_of(problem, chunk_size=32))


def hard_logits(kind, rows, partitions):
    normal = torch.randn(rows, partitions, generator=torch.Generator().manual_seed(3))
    if kind == "ties":
        return torch.zeros(rows, partitions)
    if kind == "few values":
        return normal.round()
    if kind == "hot":
        return torch.where(torch.arange(partitions) == 2 % partitions, 50.0, normal)
    if kind == "underflow":
        return normal * 200
    infinite = normal.clone()
    infinite[::3, 0] = INF
    infinite[1::3, -1] = -INF
    infinite[::4] = -INF
    infinite[5::6, :2] = INF
    return infinite


def plain_routing(problem, lengths, partitions, chunk_size):
    """perm, inv and the tables of segments and chunks, segment by segment, the way one would by hand."""
    shared, lanes = int(problem.shared), problem.lanes
    owner = [s for s, length in enumerate(lengths) for _ in range(length)]
    segments = [[] for _ in range(len(lengths) * problem.partitions)]
    for token, sequence in enumerate(owner):
        if shared:
            segments[sequence].append(token * lanes)
        for lane, partition in enumerate(partitions[token].tolist() if problem.num_partitions else [], start=shared):
            segment = len(lengths) * shared + sequence * problem.num_partitions + partition
            segments[segment].append(token * lanes + lane)
    perm, rows, boundaries, table = [], [0], [0], []
    for number, slots in enumerate(segments):
        starts = range(0, len(slots), chunk_size)
        for i, start in enumerate(starts):
            before = boundaries[-1] + i - 1 if i > 0 else -1
            after = boundaries[-1] + i if i < len(starts) - 1 else -1
            table.append([number, len(perm) + start, min(chunk_size, len(slots) - start), before, after])
        perm += slots
        rows.append(len(perm))
        boundaries.append(boundaries[-1] + max(len(starts) - 1, 0))
    sizes = Sizes(problem, chunk_size)
    assert len(table) <= sizes.chunks
    assert boundaries[-1] <= sizes.boundaries
    inv = torch.empty(len(owner) * lanes, dtype=torch.int32)
    inv[perm] = torch.arange(len(perm), dtype=torch.int32)
    return {
        "perm": perm, "inv": inv.view(-1, lanes).tolist(), "segment_rows": rows, "segment_boundaries": boundaries,
        "chunk_table": table,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["normal", "ties", "few values", "hot", "underflow", "infinite"])
@pytest.mark.parametrize(
    ("lengths", "partitions", "top_k", "read_k", "shared"),
    [
        ([37], 4, 2, 2, True),
        ([0, 9, 0, 0, 17, 70, 0], 5, 4, 4, True),
        ([16, 1, 15, 33], 6, 1, 3, False),
        ([1], 4, 2, 1, True),
        ([1] * 40, 3, 1, 1, False),
        ([20, 13], 1, 1, 1, True),
        ([0, 80], 9, 8, 8, False),
    ],
    ids=str,
)
@ROUTINGS
def test_routing(template, kind, lengths, partitions, top_k, read_k, shared, poisoned_empty):
    problem = Problem(
        rule="gdn", seq_len=sum(lengths), num_heads=1, head_dim=16, dtype="fp32", num_sequences=len(lengths),
        num_partitions=partitions, top_k=top_k, read_k=read_k, shared=shared,
    )  # fmt: skip
    logits = hard_logits(kind, problem.seq_len, partitions)
    expected = route(logits, top_k, read_k)
    for block_t, chunk_size in ((16, 16), (64, 32)):
        inputs = make_inputs(problem, lengths, logits=logits)
        tensors = run_routing(template, problem, inputs, block_t, chunk_size, poisoned_empty)
        assert tensors["chosen"][:, int(shared):].tolist() == expected.partitions.tolist()
        torch.testing.assert_close(tensors["weights"][:, int(shared):], expected.weights, rtol=1e-6, atol=1e-12)
        if shared:
            assert (tensors["weights"][:, 0] == 1).all()
            assert (tensors["chosen"][:, 0] == 0).all()
        assert_routing(tensors, plain_routing(problem, lengths, expected.partitions, chunk_size))


def assert_routing(tensors, by_hand):
    chunks = by_hand.pop("chunk_table")
    assert tensors["chunk_table"][: len(chunks)].tolist() == chunks
    assert (tensors["chunk_table"][len(chunks) :, 0] == -1).all(), "surplus chunks must be marked"
    for name, value in by_hand.items():
        assert tensors[name].tolist() == value, name


def run_routing(template, problem, inputs, block_t, chunk_size, allocate):
    plan = default_plan(problem, DEVICE, "triton", outer_of(problem, chunk_size=chunk_size))
    choice = StageChoice("triton", template, Config(block_t=block_t, num_warps=4))
    execution = Execution(plan, problem, inputs, scale=1.0, allocate=allocate, keep=True)
    for stage in stages_of(problem, plan.outer)[:1]:
        assert stage.name == "routing"
        for name in stage.writes:
            shape, dtype = execution._spec(name)
            execution.tensors[name] = allocate(shape, dtype=dtype, device="cpu")
    execution.run_stage("routing", choice)
    return execution.tensors


@ROUTINGS
def test_routing_of_the_plain_stream(template, poisoned_empty):
    problem = Problem(rule="gla", seq_len=21, num_heads=1, head_dim=16, num_partitions=0, top_k=0, num_sequences=3)
    problem = problem.replace(dtype="fp32")
    inputs = make_inputs(problem, [4, 0, 17])
    tensors = run_routing(template, problem, inputs, 16, 16, poisoned_empty)
    assert_routing(tensors, plain_routing(problem, [4, 0, 17], None, 16))


@ROUTINGS
def test_nan_logits_reach_the_weights_and_spare_the_neighbours(template, poisoned_empty):
    problem = problem_of("gdn")
    logits = hard_logits("normal", 21, 3)
    logits[5, 1] = float("nan")
    tensors = run_routing(template, problem, make_inputs(problem, logits=logits), 16, 16, poisoned_empty)
    assert tensors["chosen"][:, 1:].tolist() == route(logits, 2).partitions.tolist()
    assert tensors["weights"][5, 1:].isnan().all()
    assert not tensors["weights"][[4, 6]].isnan().any()


@RULES
@pytest.mark.parametrize("kind", ["ties", "hot", "underflow", "infinite"])
def test_hard_logits_through_the_whole(rule, kind, poisoned_empty):
    problem = problem_of(rule, num_heads=1, num_partitions=3, top_k=2)
    inputs = make_inputs(problem, logits=hard_logits(kind, 21, 3))
    compare(problem, inputs, poisoned_empty, outer=outer_of(problem, chunk_size=16))


def outer_with(problem, stage, **changes):
    """Outer choices under which a problem has the stage."""
    for states, split in (("recompute", 0), ("store", 0), ("joint", 0), ("recompute", 16)):
        outer = outer_of(problem, **changes, states=states, split=split)
        is_valid = not GRAPHS["staged"].violations(problem, outer, DEVICE)
        if is_valid and stage in {one.name for one in stages_of(problem, outer)}:
            return outer
    raise AssertionError(f"no outer choice has a stage {stage}")


def variants():
    """Each template but the default ones, and each value of each parameter but the default one."""
    for rule in ("gla", "gdn"):
        problem = problem_of(rule)
        for template in templates_of("triton"):
            if rule in template.rules:
                if template != templates_for(template.stage, problem, ("triton",))[0]:
                    yield pytest.param(rule, template.name, None, None, id=f"{template.name}-{rule}")
                for param in template.space.params:
                    if param.name not in ("num_warps", "num_stages"):  # the interpreter knows neither
                        for value in param.values:
                            if value != param.default:
                                yield pytest.param(rule, template.name, param.name, value,
                                                   id=f"{template.name}-{param.name}-{value}-{rule}")


@pytest.mark.parametrize(("rule", "template", "name", "value"), list(variants()))
def test_parameters_change_no_result(rule, template, name, value, poisoned_empty):
    problem = problem_of(rule, "after", seq_len=20, head_dim=24, head_dim_v=40, num_heads=1, num_partitions=2, top_k=1)
    template = registry.find_template("triton", template)
    outer = outer_with(problem, template.stage, chunk_size=16)
    plan = default_plan(problem, DEVICE, "triton", outer)
    configs = [c for c in template.space.configs(problem, DEVICE, outer) if name is None or c[name] == value]
    if not configs:  # a tile wider than the head: the constraint must be what says so
        default = template.space.default(problem, DEVICE, outer)
        assert template.space.violations(problem, default.replace(**{name: value}), DEVICE, outer)
        return
    plan = plan.replace_stage(template.stage, StageChoice("triton", template.name, configs[0]))
    compare(problem, make_inputs(problem, initial=name is None), poisoned_empty, plan=plan)


@NORMS
@pytest.mark.parametrize(("gate", "head_dim"), [(0.1, 16), (1.0, 16), (30.0, 16), (1.0, 96)])  # 96: two slices of K
def test_gla_takes_near_and_far_gates(norm, gate, head_dim, poisoned_empty):
    """Pairs in one product where gates allow it, by halves where they do not, both in one call."""
    problem = problem_of("gla", norm, seq_len=50, num_heads=1, head_dim=head_dim)
    inputs = make_inputs(problem, initial=True, gate=gate)
    inputs.g[:25] *= 0.01
    compare(problem, inputs, poisoned_empty, outer=outer_of(problem, chunk_size=32, states="store"))


@pytest.mark.parametrize("states", ["recompute", "store"])
def test_gla_finds_far_gates_among_many_chunks(states, poisoned_empty):
    """Two blocks look for them, here among the flags that come last."""
    problem = problem_of("gla", "none", seq_len=300, num_sequences=2, num_heads=1, head_dim=16)
    outer = outer_of(problem, chunk_size=16, states=states)
    assert FAR_FLAGS < Sizes.of(problem, outer).chunks < 2 * FAR_FLAGS
    inputs = make_inputs(problem, [200, 100], initial=True, gate=0.01)
    inputs.g[230:260] = -30.0
    compare(problem, inputs, poisoned_empty, outer=outer)


@NORMS
@pytest.mark.parametrize("lengths", [(35,), (0, 17, 1, 33, 16, 0)], ids=len)
def test_gla_makes_its_rows_with_its_states(norm, lengths, poisoned_empty):
    problem = problem_of("gla", norm, seq_len=sum(lengths), num_sequences=len(lengths), num_heads=2)
    inputs = make_inputs(problem, list(lengths), initial=True, gate=1.0)
    compare(problem, inputs, poisoned_empty, outer=outer_of(problem, chunk_size=16, states="joint"))


@NORMS
@pytest.mark.parametrize("gate", [1.0, 1e3])
def test_gla_recomputes_its_states(norm, gate, poisoned_empty):
    problem = problem_of("gla", norm, seq_len=35, num_heads=1)
    inputs = make_inputs(problem, initial=True, gate=gate)
    compare(problem, inputs, poisoned_empty, outer=outer_of(problem, chunk_size=16, states="recompute"))


SPOILED = {
    "k_scale": "prepare", "P": "prepare", "o_rows": "scan", "h": "recompute", "dh": "state_gradient",
    "dv_rows": "state_gradient", "dk_rows": "gradients", "de_rows": "gradients", "dg_rows": "gradients",
    "inv": "routing",
}  # fmt: skip
SPOILED_OF_GDN = {
    "A": "prepare", "Ag": "prepare", "w": "recompute", "dv_new": "state_gradient", "h_dh": "state_gradient",
    "dp": "score_gradients", "dn": "score_gradients", "db": "score_gradients", "dbeta_rows": "score_gradients",
}  # fmt: skip
SPOILED_OF_STORED_GLA = {
    "k_scale": "decay_rows", "P": "decay_rows", "qg": "decay_rows", "kg": "decay_rows", "decay": "decay_rows",
    "h": "states", "o_rows": "output", "dh": "states_backward", "dv_rows": "value_gradients",
}  # fmt: skip
SPOILED_OF_JOINT_GLA = {
    "P": "decay_rows", "qg": "decay_rows", "kg": "decay_rows", "decay": "decay_rows", "h": "states_output",
    "o_rows": "states_output", "dh": "states_value_gradients", "dv_rows": "states_value_gradients",
}  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "states", "buffer", "stage"),
    [(rule, "recompute", *spoiled) for rule in ("gla", "gdn") for spoiled in SPOILED.items()]
    + [("gdn", "recompute", *spoiled) for spoiled in SPOILED_OF_GDN.items()]
    + [("gdn", "store", buffer, "scan") for buffer in ("h", "w")]
    + [("gla", "store", *spoiled) for spoiled in SPOILED_OF_STORED_GLA.items()]
    + [("gla", "joint", *spoiled) for spoiled in SPOILED_OF_JOINT_GLA.items()],
)
def test_a_broken_kernel_turns_the_check_red(rule, states, buffer, stage, poisoned_empty, monkeypatch):
    """One chunk of what one stage wrote, off by a hundredth: the comparison above must not let it pass."""
    problem = problem_of(rule, num_heads=1, seq_len=20, num_partitions=2, top_k=1)
    (good,) = templates_for(stage, problem, ("triton",))[:1]

    def broken(call, tensors):
        good.run(call, tensors)
        if buffer == "inv":  # two tokens read each other's row
            tensors["inv"][:2, 0] = tensors["inv"][:2, 0].flip(0)
            return
        sizes, spoiled = call.sizes, tensors[buffer]
        rows = range(sizes.shared_rows, min(sizes.shared_rows + sizes.chunk_size, sizes.rows))  # a sparse chunk
        if buffer in ("h", "dh"):
            spoiled[0].mul_(1.01)
        elif buffer in ("h_dh", "decay"):
            spoiled.mul_(1.1)
        elif sizes.rows in spoiled.shape:
            spoiled.index_copy_(spoiled.shape.index(sizes.rows), torch.tensor(rows), 1.01 * spoiled.index_select(
                spoiled.shape.index(sizes.rows), torch.tensor(rows)))
        else:  # the sparse rows alone
            axis = spoiled.shape.index(sizes.sparse_rows)
            spoiled.narrow(axis, 0, len(rows)).mul_(1.01)

    find, spoiled = registry.find_template, dataclasses.replace(good, run=broken)
    monkeypatch.setattr(
        "sse_tune.runtime.pipeline.find_template",
        lambda backend, name: spoiled if name == good.name else find(backend, name),
    )
    inputs = make_inputs(problem, initial=True)
    with pytest.raises(AssertionError, match="worst row"):
        compare(problem, inputs, poisoned_empty, outer=outer_of(problem, chunk_size=16, states=states))
