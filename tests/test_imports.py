"""Who may import whom, read from the sources; and what `import sse_tune` must not load."""

import ast
import pathlib
import subprocess
import sys

import pytest

import sse_tune

ROOT = pathlib.Path(sse_tune.__file__).parent
HEAVY = ("triton", "tilelang", "optuna", "sqlalchemy", "pandas", "torch", "rich", "typer")

# part -> the parts it may import from, beside itself
BASE = {"errors"}
DESCRIPTIONS = BASE | {"problem", "device", "space", "plan"}
KERNELS = DESCRIPTIONS | {"reference", "templates", "compilers", "compile"}
ALLOWED = {
    "errors": set(),
    "problem": BASE,
    "device": BASE,
    "space": BASE | {"problem", "device"},
    "plan": BASE | {"space"},
    "races": set(),
    "reference": BASE,
    "templates": DESCRIPTIONS | {"reference"},
    "compilers": DESCRIPTIONS | {"races", "templates"},
    "compile": DESCRIPTIONS | {"templates", "compilers"},
    "database": KERNELS - {"reference"},
    "runtime": KERNELS | {"database"},
    "layers": BASE | {"runtime"},
    "tuning": KERNELS | {"database", "runtime"},
    "bench": KERNELS | {"database", "runtime", "layers", "tuning"},
    "cli": KERNELS | {"database", "runtime", "layers", "tuning", "bench"},
}  # fmt: skip


def sources():
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part_of(path):
    top = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "cli" if top.startswith("cli") else top


def imports(tree):
    """(module, whether it is imported when this module is) of every import."""
    inside = {
        id(node)
        for scope in ast.walk(tree)
        if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        or (isinstance(scope, ast.If) and "TYPE_CHECKING" in ast.unparse(scope.test))
        for node in ast.walk(scope)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "sse_tune":
                for alias in node.names:
                    yield f"sse_tune.{alias.name}", id(node) not in inside
            else:
                yield node.module, id(node) not in inside


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    part = part_of(path)
    for module, _ in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if module.split(".")[0] != "sse_tune" or module == "sse_tune":
            continue
        other = module.split(".")[1]
        other = "cli" if other.startswith("cli") else other
        if other in ALLOWED:  # a public name such as `__version__` is no part
            assert other == part or other in ALLOWED[part], f"{part} must not import {module}"


def test_every_part_has_its_place():
    assert {part_of(path) for path in sources()} <= set(ALLOWED)


def test_templates_of_one_backend_do_not_import_another():
    contract = ("buffers", "stages", "registry")
    for backend in ("triton", "torch", "tilelang"):
        for path in (ROOT / "templates" / backend).glob("*.py"):
            for module, _ in imports(ast.parse(path.read_text(encoding="utf-8"))):
                other = module.removeprefix("sse_tune.templates.").split(".")[0]
                assert not module.startswith("sse_tune.templates.") or other in (backend, *contract), path


def test_only_triton_templates_load_triton_with_themselves():
    for path in sources():
        if path.parent == ROOT / "templates" / "triton":
            continue
        at_once = {module.split(".")[0] for module, now in imports(ast.parse(path.read_text(encoding="utf-8"))) if now}
        assert not at_once & {"triton", "tilelang"}, path


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_import_loads_nothing_heavy():
    assert run(f"import sys, sse_tune; print(*[m for m in {HEAVY} if m in sys.modules])") == []


def test_describing_a_problem_loads_nothing_heavy():
    describe = "import sys, sse_tune as st; st.Problem.preset('demo')"
    assert run(f"{describe}; print(*[m for m in {HEAVY} if m in sys.modules])") == []


def test_the_runtime_loads_no_search_and_touches_no_device():
    found = run(
        "import sys, sse_tune as st; st.sse_attention; import torch; "
        "print(*[m for m in ('tilelang', 'optuna', 'pandas', 'sse_tune.tuning') if m in sys.modules], "
        "*(['cuda'] if torch.cuda.is_initialized() else []))"
    )
    assert found == []


def test_all_public_names_are_there():
    for name in sse_tune.__all__:
        assert getattr(sse_tune, name) is not None
    assert set(sse_tune.__all__) <= set(dir(sse_tune))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'; it has"):
        sse_tune.nothing  # noqa: B018
