"""The records of a tuning database, each checked when it is made, so that nothing malformed is ever stored or read.

A record is plain data: `to_dict` gives what JSON holds, `from_dict` takes exactly that back and refuses unknown fields
and wrong types. Nothing in a record is ever executed.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from typing import TypeVar

from sse_tune.database.fields import CHECKS, Json, Moment, Numbers, Times, Words, canonical, digest, plain
from sse_tune.errors import DatabaseError, PlanError
from sse_tune.plan import Plan

KINDS = ("plan", "stage", "combination")
OUTCOMES = ("ok", "rejected", "compile_error", "wrong", "crash", "timeout", "out_of_memory", "interrupted")
NEXT_NUMBER = -1

R = TypeVar("R", bound="Record")


def now() -> str:
    """This moment in ISO 8601, UTC, to the microsecond."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """Base of the records: the checks of every field by its declared type, and the way to and from plain data."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            what, convert = CHECKS[str(field.type)]
            try:
                value = convert(getattr(self, field.name))
            except PlanError as error:
                raise self._wrong(error.rule, error.got) from None
            except (ValueError, TypeError, RecursionError):
                got = repr(getattr(self, field.name))
                got = got if len(got) < 200 else got[:200] + "..."
                raise self._wrong(f"`{field.name}` must be {what}", got) from None
            object.__setattr__(self, field.name, value)

    def _wrong(self, rule: str, got: str) -> DatabaseError:
        return DatabaseError(f"{rule} in a record of type {type(self).__name__}", got, "correct the value")

    def to_dict(self) -> Json:
        """Plain data that JSON holds exactly; errors that are not finite become "nan", "inf" or "-inf"."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls: type[R], data: object) -> R:
        """The inverse of `to_dict`.

        Raises:
            DatabaseError: a field is missing, unknown, of the wrong type or out of its range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            got = type(data).__name__
            if isinstance(data, dict):
                got = f"unknown {sorted(map(str, set(data) - names))}, missing {sorted(names - set(data))}"
            raise DatabaseError(
                f"a record of type {cls.__name__} has exactly the fields {sorted(names)}", got,
                "export it again with this version",
            )
        return cls(**data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer(Record):
    """The best plan known for a bucket on one device, toolchain and template source.

    Args:
        bucket: `Bucket.name`.
        device, arch: `Device.slug` and `Device.arch`.
        driver: of the GPU; None on a CPU.
        toolchain: what `keys.toolchain_of(plan)` gave: package to version.
        sources: what `keys.sources_of(plan)` gave: "backend:template" to source hash.
        problem: `Problem.to_dict()` of the problem it was measured on.
        plan: the answer.
        time_us: median end to end, microseconds.
        default_time_us: of the default plan, measured alongside.
        timings_us: every raw timing, microseconds.
        errors: largest error found against the reference, by tensor.
        created: ISO 8601 with a time zone.
        how: how it was found: study id, budget, measuring method, ...; any plain data. A search names in "beside" the
            keys of the plans that this one was chosen over, measured in turn.
    """

    bucket: str
    device: str
    arch: str
    driver: str | None = None
    toolchain: Words
    sources: Words
    problem: Json
    plan: Plan
    time_us: float
    default_time_us: float | None = None
    timings_us: Times = ()
    errors: Numbers = dataclasses.field(default_factory=dict)
    created: Moment = dataclasses.field(default_factory=now)
    how: Json = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(math.isfinite(value) for value in self.errors.values()):
            raise self._wrong("the errors of an admitted plan must be finite", repr(self.errors))

    @property
    def identity(self) -> str:
        """Of two answers with the same identity only one is kept, see `replaces`."""
        return digest([self.bucket, self.device, self.toolchain, self.sources])

    def outdoes(self, other: Answer) -> bool:
        """Whether this plan was chosen after the other answer was made, in a comparison that the other's plan was in.

        The other's may be the same plan: what was measured last holds. Of two answers at most one outdoes the other.
        """
        if (self.bucket, self.device) != (other.bucket, other.device):
            return False
        beside = self.how.get("beside")
        if not isinstance(beside, list) or not all(isinstance(key, str) for key in beside):
            return False
        return other.plan.key in (self.plan.key, *beside) and self._made > other._made

    def replaces(self, other: Answer) -> bool:
        """Whether this answer, and not the other of the same identity, is to be kept: one outdoes the other, or else
        one is faster as recorded. Of two different answers exactly one replaces the other."""
        if self.outdoes(other) or other.outdoes(self):
            return self.outdoes(other)
        mine, theirs = ((one.time_us, one._made, canonical(one.to_dict())) for one in (self, other))
        return mine < theirs

    @property
    def _made(self) -> datetime.datetime:
        return datetime.datetime.fromisoformat(self.created)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(Record):
    """All trials for one problem on one device and toolchain; `key` is `keys.study_key(...)`."""

    id: str
    key: str
    problem: Json
    device: str
    arch: str
    note: Json = dataclasses.field(default_factory=dict)
    created: Moment = dataclasses.field(default_factory=now)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial(Record):
    """One attempt at one config: compiled, checked, measured, or why not.

    Args:
        study: id of its study.
        number: counts the trials of the study, 0, 1, ...; NEXT_NUMBER: the next free one when it is stored.
        kind: "plan", measured end to end, or "stage", one stage alone.
        stage: its name; None for a plan.
        plan: `Plan.to_dict()`; for a stage, of a plan that has it, with the config that was tried.
        outcome: one of `OUTCOMES`.
        reason: why it is not "ok", for the user.
        time_us: median, microseconds; an "ok" trial has one.
        timings_us: every raw timing, microseconds.
        errors: largest error found, by tensor; may be NaN or infinite.
        resources: registers, spills, shared memory, ...; any plain data.
        created: ISO 8601 with a time zone.
    """

    study: str
    number: int = NEXT_NUMBER
    kind: str
    stage: str | None = None
    plan: Json
    outcome: str
    reason: str | None = None
    time_us: float | None = None
    timings_us: Times = ()
    errors: Numbers = dataclasses.field(default_factory=dict)
    resources: Json = dataclasses.field(default_factory=dict)
    created: Moment = dataclasses.field(default_factory=now)

    def __post_init__(self) -> None:
        if isinstance(self.reason, str):
            # compilers print what they like; no database takes NUL or half a surrogate pair, and no trial may be lost
            text = self.reason.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
            object.__setattr__(self, "reason", text or None)
        super().__post_init__()
        for name, allowed in (("kind", KINDS), ("outcome", OUTCOMES)):
            if getattr(self, name) not in allowed:
                raise self._wrong(f"`{name}` must be one of {', '.join(allowed)}", repr(getattr(self, name)))
        if self.outcome == "ok" and self.time_us is None:
            raise self._wrong("a trial with outcome ok has a time", "time_us=None")
        try:
            stages = set(Plan.from_dict(self.plan).stages)
        except PlanError as error:
            raise self._wrong(error.rule, error.got) from None
        if (self.kind == "stage") != (self.stage is not None) or (self.stage is not None and self.stage not in stages):
            raise self._wrong(
                "a stage trial names a stage of its plan; a plan trial names none",
                f"kind={self.kind!r}, stage={self.stage!r}, stages of the plan {sorted(stages)}",
            )

    @property
    def identity(self) -> str:
        """The same trial under another number, as after a merge, has the same identity."""
        return digest({**self.to_dict(), "number": NEXT_NUMBER})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quarantined(Record):
    """A config that failed admission and is not tried again with that compiler and source."""

    arch: str
    compiler: str
    template: str
    config: Json
    source_hash: str
    reason: str
    created: Moment = dataclasses.field(default_factory=now)

    @property
    def identity(self) -> str:
        return digest([self.arch, self.compiler, self.template, self.config, self.source_hash])


@dataclasses.dataclass(frozen=True)
class Contents:
    """All records of a database, or those of an exchange file."""

    studies: tuple[Study, ...] = ()
    trials: tuple[Trial, ...] = ()
    answers: tuple[Answer, ...] = ()
    quarantine: tuple[Quarantined, ...] = ()
