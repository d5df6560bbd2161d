"""What a failure means for a trial: its outcome, its reason in one line, and whether the process can be used again."""

from __future__ import annotations

from sse_tune.errors import CompileError, SSETuneError

OUTCOMES = ("ok", "rejected", "compile_error", "wrong", "crash", "timeout", "out_of_memory", "interrupted")

# type names of Triton's, which is not imported here
_COMPILER_ERRORS = ("CompilationError", "OutOfResources", "PTXASError", "UnsupportedLanguageConstruct")
_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
_DEVICE_SIGNS = ("cuda error", "cudaerror", "[cuda]", "illegal memory", "misaligned address", "unspecified launch")


def classify(error: BaseException) -> tuple[str, str]:
    """Outcome and reason of a candidate that raised."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    shown = f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out_of_memory", shown
    if any(sign in text.lower() for sign in _MEMORY_SIGNS):
        return "out_of_memory", shown
    if isinstance(error, CompileError) or type(error).__name__ in _COMPILER_ERRORS:
        return "compile_error", shown if not isinstance(error, SSETuneError) else text
    return "crash", shown


def poisons(error: BaseException) -> bool:
    """Whether the error may have left the CUDA context unusable: no timing after it can be trusted."""
    if type(error).__name__ in ("OutOfMemoryError", *_COMPILER_ERRORS):
        return False
    return type(error).__name__ == "AcceleratorError" or any(sign in str(error).lower() for sign in _DEVICE_SIGNS)
