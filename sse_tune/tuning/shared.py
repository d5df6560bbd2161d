"""What a search starts from: answers of neighbouring shapes and GPUs, and the storage that hosts of one study share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import optuna
import sqlalchemy as sa

from sse_tune.database.records import Answer
from sse_tune.database.shipped import shipped_answers
from sse_tune.database.store import TuningDatabase
from sse_tune.device import Device
from sse_tune.errors import ConstraintError, DatabaseError, DeviceError, PlanError, ProblemError
from sse_tune.plan import Plan
from sse_tune.problem import Bucket, Problem
from sse_tune.runtime.dispatch import by_distance, first_that_fits, narrow
from sse_tune.templates.registry import graph_of, validate_plan
from sse_tune.templates.stages import stage_names
from sse_tune.tuning.landscape import base_plan
from sse_tune.tuning.samplers import quiet
from sse_tune.tuning.workload import Workload

_KNOWN_PLANS = 3
_OTHER_DEVICE, _OTHER_ARCH = 1.0, 2.0  # how much farther an answer of another GPU is, in doublings of the rows
_OTHER_STREAMS = 2.0  # the always-on stream alone beside partitions: another number of rows, the same kernels
_LOCK = 7355609  # PostgreSQL advisory lock held while Optuna makes its tables


def known_plans(
    database: TuningDatabase, problem: Problem | Workload, device: Device, backends: tuple[str, ...]
) -> list[Plan]:
    """Plans that are good elsewhere and run here, on all entries: of neighbouring buckets and GPUs, the nearest first.

    They come from the database and from the answers that are shipped. Their sources and toolchain may be others, and
    stages that they lack, or run by backends that are not searched here, are the default's: they are proposals,
    admitted and measured like all.
    """
    answers = (*database.answers(), *shipped_answers())
    workload = Workload.of(problem)
    ranked: list[tuple[float, int, Plan]] = []
    for entry in workload.problems:
        for distance, answer in (*by_distance(entry.bucket, answers), *_of_other_streams(entry.bucket, answers)):
            same = answer.device == device.slug
            other = 0.0 if same else _OTHER_DEVICE if answer.arch == device.arch else _OTHER_ARCH
            ranked.append((distance + other, len(ranked), answer.plan))
    graphs = {graph_of(backend) for backend in backends}
    found: dict[Plan, None] = {}
    for _, _, theirs in sorted(ranked, key=lambda entry: entry[:2]):
        if theirs.graph not in graphs:
            continue
        try:
            plan = _adapted(narrow(theirs, workload.problem), workload, device, backends)
            for entry in workload.problems:
                validate_plan(plan, entry, device)
        except (PlanError, ConstraintError, DeviceError):
            continue
        found[plan] = None
    return list(found)[:_KNOWN_PLANS]


def _adapted(plan: Plan, workload: Workload, device: Device, backends: tuple[str, ...]) -> Plan:
    """A plan with exactly the stages that are needed here: at the default those that it lacks, which sum up rows, and
    those that it runs by a backend that is not searched.

    Raises ConstraintError or PlanError when the plan's outer choices are not known, or have no default here.
    """
    needed = stage_names(plan.graph, workload.problem, plan.outer)
    stages = {name: plan.stages[name] for name in needed if name in plan.stages}
    stages = {name: choice for name, choice in stages.items() if choice.backend in backends}
    if len(stages) < len(needed):
        stages = {**base_plan(workload, device, backends[0], plan.outer).stages, **stages}
    return dataclasses.replace(plan, stages=stages)


def _of_other_streams(wanted: Bucket, answers: Sequence[Answer]) -> list[tuple[float, Answer]]:
    """For the always-on stream alone the answers with partitions, and the other way round: no call takes one for the
    other, but what is fast there is worth a trial."""
    found = []
    for answer in answers:
        try:
            theirs = Bucket.from_name(answer.bucket)
        except ProblemError:
            continue  # see `by_distance`
        if (theirs.num_partitions == 0) != (wanted.num_partitions == 0):
            as_there = dataclasses.replace(
                wanted, num_partitions=theirs.num_partitions, top_k=theirs.top_k, read_k=theirs.read_k
            )
            found += [(distance + _OTHER_STREAMS, answer) for distance, _ in by_distance(as_there, (answer,))]
    return found


def incumbent(
    database: TuningDatabase, problem: Problem, device: Device, others: Sequence[Problem] = ()
) -> Plan | None:
    """The plan of the stored answer that a call would take here without a search, of this bucket or the nearest one;
    None: the default is what would run.

    An answer that cannot run `others`, the further problems of a workload, is passed over: the database keeps it where
    it is the faster one.
    """
    answers = (*database.answers(device.slug), *shipped_answers(device))
    found, _ = first_that_fits(problem, device, answers, others)
    return None if found is None else found[1]


def shared_storage(database: TuningDatabase) -> optuna.storages.RDBStorage | None:
    """Optuna's tables on the server that the database is on, beside ours; None: it is a file, and nobody shares it.

    Raises:
        DatabaseError: the server does not let them be made.
    """
    url = database.server_url
    if url is None:
        return None
    engine = sa.create_engine(url, poolclass=sa.pool.NullPool)
    try:
        with engine.begin() as connection, quiet():
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            return optuna.storages.RDBStorage(url.render_as_string(hide_password=False))
    except sa.exc.SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or error).strip().split("\n")[0]
        raise DatabaseError(
            f"Optuna's tables must be made in {database.name}", cause, "check the rights of the user"
        ) from None
    finally:
        engine.dispose()
