"""A PostgreSQL server of the tests' own: in a temporary folder, on a free port, gone afterwards."""

import contextlib
import ctypes
import importlib.util
import os
import pathlib
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time


def programs():
    """The folder of initdb and pg_ctl; None: not installed."""
    found = shutil.which("initdb")
    if found is not None:
        return pathlib.Path(found).resolve().parent
    folders = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return folders[-1].parent if folders else None


def why_not():
    """Why there can be no server here; None: there can."""
    if programs() is None:
        return "needs PostgreSQL's initdb and pg_ctl (apt-get install postgresql)"
    if importlib.util.find_spec("psycopg") is None:
        return "needs the package psycopg (pip install 'sse-tune[postgres]')"
    if os.getuid() == 0 and _account() is None:
        return "PostgreSQL refuses to run as root, and there is no user postgres or nobody to run it as"
    return None


def _account():
    """Whom the server runs as where the tests run as root."""
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return None


def _end_with_parent():
    """On Linux the kernel ends the server, at once, with tests that are killed."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGQUIT)


@contextlib.contextmanager
def server():
    """Starts a server and gives its URL without a database name."""
    account = _account() if os.getuid() == 0 else None
    user = {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    folder = pathlib.Path(tempfile.mkdtemp(prefix="sse-pg-"))  # not pytest's: its parents are closed to other users
    try:
        if account is not None:
            os.chown(folder, account.pw_uid, account.pw_gid)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        data, bin_ = folder / "data", programs()

        def run(*command):
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, **user)
            assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

        run(bin_ / "initdb", "-D", data, "-U", "tests", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
        options = ("-h", "127.0.0.1", "-p", str(port), "-k", folder, "-c", "fsync=off")
        log = (folder / "log").open("wb")
        process = subprocess.Popen(
            [bin_ / "postgres", "-D", data, *options], stdout=log, stderr=log, cwd=folder,
            preexec_fn=_end_with_parent, **user,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while subprocess.run([bin_ / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)], **user).returncode:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.1)
            yield f"postgresql://tests@127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGQUIT)
            process.wait(30)
            log.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
