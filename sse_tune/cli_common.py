"""What the commands share: the options that name a problem, errors of one line, and output for people and scripts."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from sse_tune.errors import (
    AdmissionError,
    CompileError,
    DatabaseError,
    DeviceError,
    ExchangeError,
    SearchError,
    SSETuneError,
    WorkerError,
)
from sse_tune.problem import PRESETS, Problem

if TYPE_CHECKING:
    from rich.console import Console

    from sse_tune.device import Device

FAILED, BAD_INPUT, ENVIRONMENT, DATABASE, INTERRUPTED = 1, 2, 3, 4, 130

# the first class that fits decides; an import file that does not fit the format is bad input, not a damaged database
_EXIT_CODES: tuple[tuple[type[SSETuneError], int], ...] = (
    (ExchangeError, BAD_INPUT),
    (DatabaseError, DATABASE),
    (DeviceError, ENVIRONMENT),
    (CompileError, ENVIRONMENT),
    (WorkerError, ENVIRONMENT),
    (AdmissionError, FAILED),
    (SearchError, FAILED),
    (SSETuneError, BAD_INPUT),
)

# typer brings click along under different names; in all of them this is the root of what a command line can do wrong
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


class UsageError(SSETuneError, ValueError):
    """The command line asks for something that cannot be."""


def exit_code(error: SSETuneError) -> int:
    """The exit code of an error, see `cli.py`."""
    return next(code for kind, code in _EXIT_CODES if isinstance(error, kind))


class OneLineErrors(TyperGroup):
    """The command group; whatever goes wrong is one line on stderr, and the exit code says what kind it is."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        given = list(sys.argv[1:] if args is None else args) or ["--help"]
        try:
            code = super().main(
                given, prog_name or "sse-tune", complete_var, standalone_mode=False,
                windows_expand_args=windows_expand_args, **extra,
            )  # fmt: skip
        except SSETuneError as error:
            fail(str(error), exit_code(error))
        except _ClickException as error:
            shown = error.format_message() if hasattr(error, "format_message") else str(error)
            fail(" ".join(shown.split()).rstrip(".") + "; see `sse-tune --help`", BAD_INPUT)
        except (KeyboardInterrupt, typer.Abort):
            fail("interrupted", INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


def fail(message: str, code: int) -> None:
    """Ends the program with one line on stderr."""
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)


@dataclasses.dataclass(frozen=True)
class ProblemChoice:
    """The options that name one problem, or several of different lengths."""

    preset: Annotated[str | None, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = None
    rule: Annotated[str | None, typer.Option(help="gla or gdn, of your own --heads and --head-dim.")] = None
    heads: Annotated[int | None, typer.Option(help="H.")] = None
    head_dim: Annotated[int | None, typer.Option(help="K, up to 256.")] = None
    head_dim_v: Annotated[int | None, typer.Option(help="V, up to 512; by default K.")] = None
    partitions: Annotated[int | None, typer.Option(help="N; 0: the always-on stream alone.")] = None
    top_k: Annotated[int | None, typer.Option(help="Partitions each token writes.")] = None
    read_k: Annotated[int | None, typer.Option(help="Partitions each token reads; by default as many.")] = None
    shared: Annotated[bool | None, typer.Option("--shared/--no-shared", help="An always-on partition, or none.")] = None
    norm: Annotated[str | None, typer.Option(help="none, after or before: the l2 norm and where the gate is.")] = None
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32.")] = None
    batch: Annotated[int | None, typer.Option(help="B.")] = None
    sequences: Annotated[int | None, typer.Option(help="S packed sequences.")] = None
    seq_len: Annotated[list[int] | None, typer.Option(help="T; may be given several times.")] = None
    direction: Annotated[str | None, typer.Option(help="fwd, or fwd+bwd for training.")] = None

    def problems(self, kind: str) -> list[Problem]:
        """The problems that are named, one for each length; with nothing named, one that suits the "cuda" or "cpu".

        Raises:
            SSETuneError: the options contradict each other or name no problem.
        """
        changes: dict[str, object] = {
            field: value
            for field, value in (
                ("num_heads", self.heads), ("head_dim", self.head_dim), ("head_dim_v", self.head_dim_v),
                ("num_partitions", self.partitions), ("top_k", self.top_k), ("read_k", self.read_k),
                ("shared", self.shared), ("norm", self.norm), ("dtype", self.dtype), ("batch", self.batch),
                ("num_sequences", self.sequences), ("direction", self.direction),
            )
            if value is not None
        }  # fmt: skip
        if self.partitions == 0:
            changes = {"top_k": 0, "read_k": 0, "shared": True, **changes}
        lengths: list[dict[str, object]] = [{"seq_len": length} for length in self.seq_len or ()] or [{}]
        if self.rule is None:
            preset = self.preset or default_preset(kind)
            return [Problem.preset(preset, **changes, **length) for length in lengths]
        if self.preset is not None:
            raise UsageError(
                "--preset and --rule exclude each other",
                f"--preset {self.preset} --rule {self.rule}",
                "give one of them",
            )
        if self.heads is None or self.head_dim is None:
            raise UsageError("--rule needs --heads and --head-dim", "only a part of them", "or use --preset NAME")
        return [Problem(**{"rule": self.rule, "seq_len": 8192, **changes, **length}) for length in lengths]  # type: ignore[arg-type]

    def problem(self, kind: str) -> Problem:
        """As `problems`, where only one can be meant."""
        found = self.problems(kind)
        if len(found) > 1:
            raise UsageError("this command takes one --seq-len", f"{len(found)}", "call it once for each")
        return found[0]

    def arguments(self) -> str:
        """The options as they were given, to be shown in a command to go on with."""
        parts = []
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), "--" + field.name.replace("_", "-")
            if isinstance(value, bool):
                parts.append(name if value else f"--no-{field.name}")
            elif isinstance(value, list):
                parts.extend(f"{name} {entry}" for entry in value)
            elif value is not None:
                parts.append(f"{name} {value}")
        return " ".join(parts)


def takes_problem(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `ProblemChoice`; the command gets them as its first argument."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    options = list(inspect.signature(ProblemChoice, eval_str=True).parameters.values())
    parameters = [entry.replace(kind=inspect.Parameter.KEYWORD_ONLY) for entry in (*options, *own)]

    def run(**values: Any) -> None:
        command(ProblemChoice(**{entry.name: values.pop(entry.name) for entry in options}), **values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {entry.name: entry.annotation for entry in parameters}
    return run


# the options that several commands have
DbOption = Annotated[str | None, typer.Option("--db", help="Database file or URL; by default the user's own.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; by default the GPU, else the CPU.")]
BackendsOption = Annotated[str | None, typer.Option(help="Comma-separated: triton, torch, ...")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def find_device(name: str | None) -> Device:
    """The device a command runs on.

    Raises:
        DeviceError: there is none of that name.
    """
    from sse_tune.runtime.dispatch import device_of

    return device_of(name)


def kind_of(name: str | None) -> str:
    """ "cuda" or "cpu", without touching a GPU: a search leaves that to its worker."""
    import torch

    return "cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda"


def default_preset(kind: str) -> str:
    """What is tuned and measured when nothing is named: a released model on a GPU, a small problem on a CPU."""
    return "spikingbrain2-5b" if kind == "cuda" else "demo"


def split(text: str | None, known: tuple[str, ...], what: str) -> tuple[str, ...] | None:
    """A comma-separated option as a tuple of known words; None stays None."""
    if text is None:
        return None
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        raise UsageError(f"{what} must be of {', '.join(known)}", ", ".join(unknown) or "nothing", "separate by commas")
    return words


def seconds(text: str) -> float:
    """A duration such as 90s, 5m, 1h30m or 300.

    Raises:
        UsageError: the text is no duration, or it is 0.
    """
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    total = 0.0
    if match is not None:
        hours, minutes, rest = (float(part or 0) for part in match.groups())
        total = 3600 * hours + 60 * minutes + rest
    if total <= 0:
        raise UsageError("a budget must be a duration above 0", repr(text), "write 90s, 5m or 1h30m")
    return total


def size_bytes(text: str) -> int:
    """A size such as 2G, 1.5GiB, 800M or 1000000; K, M and G are powers of 1024.

    Raises:
        UsageError: the text is no size, or it is 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    found = 0 if match is None else int(float(match[1]) * 1024 ** " KMG".index(match[2].upper() or " "))
    if found <= 0:
        raise UsageError("a memory limit must be a size above 0", repr(text), "write 2G or 800M")
    return found


def devices(text: str | None) -> str | tuple[str, ...] | None:
    """--device: one name, or several separated by commas."""
    if text is None or "," not in text:
        return text
    return tuple(name.strip() for name in text.split(",") if name.strip())


def shown_time(time_us: float | None) -> str:
    """A time for people, with its unit."""
    if time_us is None:
        return "-"
    return f"{time_us / 1000:.3f} ms" if time_us >= 100 else f"{time_us:.1f} us"


def shown_ratio(slow_us: float | None, fast_us: float | None) -> str:
    return f"{slow_us / fast_us:.2f}x" if slow_us and fast_us else "-"


def console(stderr: bool = False) -> Console:
    """Where tables and progress go; wide enough to be read when it is no terminal."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, soft_wrap=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=160)


def print_json(value: object) -> None:
    """One line."""
    typer.echo(json.dumps(value, sort_keys=True, allow_nan=False, default=str))


__all__ = [
    "BAD_INPUT", "DATABASE", "ENVIRONMENT", "FAILED", "INTERRUPTED", "BackendsOption", "DbOption", "DeviceOption",
    "JsonOption", "OneLineErrors", "ProblemChoice", "UsageError", "console", "default_preset", "devices", "exit_code",
    "fail", "find_device", "kind_of", "print_json", "seconds", "shown_ratio", "shown_time", "size_bytes", "split",
    "takes_problem",
]  # fmt: skip
