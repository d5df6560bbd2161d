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
            WorkerError: no child can be started.
        """
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._connection is not None
        begin = time.monotonic()
        try:
            self._connection.send((job, arguments))
            if not self._connection.poll(deadline_s):
                self._kill()
                reason = f"no answer within {deadline_s:.0f} s"
                return JobResult("timeout", None, reason, time.monotonic() - begin)
            outcome, value, reason, usable = self._connection.recv()
        except (EOFError, ConnectionError):
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
        self._kill()

    def _start(self) -> None:
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
        # its own session: Ctrl-C at the terminal is the parent's to handle
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(arguments)],
            pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            start_new_session=True, env=self._environment(),
        )
        theirs.close()
        self._connection = multiprocessing.connection.Connection(ours.detach())
        self.starts += 1
        try:
            ready = self._connection.poll(START_LIMIT_S) and self._connection.recv() == "ready"
        except (EOFError, ConnectionError):
            ready = False
        except KeyboardInterrupt:
            self._kill()
            raise
        if not ready:
            reason = self._last_words()
            self._kill()
            raise WorkerError("a worker process must start", reason, "run `sse-tune doctor`")

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
        if self._process is None or self._log is None:
            return "it was never started"
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        died = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 4000))
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        fatal = [line for line in lines if line.startswith(("Fatal", "terminate", "MemoryError")) or "rror:" in line]
        said = (fatal or lines)[-1:] if lines else []
        return "; ".join([f"the worker process was lost: {died}", *(line[:300] for line in said)])

    def _kill(self) -> None:
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
