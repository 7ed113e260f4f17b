"""What is installed is what the repository holds, and what is imported is declared."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "models", "stages", "eval", "recipes", "cli", "benchmarks")
NOT_IMPORTED: dict[str, str] = {}
OPTIONAL = {"deepspeed"}
"""Imported only where a user's launch has loaded it already."""
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def canonical(distribution: str) -> str:
    """The name of a distribution as packaging compares it, without versions and extras."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~;\[]", distribution)[0]).lower()


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def imported(files: list[Path]) -> set[str]:
    """The distributions whose modules are imported anywhere in these files, lazily or not."""
    modules = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                modules.add(node.module.partition(".")[0])
    installed = packages_distributions()
    foreign = modules - sys.stdlib_module_names - {"preftune"}
    return {canonical(installed.get(module, [module])[0]) for module in foreign}


def test_what_is_imported_is_declared_and_nothing_else():
    rooms = [file for room in PACKAGES if room != "benchmarks" for file in (ROOT / room).rglob("*.py")]
    used = imported([*(file for file in ROOT.glob("*.py") if file.name != "setup.py"), *rooms])
    declared = {canonical(each) for each in project()["dependencies"]}
    assert used - declared == OPTIONAL, "imported but not in pyproject's dependencies"
    assert declared - used == set(NOT_IMPORTED), "in pyproject's dependencies but not imported"


def test_what_benchmarks_import_is_declared():
    used = imported(list((ROOT / "benchmarks").rglob("*.py")))
    extra = project()["optional-dependencies"]["benchmarks"]
    assert used <= {canonical(each) for each in (*project()["dependencies"], *extra)}


def test_every_folder_of_modules_is_a_package():
    folders = {file.parent for room in PACKAGES for file in (ROOT / room).rglob("*.py")}
    assert not [str(each.relative_to(ROOT)) for each in folders if not (each / "__init__.py").is_file()]


def repository_files() -> list[str]:
    """What git holds, and what it would take in."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git repository")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def belongs_in_the_wheel(name: str) -> bool:
    """Rooms whole, of the benchmarks their modules, of the root its modules and the mark that it is typed."""
    first, *below = name.split("/")
    if not below:
        return name == "py.typed" or (name.endswith(".py") and name != "setup.py")
    return first in PACKAGES and (first != "benchmarks" or name.endswith(".py"))


def build(kind: str, source: Path, out: Path) -> Path:
    """A wheel or an sdist by setuptools' own hook, in a process of its own, without pip and network."""
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(out)]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("by_way_of", ["repository", "sdist"])
def test_the_wheel_holds_every_file_and_no_other(tmp_path: Path, by_way_of: str):
    names = repository_files()
    source = tmp_path / "source"
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    if by_way_of == "sdist":
        with tarfile.open(build("sdist", source, tmp_path)) as archive:
            archive.extractall(tmp_path, filter="data")
        (source,) = (folder for folder in tmp_path.glob("preftune-*") if folder.is_dir())
    with zipfile.ZipFile(build("wheel", source, tmp_path)) as archive:
        packed = {name.removeprefix("preftune/") for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == {name for name in names if belongs_in_the_wheel(name)}
