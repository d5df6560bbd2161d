"""What the tuning tests share: the planted jobs under a name that worker processes can import, and small problems."""

import importlib
import pathlib

import pytest
import torch

from sse_tune.device import Device
from sse_tune.problem import Problem
from sse_tune.tuning import finals


@pytest.fixture(autouse=True)
def short_comparisons(monkeypatch):
    """A CPU's times are not known to half a percent within the 15 s that a search allows: each would take them all."""
    monkeypatch.setattr(finals, "_COMPARISON_S", (0.5, 1.0))


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent))
    return importlib.import_module("planted")


@pytest.fixture(scope="session")
def cpu():
    return Device.detect("cpu")


@pytest.fixture
def small():
    """A problem that a candidate runs in milliseconds."""
    return Problem(rule="gdn", seq_len=64, num_heads=2, head_dim=16, norm="after", dtype="fp32")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
