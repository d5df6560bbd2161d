"""Every error this package raises on purpose: one line that gives the rule, the values and the remedy."""

from __future__ import annotations


class SSETuneError(Exception):
    """Base class of the errors of this package.

    Args:
        rule: what must hold, as a statement: "`top_k` must lie in 1..N".
        got: the values that broke it: "top_k=9, N=4".
        remedy: what to do about it: "pass a smaller top_k".
    """

    def __init__(self, rule: str, got: str = "", remedy: str = "") -> None:
        self.rule, self.got, self.remedy = rule, got, remedy
        message = rule + (f", but got {got}" if got else "") + (f"; {remedy}" if remedy else "")
        super().__init__(" ".join(message.split()))

    def __reduce__(self) -> tuple:
        return type(self), (self.rule, self.got, self.remedy)


class ProblemError(SSETuneError, ValueError):
    """A tensor or a problem description breaks a rule of the operation."""


class ConstraintError(SSETuneError, ValueError):
    """A config lies outside its template's space or breaks one of its constraints."""


class PlanError(SSETuneError, ValueError):
    """A plan names unknown stages, templates or parameters, or does not cover its stage graph."""


class DeviceError(SSETuneError, RuntimeError):
    """What was asked for cannot run on the device or with the toolchain at hand."""


class CompileError(SSETuneError, RuntimeError):
    """A compiler refused a template, or its output exceeds the target's limits."""


class AdmissionError(SSETuneError, RuntimeError):
    """A kernel's result differs from the reference, or from itself on a repeat."""


class WorkloadError(SSETuneError, ValueError):
    """A workload, or the file it is in, does not fit the format or the problem."""


class DatabaseError(SSETuneError, RuntimeError):
    """A tuning database cannot be opened, read or written."""


class ExchangeError(DatabaseError, ValueError):
    """An import file does not fit the exchange format; nothing of it was taken."""


class SearchError(SSETuneError, RuntimeError):
    """A search cannot start or go on."""


class WorkerError(SSETuneError, RuntimeError):
    """A worker process crashed, hung past its deadline or ran out of memory."""
