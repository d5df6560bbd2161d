"""What the tests share: which machine a test needs, and allocations full of poison."""

import itertools
import pathlib
import signal

import pytest
import torch

from tests import postgres_server

POISON = {torch.int32: -12345}


def pytest_collection_modifyitems(items):
    """Tests that this process cannot run say why; the Makefile runs each kind where it can."""
    import triton

    interpreting = triton.knobs.runtime.interpret
    no_server = postgres_server.why_not()
    for item in items:
        if item.get_closest_marker("postgres") and no_server is not None:
            item.add_marker(pytest.mark.skip(reason=no_server))
        if item.get_closest_marker("interpret") and not interpreting:
            item.add_marker(pytest.mark.skip(reason="Triton's interpreter is off; run with TRITON_INTERPRET=1"))
        if item.get_closest_marker("gpu") and (interpreting or not torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and Triton compiling"))


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """SIGINT as at a terminal: a shell without job control starts background jobs, CI among them, with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    """No test sees, or writes, the answers of the user who runs it."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(pathlib.Path, "home", lambda: home)


@pytest.fixture
def poisoned_empty():
    """`torch.empty` whose memory holds NaN, or -12345 if of integers: reading what nobody wrote shows."""

    def allocate(shape, dtype, device):
        return torch.full(shape, POISON.get(dtype, float("nan")), dtype=dtype, device=device)

    return allocate


@pytest.fixture(scope="session")
def postgres_server_url():
    with postgres_server.server() as url:
        yield url


@pytest.fixture
def postgres_url(postgres_server_url, _numbers=itertools.count()):  # noqa: B008
    """An empty database of its own on the tests' server."""
    import psycopg

    name = f"test_{next(_numbers)}"
    with psycopg.connect(f"{postgres_server_url}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{postgres_server_url}/{name}"
