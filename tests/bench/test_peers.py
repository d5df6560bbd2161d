"""The peers' pipeline over an exact chunk op is the operation itself: what it is compared with is the same thing."""

import pytest
import torch

from sse_tune.bench import peers
from sse_tune.device import Device
from sse_tune.errors import DeviceError
from sse_tune.problem import Problem
from sse_tune.reference import recurrent
from sse_tune.templates.registry import default_plan
from sse_tune.tuning.check import run_case
from sse_tune.tuning.jobs import workload


def exact_op(q, k, v, g, beta, scale, normalise, offsets):
    return recurrent(q, k, v, g, None, beta=beta, qk_l2norm=normalise, scale=scale, cu_seqlens=offsets)[0]


@pytest.mark.parametrize("norm", ["none", "after", "before"])
@pytest.mark.parametrize("rule", ["gla", "gdn"])
@pytest.mark.parametrize(
    "more",
    [{}, {"batch": 2}, {"num_sequences": 3}, {"shared": False}, {"num_partitions": 0, "top_k": 0, "read_k": 0}],
    ids=str,
)
def test_varlen_over_the_reference_is_our_operation(rule, norm, more):
    problem = Problem(
        **{
            "rule": rule,
            "seq_len": 23,
            "num_heads": 2,
            "head_dim": 8,
            "norm": norm,
            "dtype": "fp32",
            "direction": "fwd",
        }
        | more
    )
    case = workload(problem, "cpu")
    ours, _ = run_case(default_plan(problem, Device.detect("cpu")), case)
    found = peers.varlen_sse(problem, case.inputs, exact_op, case.scale)
    torch.testing.assert_close(found, ours["o"], rtol=1e-4, atol=1e-5)


def test_a_wrong_or_broken_peer_is_reported_and_not_timed(monkeypatch):
    def half(*arguments):
        return exact_op(*arguments) * 0.5

    def broken(*arguments):
        raise RuntimeError("no kernel image\nis available")

    def peer(name, op):
        return peers.Peer(name, "torch", name, lambda problem: None, lambda problem: op)

    monkeypatch.setattr(peers, "PEERS", (peer("right", exact_op), peer("half", half), peer("broken", broken)))
    problem = Problem(rule="gdn", seq_len=16, num_heads=1, head_dim=8, norm="after", dtype="fp32")
    results = {r.name: r for r in peers.bench_peers(problem, Device.detect("cpu"), time_limit_s=0.1)}
    assert results["varlen, right"].timing is not None
    assert results["varlen, half"].timing is None
    assert "differs from ours" in results["varlen, half"].reason
    assert results["varlen, broken"].reason == "RuntimeError: no kernel image"


def test_peers_need_their_packages(monkeypatch):
    none = peers.Peer("none", "no_such_package", "no-such-package", lambda problem: None, lambda problem: exact_op)
    monkeypatch.setattr(peers, "PEERS", (none,))
    with pytest.raises(DeviceError, match="sse-tune\\[peers\\]"):
        peers.require_peers(Device.from_arch("sm_90"))


def test_a_peer_says_what_it_cannot_run():
    problem = Problem.preset("sse-gdn")
    assert "128" in peers._qla_supports(problem)
    assert peers._qla_supports(Problem.preset("spikingbrain2-5b")) is None
