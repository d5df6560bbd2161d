"""A long-lived child process for candidates: it may crash, hang or run out of memory, and costs one trial each time.

The parent never touches the device. It sends a function and its arguments, waits up to a deadline, and replaces the
child when it died, did not answer or met a device error. The child is started by command line rather than by
`multiprocessing`, which would import the user's main script again.
"""

from __future__ import annotations

import dataclasses
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import IO, Any

from sse_tune.errors import WorkerError
from sse_tune.tuning.outcomes import classify, poisons

START_LIMIT_S = 180.0
_PROGRAM = (
    "import json, sys; arguments = json.loads(sys.argv[1]); sys.path[:] = arguments['path']; "
    "from sse_tune.tuning.worker import serve; "
    "serve(arguments['socket'], arguments['memory_limit_bytes'], arguments['threads'])"
)


@dataclasses.dataclass(frozen=True)
class JobResult:
    """Of one job: "ok" with its value, or an outcome of `outcomes.OUTCOMES` with its reason."""

    outcome: str
    value: Any
    reason: str | None
    wall_s: float


class Worker:
    """One child process, started at the first job and again after each loss.

    Args:
        memory_limit_bytes: of the child's private memory, so that a greedy candidate fails alone; None: no limit.
        threads: the child's CPU threads; None: torch's choice.
        gpu: the number of the one GPU that the child sees, as its "cuda"; None: it sees what this process does.
    """

    def __init__(
        self, *, memory_limit_bytes: int | None = None, threads: int | None = None, gpu: int | None = None
    ) -> None:
        self._memory_limit_bytes, self._threads, self._gpu = memory_limit_bytes, threads, gpu
        self._process: subprocess.Popen | None = None
        self._connection: multiprocessing.connection.Connection | None = None
        self._log: IO[bytes] | None = None
        self._lock = threading.Lock()  # of the three above: `close` may come from another thread than `run`
        self._closed = False
        self.starts = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def run(self, job: Callable[..., Any], *arguments: Any, deadline_s: float) -> JobResult:
        """Runs a module-level function in the child.

        Raises:
            WorkerError: no child can be started, or the worker was closed.
        """
        process, connection = self._process, self._connection
        if process is None or connection is None or process.poll() is not None:
            connection = self._start()
        begin = time.monotonic()
        try:
            connection.send((job, arguments))
            if not connection.poll(deadline_s):
                self._kill()
                reason = f"no answer within {deadline_s:.0f} s"
                return JobResult("timeout", None, reason, time.monotonic() - begin)
            outcome, value, reason, usable = connection.recv()
        except (EOFError, OSError):
            outcome, value, usable = "crash", None, False
            reason = self._last_words()
            # a SIGKILL that is not ours is the kernel's, which ran out of memory
            if any(sign in reason for sign in ("out of memory", "bad_alloc", "SIGKILL")):
                outcome = "out_of_memory"
        except KeyboardInterrupt:
            self._kill()
            raise
        wall_s = time.monotonic() - begin
        if not usable or getattr(value, "poisoned", False):
            self._kill()
        return JobResult(outcome, value, reason, wall_s)

    def close(self) -> None:
        """Ends the child for good, and with it the job that another thread may be running."""
        self._closed = True
        self._kill()

    def _start(self) -> multiprocessing.connection.Connection:
        import json

        self._kill()
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the child
        arguments = {
            "path": [os.path.abspath(entry) for entry in sys.path],
            "socket": theirs.fileno(),
            "memory_limit_bytes": self._memory_limit_bytes,
            "threads": self._threads,
        }
        with self._lock:
            self._must_be_open()
            # its own session: Ctrl-C at the terminal is the parent's to handle
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(arguments)],
                pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
                start_new_session=True, env=self._environment(),
            )
            connection = self._connection = multiprocessing.connection.Connection(ours.detach())
        theirs.close()
        self.starts += 1
        try:
            ready = connection.poll(START_LIMIT_S) and connection.recv() == "ready"
        except (EOFError, OSError):
            ready = False
        except KeyboardInterrupt:
            self._kill()
            raise
        if not ready:
            reason = self._last_words()
            self._kill()
            raise WorkerError("a worker process must start", reason, "run `sse-tune doctor`")
        return connection

    def _must_be_open(self) -> None:
        if self._closed:
            raise WorkerError("a worker must be open", "it was closed", "make another one")

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        if self._gpu is not None:
            visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            if visible and self._gpu >= len(visible):
                raise WorkerError("the GPU must be there", f"cuda:{self._gpu} of {len(visible)}", "name another one")
            environment["CUDA_VISIBLE_DEVICES"] = visible[self._gpu] if visible else str(self._gpu)
        return environment

    def _last_words(self) -> str:
        """Why the child ended: its signal or exit code and the end of what it printed."""
        with self._lock:
            self._must_be_open()
            assert self._process is not None
            assert self._log is not None
            try:
                code = self._process.wait(5)
            except subprocess.TimeoutExpired:
                return "it closed its connection"
            self._log.seek(0, os.SEEK_END)
            self._log.seek(max(0, self._log.tell() - 4000))
            said = self._log.read().decode(errors="replace")
        died = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        fatal = [line for line in lines if line.startswith(("Fatal", "terminate", "MemoryError")) or "rror:" in line]
        return "; ".join([f"the worker process was lost: {died}", *(line[:300] for line in (fatal or lines)[-1:])])

    def _kill(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()  # outside the lock, which a thread may hold that waits for the child
        with self._lock:
            # the child first: its end of the socket closes, which wakes a thread that waits at ours
            if self._process is not None:
                if self._process.poll() is None:
                    self._process.kill()
                self._process.wait()
            if self._connection is not None:
                self._connection.close()
            if self._log is not None:
                self._log.close()
            self._process = self._connection = self._log = None


def serve(socket_number: int, memory_limit_bytes: int | None, threads: int | None) -> None:
    """The child's main: answers jobs until the parent is gone."""
    import faulthandler
    import resource

    faulthandler.enable()
    _end_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if memory_limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit_bytes, memory_limit_bytes))
    connection = multiprocessing.connection.Connection(socket_number)
    connection.send("ready")
    while True:
        try:
            job, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer: tuple[str, Any, str | None, bool] = ("ok", job(*arguments), None, True)
        except Exception as error:  # the parent decides what a failure means
            outcome, reason = classify(error)
            answer = (outcome, None, reason, not poisons(error))
        connection.send(answer)


def _end_with_parent() -> None:
    """On Linux the kernel ends a hanging child whose parent was killed; elsewhere a closed socket ends an idle one."""
    if sys.platform.startswith("linux"):
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
