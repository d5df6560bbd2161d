"""Several problems tuned as one: how often each shape comes, how its sequences are packed, how its router is skewed.

A workload is what a model meets in service, recorded as a histogram in a small JSON file. Its entries share one answer;
all that is not a length (rule, heads, dtype, N, ...) they have in common. A search of one problem is a workload of one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from typing import Any

from sse_tune.database.exchange import parse_json
from sse_tune.database.fields import canonical, digest
from sse_tune.errors import ExchangeError, ProblemError, WorkloadError
from sse_tune.problem import Problem
from sse_tune.runtime.arguments import pose
from sse_tune.space import Config, Constraint, Space
from sse_tune.tuning.cases import QUICK, case_problem

FORMAT = 1
_FIELDS = {"weight", "seq_len", "batch", "lengths", "occupancy"}
_HUGE = 1e300
_SEE = "correct the file; docs/search.md describes it"
_ONE_LENGTH = {"seq_len": 1, "batch": 1, "num_sequences": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One kind of call.

    Args:
        problem: what is computed.
        weight: how often it comes, in any unit.
        lengths: of the packed sequences; None: as `problem` says, equal ones.
        occupancy: how many tokens choose each partition first, shares or counts, kept as shares; None: a router
            without preferences.

    Raises:
        WorkloadError: the parts contradict each other.
    """

    problem: Problem
    weight: float = 1.0
    lengths: tuple[int, ...] | None = None
    occupancy: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("lengths", "occupancy"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        problem, lengths, occupancy = self.problem, self.lengths, self.occupancy
        if not _is_number(self.weight) or self.weight <= 0:
            raise WorkloadError("`weight` must be a number above 0", repr(self.weight), "leave out what never comes")
        if lengths is not None and (problem.num_sequences != len(lengths) or problem.seq_len != sum(lengths)):
            raise WorkloadError(
                "`lengths` must be those of the problem's packed sequences",
                f"{len(lengths)} of {sum(lengths)} tokens, num_sequences={problem.num_sequences}, "
                f"seq_len={problem.seq_len}", "set num_sequences to their count and seq_len to their sum",
            )  # fmt: skip
        if occupancy is None:
            return
        if not isinstance(occupancy, tuple) or not all(_is_number(share) and share >= 0 for share in occupancy):
            raise WorkloadError("`occupancy` must be numbers, 0 or more", _shown(occupancy), "count tokens")
        if len(occupancy) != problem.num_partitions or not any(occupancy):
            raise WorkloadError(
                "`occupancy` must have a number for each of the N partitions, not all 0",
                f"{len(occupancy)} numbers, N={problem.num_partitions}",
                "record it with the model that is tuned, or leave it out",
            )
        object.__setattr__(self, "occupancy", _shares(occupancy))

    @property
    def title(self) -> str:
        """For people: the shape, and what is special about it."""
        problem, parts = self.problem, []
        if self.lengths is not None:
            parts.append(f"T={problem.seq_len} in {len(self.lengths)} sequences of {min(self.lengths)} to "
                         f"{max(self.lengths)}")  # fmt: skip
        else:
            parts.append(f"B={problem.batch} T={problem.seq_len}")
        if self.occupancy is not None:
            shares = sorted(self.occupancy, reverse=True)
            shown = "/".join(f"{100 * share:.0f}" for share in shares[:4]) + ("/..." if len(shares) > 4 else "")
            parts.append(f"partitions at {shown} %")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """As an entry of a file; what is not set is left out."""
        packed = {} if self.lengths is None else {"lengths": list(self.lengths)}
        skewed = {} if self.occupancy is None else {"occupancy": list(self.occupancy)}
        shape = {"seq_len": self.problem.seq_len, "batch": self.problem.batch}
        return {"weight": self.weight, **shape, **packed, **skewed}


@dataclasses.dataclass(frozen=True)
class Workload:
    """The entries of a workload, the heaviest first; equal ones are one, and the weights are shares of all calls.

    Raises:
        WorkloadError: there is no entry, or they differ in more than lengths, packing and occupancy.
    """

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        common = {entry.problem.replace(**_ONE_LENGTH) for entry in self.entries}
        if len(common) != 1:
            raise WorkloadError(
                "a workload's entries must differ in lengths, packing and occupancy only",
                f"{len(common)} kinds of problem" if common else "no entry", "search for each kind apart",
            )  # fmt: skip
        weights: dict[tuple[Any, ...], list[float]] = {}
        for entry in self.entries:
            weights.setdefault((entry.problem, entry.lengths, entry.occupancy), []).append(entry.weight)
        shares = _shares(tuple(sum(parts) for parts in weights.values()))
        if not all(0 < share <= 1 for share in shares):
            raise WorkloadError("the weights must be comparable numbers", f"shares of {_shown(shares)}", "scale them")
        merged = [
            Entry(problem=problem, weight=share, lengths=lengths, occupancy=occupancy)
            for (problem, lengths, occupancy), share in zip(weights, shares)
        ]
        merged.sort(key=lambda entry: (-entry.weight, canonical(entry.to_dict())))
        object.__setattr__(self, "entries", tuple(merged))

    @classmethod
    def of(cls, problem: Problem | Workload) -> Workload:
        """A problem as a workload of one entry."""
        return problem if isinstance(problem, Workload) else cls((Entry(problem=problem),))

    @classmethod
    def read(cls, path: str | pathlib.Path, problem: Problem) -> Workload:
        """The workload of a file; `problem` gives all that is not a length.

        Raises:
            WorkloadError: the file is not there, damaged, or does not fit the format or the problem.
        """
        where = pathlib.Path(path)
        try:
            return cls.from_dict(parse_json(where.read_text(encoding="utf-8"), where), problem)
        except OSError as error:
            raise WorkloadError("the workload file must be readable", f"{path}: {error.strerror}",
                                "check the path") from None  # fmt: skip
        except UnicodeDecodeError:
            raise WorkloadError("the workload file must be text in UTF-8", f"{path}", _SEE) from None
        except ExchangeError as error:
            raise WorkloadError(error.rule, error.got, _SEE) from None

    @classmethod
    def from_dict(cls, data: object, problem: Problem) -> Workload:
        """The workload of a file's content, see `read`."""
        if not isinstance(data, dict) or set(data) != {"format", "entries"} or not isinstance(data["entries"], list):
            got = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
            raise WorkloadError("a workload has exactly a `format` and a list of `entries`", _shown(got), _SEE)
        if data["format"] != FORMAT or type(data["format"]) is not int:
            raise WorkloadError(f"the workload's format must be {FORMAT}", _shown(data["format"]), _SEE)
        return cls(tuple(_entry(i, fields, problem) for i, fields in enumerate(data["entries"])))

    def to_dict(self) -> dict[str, Any]:
        """As the content of a file; equal workloads give equal content."""
        return {"format": FORMAT, "entries": [entry.to_dict() for entry in self.entries]}

    @property
    def problem(self) -> Problem:
        """Of the heaviest entry."""
        return self.entries[0].problem

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The different problems; several entries may have one."""
        return tuple(dict.fromkeys(entry.problem for entry in self.entries))

    @property
    def shares(self) -> tuple[float, ...]:
        """Of all calls, entry by entry; their sum is 1."""
        return tuple(entry.weight for entry in self.entries)

    @property
    def key(self) -> dict[str, Any] | None:
        """What tells its studies from those of the heaviest entry's problem alone; None: it is that problem alone."""
        (first, *others) = self.entries
        return None if not others and first.lengths is None and first.occupancy is None else self.to_dict()

    @property
    def id(self) -> str:
        """Thirty-two hex digits over its content and what its entries have in common."""
        return digest([self.problem.replace(**_ONE_LENGTH).to_dict(), self.to_dict()])

    @functools.cached_property
    def layouts(self) -> tuple[Problem, ...]:
        """Problems that admission tells apart, the heaviest entry's first: of its cases only the ordinary one takes
        the problem's own layout, packed or not, and lengths are the cases' own."""
        found: dict[object, Problem] = {}
        for problem in self.problems:
            found.setdefault(case_problem(QUICK[0], problem, 64, "full"), problem)
        return tuple(found.values())

    def joint(self, space: Space) -> Space:
        """A space whose constraints hold for every entry, whichever problem they are asked with."""
        if len(self.problems) == 1:
            return space
        return Space(space.params, tuple(self._joint(constraint) for constraint in space.constraints))

    def _joint(self, constraint: Constraint) -> Constraint:
        def holds(_: Problem, config: Config, device: Any) -> bool:
            return all(constraint.holds(problem, config, device) for problem in self.problems)

        return Constraint(constraint.rule, holds)


def _entry(number: int, fields: object, problem: Problem) -> Entry:
    """An entry of a file; errors say which."""
    try:
        if not isinstance(fields, dict) or set(fields) - _FIELDS or "weight" not in fields:
            got = sorted(map(str, fields)) if isinstance(fields, dict) else type(fields).__name__
            raise WorkloadError(f"an entry has a `weight` and of {sorted(_FIELDS - {'weight'})} what it needs",
                                _shown(got))  # fmt: skip
        lengths, occupancy = fields.get("lengths"), fields.get("occupancy")
        shape: dict[str, object] = {"batch": fields.get("batch", 1), "num_sequences": None}
        if lengths is None:
            if "seq_len" not in fields:
                raise WorkloadError("an entry needs a `seq_len` or the `lengths` of its sequences", "neither")
            shape["seq_len"] = fields["seq_len"]
        else:
            if not isinstance(lengths, list) or not all(type(n) is int and n >= 0 for n in lengths) or not any(lengths):
                raise WorkloadError("`lengths` must be a list of integers, 0 or more, not all 0", _shown(lengths))
            if fields.get("seq_len", sum(lengths)) != sum(lengths):
                raise WorkloadError("`seq_len` must be the sum of `lengths`",
                                    f"{_shown(fields['seq_len'])}, not {sum(lengths)}")  # fmt: skip
            shape |= {"seq_len": sum(lengths), "num_sequences": len(lengths)}
        if occupancy is not None and not isinstance(occupancy, list):
            raise WorkloadError("`occupancy` must be a list of numbers", _shown(occupancy))
        return Entry(
            problem=pose(tuple(problem.replace(**shape).to_dict().items())), weight=fields["weight"],
            lengths=None if lengths is None else tuple(lengths),
            occupancy=None if occupancy is None else tuple(occupancy),
        )  # fmt: skip
    except (WorkloadError, ProblemError) as error:
        raise WorkloadError(f"entries[{number}]: {error.rule}", error.got, error.remedy or _SEE) from None


def _shares(counts: tuple[float, ...]) -> tuple[float, ...]:
    """Of their sum; what are shares already are left, to the last digit."""
    total = sum(counts)
    return tuple(map(float, counts)) if math.isclose(total, 1, rel_tol=1e-12) else tuple(n / total for n in counts)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _HUGE


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:80] + "..."
