"""`doctor`: what works on this machine, what does not, and why."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import sys

import typer

from sse_tune.cli_common import DATABASE, ENVIRONMENT, DbOption, JsonOption, console, print_json
from sse_tune.compilers import tilelang
from sse_tune.device import Device, driver_version, program_output, toolchain
from sse_tune.errors import DatabaseError, SSETuneError

GOOD, NOTE, BAD = "ok", "note", "broken"
_MARKS = {GOOD: "[green]ok[/green]", NOTE: "[yellow]note[/yellow]", BAD: "[red]broken[/red]"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at: "ok", "note" (something is not there, and need not be) or "broken"."""

    what: str
    state: str
    text: str


def doctor(db: DbOption = None, as_json: JsonOption = False) -> None:
    """Look at Python, compilers, GPU, driver and database; exit code 3 when nothing can run, 4 for a bad database."""
    device, found = _hardware()
    found = [_python(), *found, *_compilers(device)]
    database, damaged = _database(db)
    found += [database, *_answers(device)]
    broken = [finding for finding in found if finding.state == BAD]
    if as_json:
        print_json({"findings": [dataclasses.asdict(finding) for finding in found], "works": not broken})
    else:
        _print(found)
    if damaged:
        raise typer.Exit(DATABASE)
    if broken:
        raise typer.Exit(ENVIRONMENT)


def _python() -> Finding:
    return Finding("Python", GOOD, f"{platform.python_version()} on {platform.platform()}: {sys.executable}")


def _hardware() -> tuple[Device | None, list[Finding]]:
    try:
        import torch
    except Exception as error:  # a torch that is there and does not load fails in ways of its own
        return None, [Finding("torch", BAD, f"does not load: {_line(error)}; install it again")]
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs"
    found = [Finding("torch", GOOD, f"{torch.__version__}, {built}")]
    driver = driver_version()
    try:
        device = Device.detect()
    except Exception as error:  # the driver's errors have no common class
        return None, [*found, Finding("GPU", BAD, _line(error))]
    if device.kind == "cuda":
        text = (
            f"{device.name}, {device.arch}, {device.multiprocessors} multiprocessors, "
            f"{device.memory_bytes / 2**30:.0f} GiB, {device.smem_per_block_bytes // 1024} KiB shared memory a block"
        )
        found += [Finding("GPU", GOOD, text), Finding("driver", GOOD, driver or "its version is not told")]
    elif driver is not None:
        why = (
            "torch is a build for CPUs" if not torch.version.cuda else "torch cannot use it: driver too old, or hidden"
        )
        found += [Finding("GPU", BAD, f"there is one, but {why}"), Finding("driver", GOOD, driver)]
    else:
        cpu = f"none; the torch backend runs on the CPU: {device.name}, {device.multiprocessors} cores"
        found += [Finding("GPU", NOTE, cpu), Finding("driver", NOTE, "no NVIDIA driver")]
    return device, found


def _compilers(device: Device | None) -> list[Finding]:
    versions = toolchain()
    gpu = device is not None and device.kind == "cuda"
    found = []
    if versions["triton"] is None:
        found.append(
            Finding("triton", BAD if gpu else NOTE, "not installed; its kernels cannot run: pip install triton")
        )
    else:
        use = "runs" if gpu else "compiles for sm_80, sm_90 and sm_100; running needs a GPU"
        found.append(Finding("triton", GOOD, f"{versions['triton']}: {use}"))
    lacks = tilelang.missing()
    if lacks is not None:
        found.append(Finding("tilelang", NOTE, f"{lacks}; its kernels cannot be built, the others run without"))
    else:
        use = "runs" if gpu else "compiles for sm_80, sm_90 and sm_100; running needs a GPU"
        found.append(Finding("tilelang", GOOD, f"{versions['tilelang']}: {use}"))
    nvcc = program_output(tilelang.nvcc() or "nvcc", "--version")
    if nvcc is None:
        found.append(Finding("nvcc", NOTE, "not found; TileLang needs it to compile"))
    else:
        found.append(Finding("nvcc", GOOD, nvcc.splitlines()[-1]))
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        found.append(Finding("C compiler", BAD if gpu else NOTE, "none; Triton's launcher and torch.compile need one"))
    else:
        found.append(Finding("C compiler", GOOD, str(shutil.which(compiler))))
    return found


def _database(db: str | None) -> tuple[Finding, bool]:
    """The state of the database, and whether it is damaged."""
    try:
        from sse_tune.database.store import TuningDatabase, default_path

        if db is None and not default_path().exists():
            return Finding("database", NOTE, f"{default_path()} is not there yet; a search makes it"), False
        with TuningDatabase(db) as database:
            text = f"{db or default_path()}: {len(database.answers())} answers, {len(database.trials())} trials"
        return Finding("database", GOOD, text), False
    except DatabaseError as error:
        return Finding("database", BAD, str(error)), True
    except ImportError as error:
        return Finding("database", BAD, f"{_line(error)}; install sse-tune with what it needs"), False


def _answers(device: Device | None) -> list[Finding]:
    """Which of the answers shipped for this device can be used, and why others cannot."""
    if device is None:
        return []
    try:
        from sse_tune.database.keys import fits
        from sse_tune.database.shipped import shipped_answers

        shipped = shipped_answers(device)
    except SSETuneError as error:
        return [Finding("shipped answers", BAD, str(error))]
    if not shipped:
        return [Finding("shipped answers", NOTE, f"none for {device.name}; tune it with `sse-tune search`")]
    reasons = [fits(answer, device, toolchain()) for answer in shipped]
    good = sum(reason is None for reason in reasons)
    why = "; ".join(sorted({reason for reason in reasons if reason is not None}))
    text = f"{good} of {len(shipped)} fit" + (f"; the others: {why}" if why else "")
    return [Finding("shipped answers", GOOD if good else NOTE, text)]


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def _print(found: list[Finding]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in found:
        table.add_row(finding.what, _MARKS[finding.state], escape(finding.text))
    console().print(table)
