"""A peer is held against the reference before it is timed, and reported with its reason when it is not."""

import json
import math

import pytest
import torch

from sse_tune.bench import peers
from sse_tune.bench.plans import bench
from sse_tune.device import Device
from sse_tune.errors import DeviceError
from sse_tune.problem import Problem
from sse_tune.reference import recurrent
from sse_tune.templates.roofline import Ceilings
from sse_tune.tuning.inputs import workload

CPU = Device.detect("cpu")
CEILINGS = Ceilings(1e10, 1e11)
PLAIN = {"num_partitions": 0, "top_k": 0, "read_k": 0}
SMALL = Problem(rule="gdn", seq_len=16, num_heads=1, head_dim=8, norm="after", dtype="fp32")


def exact_op(q, k, v, g, beta, scale, normalise, offsets):
    return recurrent(q, k, v, g, None, beta=beta, qk_l2norm=normalise, scale=scale, cu_seqlens=offsets)[0]


def peer(name, op, pipeline="varlen", package="torch"):
    return peers.Peer(pipeline, package, name, lambda problem: None, lambda problem: op)


def test_a_wrong_or_broken_peer_is_reported_and_not_timed(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no kernel image\nis available")

    def full(q, *rest):
        if q.shape[1] > peers._CHECKED_TOKENS * 3:
            raise MemoryError("out of memory")
        return exact_op(q, *rest)

    made = (
        peer("right", exact_op),
        peer("right", exact_op, "mask"),
        peer("half", lambda *arguments: exact_op(*arguments) * 0.5),
        peer("none", lambda *arguments: exact_op(*arguments) * float("nan")),
        peer("broken", broken),
        peer("too large", full),
        peer("absent", exact_op, package="no_such_package"),
    )
    monkeypatch.setattr(peers, "PEERS", made)
    monkeypatch.setattr(peers, "_CHECKED_TOKENS", 8)
    found = bench(SMALL, CPU, time_limit_s=0.1, peers=True, ceilings=CEILINGS)
    for direction in ("fwd", "fwd+bwd"):
        assert list(found.of(direction)) == ["default", "varlen, right", "mask, right"]
    reports = {report.name: report for report in found.peers}
    assert reports["varlen, right"].reason is None
    assert reports["mask, right"].error < 1e-5
    assert reports["mask, right"].gradient_error < 1e-4
    assert "differs from the reference by 5.0e-01" in reports["varlen, half"].reason
    assert "differs" in reports["varlen, none"].reason
    assert reports["varlen, none"].to_dict()["error"] is None
    json.dumps(found.to_dict(), allow_nan=False)
    assert reports["varlen, broken"].reason == "RuntimeError: no kernel image"
    assert reports["varlen, too large"].reason == "MemoryError: out of memory"
    assert "pip install absent" in reports["varlen, absent"].reason


def test_the_largest_of_errors_is_nan_where_one_is():
    assert math.isnan(peers._largest([0.5, float("nan")]))
    assert peers._largest([0.5, 2.0]) == 2.0


def test_peers_need_their_packages_and_a_gpu(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", (peer("no-such-package", exact_op, package="no_such_package"),))
    with pytest.raises(DeviceError, match="sse-tune\\[peers\\]"):
        peers.require_peers(Device.from_arch("sm_90"))
    monkeypatch.setattr(peers, "PEERS", (peer("torch", exact_op),))
    peers.require_peers(Device.from_arch("sm_90"))
    with pytest.raises(DeviceError, match="needs a GPU"):
        peers.require_peers(Device.detect("cpu"))


def test_a_peer_says_what_it_cannot_run():
    assert "128" in peers._qla_supports(Problem.preset("sse-gdn"))
    assert peers._qla_supports(Problem.preset("spikingbrain2-5b")) is None
    ready = peer("ready", exact_op)
    assert peers.cannot(ready, SMALL) is None
    assert "reads the partitions that it writes" in peers.cannot(ready, SMALL.replace(read_k=3))


def test_without_sparse_partitions_the_peers_are_the_chunk_ops_alone():
    plain = Problem.preset("spikingbrain2-5b", **PLAIN)
    assert [peer.name for peer in peers.peers_of(plain)] == ["chunk op, fla-core", "chunk op, flash-qla"]
    assert [peer.name for peer in peers.peers_of(Problem.preset("spikingbrain2-5b"))] == [
        "varlen, fla-core", "varlen, flash-qla", "mask, fla-core",
    ]  # fmt: skip
    qla = peers.peers_of(plain)[1]
    assert qla.supports(plain) is None
    assert "128" in qla.supports(Problem.preset("sse-gla-128", **PLAIN))


@pytest.mark.parametrize("rule", ["gdn", "gla"])
@pytest.mark.parametrize("more", [{}, {"num_sequences": 2}, {"batch": 2}], ids=str)
def test_a_chunk_op_is_called_directly_and_held_against_the_reference(monkeypatch, rule, more):
    calls = []

    def op(q, k, v, g, beta, scale, normalise, offsets):
        calls.append((tuple(q.shape), normalise, offsets))
        return exact_op(q, k, v, g, beta, scale, normalise, offsets)

    wrong = peer("wrong", lambda *arguments: exact_op(*arguments) * 0.9, peers.CHUNK_OP)
    monkeypatch.setattr(peers, "PEERS", (peer("right", op, peers.CHUNK_OP), wrong, peer("varlen", op)))
    problem = SMALL.replace(rule=rule, **PLAIN, **more)
    found = bench(problem, CPU, time_limit_s=0.1, peers=True, ceilings=CEILINGS)
    for direction in ("fwd", "fwd+bwd"):
        assert list(found.of(direction)) == ["default", "chunk op, right"]
    assert [report.name for report in found.peers] == ["chunk op, right", "chunk op, wrong"]
    assert found.peers[0].error < 1e-5
    assert found.peers[0].gradient_error < 1e-4
    assert "differs" in found.peers[1].reason
    shape, normalise, offsets = calls[-1]
    assert shape == (problem.batch, 16, 1, 8)
    assert normalise
    assert (offsets is None) is (problem.num_sequences is None)


def test_peers_run_packed_sequences(monkeypatch):
    made = tuple(peer("right", exact_op, pipeline) for pipeline in ("varlen", "mask"))
    monkeypatch.setattr(peers, "PEERS", made)
    problem = SMALL.replace(seq_len=64, num_sequences=8)
    found = bench(problem, CPU, time_limit_s=0.1, peers=True, ceilings=CEILINGS)
    assert list(found.of("fwd+bwd")) == ["default", "varlen, right", "mask, right"]
    assert all(report.error < 1e-5 for report in found.peers)


def test_every_side_runs_with_skewed_routing_too(monkeypatch):
    seen = []
    run_pipeline = peers.run_pipeline

    def spied(pipeline, problem, inputs, op, scale):
        seen.append((len(inputs.v), inputs.router_logits.argmax(-1)))
        return run_pipeline(pipeline, problem, inputs, op, scale)

    monkeypatch.setattr(peers, "run_pipeline", spied)
    monkeypatch.setattr(peers, "PEERS", (peer("right", exact_op),))
    problem = SMALL.replace(seq_len=2000, direction="fwd")
    shares = (0.9, 0.04, 0.03, 0.03)
    found = bench(problem, CPU, time_limit_s=0.1, peers=True, ceilings=CEILINGS, stages=True, occupancy=shares)
    assert list(found.of("fwd")) == ["default", "default, skewed", "varlen, right", "varlen, right, skewed"]
    assert found.to_dict()["occupancy"] == shares
    occupancies = [torch.bincount(chosen, minlength=4) / tokens for tokens, chosen in seen if tokens == 2000]
    assert torch.allclose(occupancies[0], torch.full((4,), 0.25), atol=0.05)
    assert torch.allclose(occupancies[-1], torch.tensor(shares), atol=0.05)


def test_a_peer_is_checked_on_a_smaller_problem_of_the_same_kind():
    problem = Problem.preset("spikingbrain2-5b", seq_len=32768, num_sequences=8, num_partitions=32)
    small = peers.checked_problem(problem)
    assert (small.seq_len, small.num_sequences) == (512, 3)
    assert small.replace(seq_len=32768, num_sequences=8) == problem
    batched = peers.checked_problem(SMALL.replace(batch=64))
    assert (batched.seq_len, batched.batch, batched.num_sequences) == (16, 3, None)


@pytest.mark.parametrize(("rule", "dtype"), [("gla", torch.bfloat16), ("gdn", torch.float32)])
def test_all_sides_get_gates_as_layers_have_them(rule, dtype):
    problem = Problem(rule=rule, seq_len=16, num_heads=1, head_dim=8)
    assert workload(problem, "cpu").inputs.g.dtype == workload(problem, "cpu").inputs.shared_g.dtype == dtype


def test_flas_own_kernels_are_taken_and_not_what_it_hands_over_to(monkeypatch):
    import functools
    import types

    def own(q, k, v, **options):
        return "own", None

    handed_over = functools.wraps(own)(lambda *arguments, **options: ("another package's", None))
    module = types.SimpleNamespace(chunk_gated_delta_rule=handed_over)
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: module)
    op = peers._fla(Problem.preset("spikingbrain2-5b"))
    assert op(None, None, None, None, None, 1.0, True, None) == "own"
