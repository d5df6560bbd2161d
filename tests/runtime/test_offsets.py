"""Offsets of plain batches: made once for a shape, and never where what is made would not last."""

import types

import pytest
import torch

from sse_tune.runtime import offsets
from sse_tune.runtime.offsets import given_offsets, kept_offsets

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def none_kept(monkeypatch):
    monkeypatch.setattr(offsets, "_kept", {})


@pytest.mark.parametrize(("batch", "seq_len"), [(1, 5), (3, 7)])
def test_they_are_those_of_equal_sequences(batch, seq_len):
    made = kept_offsets(batch, seq_len, CPU)
    assert made.dtype == torch.int32 and made.is_contiguous()
    assert made.tolist() == [seq_len * i for i in range(batch + 1)]
    assert kept_offsets(batch, seq_len, CPU) is made
    assert kept_offsets(batch + 1, seq_len, CPU) is not made and kept_offsets(batch, seq_len + 1, CPU) is not made


def test_those_made_for_inference_can_be_saved_for_a_backward_pass():
    with torch.inference_mode():
        made = kept_offsets(1, 5, CPU)
    assert not made.is_inference()


def test_no_more_are_kept_than_the_limit_and_none_is_dropped(monkeypatch):
    monkeypatch.setattr(offsets, "_MAX_KEPT", 1)
    first = kept_offsets(1, 5, CPU)
    assert kept_offsets(1, 6, CPU).tolist() == [0, 6] and kept_offsets(1, 6, CPU) is not kept_offsets(1, 6, CPU)
    assert kept_offsets(1, 5, CPU) is first


@pytest.mark.parametrize("capturing", [False, True])
def test_on_a_gpu_they_are_waited_for_and_none_of_a_capture_is_kept(capturing, monkeypatch):
    events = []
    device = torch.device("cuda", 0)
    stream = types.SimpleNamespace(synchronize=lambda: events.append("waited"))
    monkeypatch.setattr(torch.cuda, "device", lambda d: events.append(d) or torch.no_grad())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(offsets, "even_offsets", lambda *shape: torch.zeros(2))
    made = kept_offsets(1, 5, device)
    assert events == ([device] if capturing else [device, "waited"])
    assert (kept_offsets(1, 5, device) is made) == (not capturing)


@pytest.mark.gpu
def test_a_captured_call_finds_them_whether_they_are_kept_or_not():
    for kept in (False, True):
        if kept:
            kept_offsets(2, 9, torch.device("cuda", 0))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = kept_offsets(2, 9, torch.device("cuda", 0)) + 0
        made.zero_()
        graph.replay()
        assert made.tolist() == [0, 9, 18]
        assert bool(offsets._kept) == kept


def test_given_ones_become_int32():
    made = given_offsets(torch.tensor([0, 3, 5]))
    assert made.dtype == torch.int32 and made.tolist() == [0, 3, 5]
