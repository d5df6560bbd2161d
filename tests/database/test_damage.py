"""Files that are not sound tuning databases: one line that says so and what to do, and the file stays as it is."""

import sqlite3

import pytest

from sse_tune.database.records import now
from sse_tune.database.store import TuningDatabase
from sse_tune.errors import DatabaseError


def refused(path):
    """Opens a bad file; returns the message once it is one line with a remedy and the file is untouched."""
    before = path.read_bytes()
    with pytest.raises(DatabaseError) as caught:
        TuningDatabase(path)
    assert path.read_bytes() == before
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def closed(filled, path):
    """The bytes of a sound database of some pages, all of them in the file itself."""
    filled.close()
    assert path.stat().st_size > 8192
    return path


def test_text_file(path):
    path.write_text("these are my notes\n" * 100)
    assert "must be an SQLite file" in refused(path)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_truncated(closed, share):
    closed.write_bytes(closed.read_bytes()[: int(closed.stat().st_size * share)])
    assert "move" in refused(closed)


@pytest.mark.parametrize("start", [30, 4096, 8192])
def test_overwritten_bytes(closed, start):
    data = bytearray(closed.read_bytes())
    data[start : start + 400] = b"\xa5" * 400
    closed.write_bytes(data)
    assert "move" in refused(closed)


def test_database_of_another_program(path):
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE customers (name TEXT)")
    connection.close()
    assert "customers" in refused(path)


def test_newer_version(closed):
    with sqlite3.connect(closed) as connection:
        connection.execute("UPDATE sse_schema SET version = 99")
    connection.close()
    assert "upgrade sse-tune" in refused(closed)


def test_folder(tmp_path):
    with pytest.raises(DatabaseError, match="must be a file"):
        TuningDatabase(tmp_path)


def test_parent_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DatabaseError, match="check the path"):
        TuningDatabase(tmp_path / "file" / "tuning.db")


def test_empty_file_becomes_a_database(path):
    path.touch()
    with TuningDatabase(path) as database:
        assert database.trials() == []


def test_tampered_record(closed):
    with sqlite3.connect(closed) as connection:
        connection.execute("UPDATE sse_answers SET plan = '{\"graph\": 3}'")
    connection.close()
    with TuningDatabase(closed) as database, pytest.raises(DatabaseError, match="a plan has exactly"):
        database.answers()


def test_deleted_while_open(filled, path, make_answer):
    for file in path.parent.glob("tuning.db*"):
        file.unlink()
    with pytest.raises(DatabaseError):
        filled.answers()


def test_now_is_utc():
    assert now().endswith("+00:00")
