"""Problem to plan: the tuned answer of its bucket, else the nearest measured one, else the templates' defaults.

An answer is used only where its GPU, toolchain and template sources still fit and its plan passes the constraints of
the problem at hand; whatever was passed over is kept with its reason, for `explain`. Of one bucket's answers that fit,
one that another was chosen over, measured in turn, gives way to it; then the fastest as recorded is taken. Answers are
read once a process: `clear_cache` makes later calls look again.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence

import torch

from sse_tune.database.keys import fits
from sse_tune.database.records import Answer
from sse_tune.database.shipped import shipped_answers
from sse_tune.database.store import TuningDatabase, default_path
from sse_tune.device import Device, toolchain
from sse_tune.errors import ConstraintError, DeviceError, PlanError, ProblemError
from sse_tune.plan import Plan
from sse_tune.problem import Bucket, Problem
from sse_tune.runtime.arguments import Fields, pose
from sse_tune.runtime.settings import write_problem
from sse_tune.templates.outer import forward_part
from sse_tune.templates.registry import default_plan, validate_plan
from sse_tune.templates.stages import stage_names

# fields of a bucket that decide which configs are possible: a near answer has them in common
_SAME = ("rule", "dtype", "head_dim", "head_dim_v", "norm", "shared")


@dataclasses.dataclass(frozen=True)
class Decision:
    """What runs, and why.

    Args:
        plan: the plan, checked against the problem and the device.
        source: "exact" (the answer of this bucket), "nearest" (of another one) or "default".
        reason: one sentence.
        answer: the record behind it; None: the default.
        refused: answers that came before it, each with why it was not used.
    """

    plan: Plan
    source: str
    reason: str
    answer: Answer | None = None
    refused: tuple[str, ...] = ()

    @functools.cached_property
    def plan_json(self) -> str:
        return self.plan.to_json()


def decide(
    problem: Problem, device: Device, database: TuningDatabase | str | pathlib.Path | None = None
) -> Decision:
    """The plan for a problem on a device.

    Args:
        problem: what to compute.
        device: where.
        database: where answers are, a file or URL; None: the user's default database if there is one. The shipped
            answers are looked at after it.

    Raises:
        ConstraintError: not even a default passes the constraints.
        DatabaseError: the database cannot be read.
    """
    if isinstance(database, TuningDatabase):
        return _choose(problem, device, (*database.answers(device=device.slug), *shipped_answers(device)))
    return _decide(problem, device, None if database is None else str(database))


@functools.lru_cache(maxsize=4096)
def resolve(fields: Fields, device: str) -> tuple[str, str, str]:
    """Graph, problem and plan, the last two as JSON, of checked fields on a device of torch by name and index.

    Raises:
        ProblemError: a size is beyond what a problem may have; otherwise as `decide`.
    """
    problem = pose(fields)
    decision = decide(problem, Device.detect(device))
    return decision.plan.graph, write_problem(problem), decision.plan_json


def clear_cache() -> None:
    """Forget what was read: the next decision looks into the databases again."""
    resolve.cache_clear()
    _decide.cache_clear()
    _known_answers.cache_clear()


def narrow(plan: Plan, problem: Problem) -> Plan:
    """The part of a training plan that the forward pass runs, for a problem of direction "fwd".

    Raises PlanError for a plan whose graph or outer choices are not known here."""
    if problem.trains or plan.graph == "whole":
        return plan
    outer = forward_part(problem.rule, plan.outer)
    kept = {name: plan.stages[name] for name in stage_names(plan.graph, problem, outer) if name in plan.stages}
    return dataclasses.replace(plan, outer=outer, stages=kept)


def device_of(device: Device | torch.device | str | None) -> Device:
    """A device as users name it: ours, torch's, an architecture such as "sm_90", or None for what is there."""
    if isinstance(device, Device):
        return device
    if isinstance(device, str) and device.startswith("sm_"):
        return Device.from_arch(device)
    try:
        return Device.detect(device)
    except RuntimeError as error:
        if isinstance(error, DeviceError):
            raise
        raise DeviceError("the device must be one torch knows", str(device), "use 'cuda' or 'cpu'") from None


@functools.lru_cache(maxsize=4096)
def _decide(problem: Problem, device: Device, database: str | None) -> Decision:
    return _choose(problem, device, _known_answers(device, database))


@functools.lru_cache(maxsize=64)
def _known_answers(device: Device, database: str | None) -> tuple[Answer, ...]:
    if database is None and not default_path().exists():
        return shipped_answers(device)
    with TuningDatabase(default_path() if database is None else database) as opened:
        return (*opened.answers(device=device.slug), *shipped_answers(device))


def _choose(problem: Problem, device: Device, answers: tuple[Answer, ...]) -> Decision:
    found, refused = first_that_fits(problem, device, answers)
    if found is None:
        why = "no measured answer fits" if refused else "nothing is measured for this kind of problem on this device"
        reason = f"{why}; tune it with `sse-tune search {_search_arguments(problem)}`"
        return Decision(default_plan(problem, device), "default", reason, None, refused)
    answer, plan = found
    if answer.bucket == problem.bucket.name:
        return Decision(plan, "exact", f"measured for this bucket on {answer.created}", answer, refused)
    return Decision(plan, "nearest", f"the nearest measured bucket that fits is {answer.bucket}", answer, refused)


def first_that_fits(
    problem: Problem, device: Device, answers: Sequence[Answer], others: Sequence[Problem] = ()
) -> tuple[tuple[Answer, Plan] | None, tuple[str, ...]]:
    """The answer to take, with its plan for the problem, and why those before it are refused.

    Args:
        problem, device: what runs, and where.
        answers: all that are known.
        others: further problems that the plan must be able to run.
    """
    present, refused = toolchain(), []
    for _, pairs in itertools.groupby(by_distance(problem.bucket, answers), key=lambda pair: pair[1].bucket):
        plans = [(answer, _plan_or_reason(answer, problem, device, present, others)) for _, answer in pairs]
        # an answer is outdone by those that can run, no others
        fitting = by_distance(problem.bucket, [answer for answer, plan in plans if isinstance(plan, Plan)])
        for answer, plan in plans:
            if isinstance(plan, str):
                refused.append(f"{answer.bucket}: {plan}")
            elif answer is fitting[0][1]:
                return (answer, plan), tuple(refused)
    return None, tuple(refused)


def _plan_or_reason(
    answer: Answer, problem: Problem, device: Device, present: Mapping[str, str | None], others: Sequence[Problem]
) -> Plan | str:
    """An answer's plan for a problem, or why it is refused."""
    reason = fits(answer, device, present)
    if reason is not None:
        return reason
    try:
        plan = narrow(answer.plan, problem)
        for posed in dict.fromkeys((problem, *others)):
            validate_plan(plan, posed, device)
    except (PlanError, ConstraintError, DeviceError) as error:
        return str(error)
    return plan


def by_distance(wanted: Bucket, answers: Sequence[Answer]) -> list[tuple[float, Answer]]:
    """The answers that could serve, nearest first; of one bucket those that none of the others outdoes come before the
    rest, and the fastest first."""
    found: list[tuple[float, Answer]] = []
    of_bucket: dict[str, list[Answer]] = {}
    for answer in answers:
        try:
            bucket = Bucket.from_name(answer.bucket)
        except ProblemError:
            continue  # written by a version with other buckets: it has no distance to ours
        distance = _distance(wanted, bucket)
        if distance is not None:
            found.append((distance, answer))
            of_bucket.setdefault(answer.bucket, []).append(answer)

    def place(pair: tuple[float, Answer]) -> tuple[float, str, bool, float]:
        distance, answer = pair
        outdone = any(other.outdoes(answer) for other in of_bucket[answer.bucket])
        return distance, answer.bucket, outdone, answer.time_us

    return sorted(found, key=place)


def _distance(wanted: Bucket, other: Bucket) -> float | None:
    """How far apart two buckets are; None: no plan of one can serve the other. 0: the same bucket."""
    if any(getattr(wanted, name) != getattr(other, name) for name in _SAME):
        return None
    if wanted.direction != other.direction and wanted.direction == "fwd+bwd":
        return None
    if (wanted.num_partitions == 0) != (other.num_partitions == 0):
        return None
    return (
        abs(wanted.rows_log2 - other.rows_log2)
        + abs(math.log2(wanted.num_heads / other.num_heads))
        + abs(wanted.num_partitions - other.num_partitions)
        + abs(wanted.top_k - other.top_k)
        + abs(wanted.read_k - other.read_k)
        + 0.5 * (wanted.packed != other.packed)
        + 0.5 * (wanted.direction != other.direction)
    )


def _search_arguments(problem: Problem) -> str:
    parts = [
        f"--rule {problem.rule}", f"--heads {problem.num_heads}", f"--head-dim {problem.head_dim}",
        f"--head-dim-v {problem.value_dim}", f"--partitions {problem.num_partitions}",
        f"--seq-len {problem.seq_len}", f"--dtype {problem.dtype}", f"--direction {problem.direction}",
    ]
    if problem.num_partitions:
        parts.insert(5, f"--top-k {problem.top_k}")
    return " ".join(parts)
