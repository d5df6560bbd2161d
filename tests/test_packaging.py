"""What is installed is what is in the repository: every package and shipped answer; and files can be read."""

import json
import pathlib
import re
import subprocess
import sys

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along there

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed():
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "sse_tune").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"sse_tune._tuning_db"}


def test_the_version_is_one():
    import sse_tune

    assert PROJECT["project"]["version"] == sse_tune.__version__


def test_a_wheel_holds_all_modules_and_shipped_answers(tmp_path):
    import shutil
    import zipfile

    source = tmp_path / "source"
    source.mkdir()
    for name in ("sse_tune", "tuning_db"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    answer = source / "tuning_db" / "some-gpu" / "a-bucket.json"
    answer.parent.mkdir(exist_ok=True)
    answer.write_text(json.dumps({}))
    build = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sse_tune").rglob("*.py")}
    assert modules <= names
    assert {"sse_tune/_tuning_db/some-gpu/a-bucket.json", "sse_tune/py.typed"} <= names


def test_cpu_constraints_pin_every_dependency():
    pinned = re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "constraints-cpu.txt").read_text(), re.MULTILINE)
    extras = PROJECT["project"]["optional-dependencies"]
    needed = PROJECT["project"]["dependencies"] + extras["test"] + extras["dev"]
    names = {re.match(r"[A-Za-z0-9_.-]+", line)[0].lower() for line in needed} - {"sse-tune"}
    assert names <= {name.lower() for name in pinned}


def test_no_index_address_is_written_down():
    for name in ("Makefile", "constraints-cpu.txt", "pyproject.toml", ".ci/run"):
        assert not re.search(r"index-url|find-links|https?://", (ROOT / name).read_text()), name


def test_files_are_of_a_size_to_be_read():
    for path in (ROOT / "sse_tune").rglob("*.py"):
        # the macros of a TileLang kernel are closures of one factory
        limit = 460 if "tilelang" in path.parts else 400 if "triton" in path.parts else 300
        assert len(path.read_text().splitlines()) <= 1.05 * limit, path
    for path in (ROOT / "tests").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, path


def test_modules_open_with_a_docstring():
    import ast

    for folder in ("sse_tune", "tests", "tuning_db"):
        for path in (ROOT / folder).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text())), path
