"""Ctrl-C in the middle of a transaction: it ends first, and nobody is locked out by what it was."""

import signal
import threading

import pytest
import sqlalchemy as sa

from sse_tune.database.interrupts import uninterrupted
from sse_tune.database.store import TuningDatabase
from sse_tune.device import ARCHS
from sse_tune.problem import Problem

PROBLEM, DEVICE = Problem.preset("demo"), ARCHS["sm_90"]


@pytest.fixture
def database(tmp_path):
    with TuningDatabase(tmp_path / "tuning.db") as database:
        yield database


@pytest.fixture
def interrupting(database):
    """Ctrl-C before each statement that begins with a word."""

    def begin(word):
        @sa.event.listens_for(database._engine, "before_cursor_execute")
        def press(connection, cursor, statement, *_):
            if statement.startswith(word):
                signal.raise_signal(signal.SIGINT)

    return begin


@pytest.mark.parametrize("word", ["BEGIN", "INSERT"])
def test_a_write_ends_before_ctrl_c_is_raised(database, interrupting, word):
    interrupting(word)
    with pytest.raises(KeyboardInterrupt):
        database.open_study("k" * 32, PROBLEM, DEVICE, {})
    with TuningDatabase(database.name) as other:
        assert [study.key for study in other.studies()] == ["k" * 32]


def test_a_read_ends_before_ctrl_c_is_raised(database, interrupting):
    ended = []
    sa.event.listen(database._engine, "commit", ended.append)
    interrupting("SELECT")
    with pytest.raises(KeyboardInterrupt):
        database.studies()
    assert len(ended) == 1


def test_the_handler_is_as_before_and_called_once():
    pressed = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        handler = signal.getsignal(signal.SIGINT)
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert not pressed
        assert pressed == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_the_handlers_alone():
    failed = []

    def work():
        try:
            with uninterrupted():
                pass
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
