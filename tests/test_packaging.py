"""What is installed is what the repository holds, and what is imported is declared."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "models", "stages", "eval", "recipes", "cli", "api", "benchmarks")
NOT_IMPORTED: dict[str, str] = {}
OPTIONAL = {"deepspeed", "lm-eval", "gradio", "fastapi", "uvicorn"}
"""Imported only where a user's launch has loaded it already, or where a command says that it needs an extra."""
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


def check_for_an_index(distribution: Path) -> None:
    """What a package index would refuse, by its own tool."""
    pytest.importorskip("twine", reason="the test environment is older than pyproject.toml")
    command = [sys.executable, "-m", "twine", "check", "--strict", str(distribution)]
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout + done.stderr


def copied(names: list[str], into: Path) -> Path:
    for name in names:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        (into / name).write_bytes((ROOT / name).read_bytes())
    return into


def unpacked_sdist(source: Path, tmp_path: Path) -> Path:
    sdist = build("sdist", source, tmp_path)
    check_for_an_index(sdist)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = (folder for folder in tmp_path.glob("preftune-*") if folder.is_dir())
    return folder


@pytest.mark.slow
def test_the_sdist_holds_the_repository_and_runs_its_own_tests(tmp_path: Path):
    names = repository_files()
    folder = unpacked_sdist(copied(names, tmp_path / "source"), tmp_path)
    held = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    made = {name for name in held if name in ("PKG-INFO", "setup.cfg") or name.startswith("preftune.egg-info/")}
    assert held - made == set(names) - {".gitignore"}
    # they import this preftune, not the installed one
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "preftune").symlink_to(folder)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "path")}
    code = "import preftune; print(preftune.__file__)"
    found = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True)
    assert Path(found.strip()).resolve() == folder / "__init__.py"
    some = ["tests/test_rooms.py", "tests/test_docs.py", "tests/recipes/test_load.py", "tests/data/test_quickstart.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *some]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.slow
@pytest.mark.parametrize("by_way_of", ["repository", "sdist"])
def test_the_wheel_holds_every_file_and_no_other(tmp_path: Path, by_way_of: str):
    names = repository_files()
    source = copied(names, tmp_path / "source")
    if by_way_of == "sdist":
        source = unpacked_sdist(source, tmp_path)
    wheel = build("wheel", source, tmp_path)
    check_for_an_index(wheel)
    with zipfile.ZipFile(wheel) as archive:
        packed = {name.removeprefix("preftune/") for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == {name for name in names if belongs_in_the_wheel(name)}


def of_setup(name: str) -> Any:
    """A function of setup.py, which builds nothing when it is only read."""
    spec = importlib.util.spec_from_file_location("preftune_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


README = """[docs](docs/scale.md), ![curve](./benchmarks/a.svg) and [site](https://example.org), [here](#use)

[![badge](docs/badge.svg)](CONTRIBUTING.md)

```sh
echo "[not](a/link.md)"
```
"""


def test_a_readme_away_from_the_repository_has_no_link_that_leads_nowhere():
    away = of_setup("for_index")
    known = away(README, "https://host.example/o/p")
    assert "[docs](https://host.example/o/p/blob/HEAD/docs/scale.md)" in known
    assert "![curve](https://host.example/o/p/raw/HEAD/benchmarks/a.svg)" in known
    assert "[![badge](https://host.example/o/p/raw/HEAD/docs/badge.svg)](https://host" in known
    unknown = away(README, None)
    assert unknown.startswith("docs,  and [site](https://example.org), [here](#use)")
    for text in (known, unknown, away((ROOT / "README.md").read_text(encoding="utf-8"), None)):
        outside = "".join(re.split(r"^```.*?^```$", text, flags=re.MULTILINE | re.DOTALL))
        assert not re.findall(
            r"\]\((?!https?:|mailto:|#)[^)]*\)|<(?:img|a)\b[^>]*(?:src|href)=\"(?!https?:|#)", outside
        )
    assert all('echo "[not](a/link.md)"' in text for text in (known, unknown))


@pytest.mark.parametrize(
    ("said", "page"),
    [
        ("https://host.example/o/p.git", "https://host.example/o/p"),
        ("https://me:secret@host.example/o/p", "https://host.example/o/p"),
        ("git@host.example:o/p.git", "https://host.example/o/p"),
        ("ssh://git@host.example:22/o/p/", "https://host.example/o/p"),
        ("/srv/git/p.git", None),
        ("../p", None),
        ("", None),
    ],
)
def test_the_repository_has_one_address_and_no_key_in_it(
    said: str, page: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("PREFTUNE_REPOSITORY", said)
    assert of_setup("repository")(tmp_path) == page
    links = of_setup("urls")(page)
    assert set(links) == ({"Homepage", "Repository", "Documentation", "Changelog", "Issues"} if page else set())
    # a wheel that is made from the sdist has the same
    (tmp_path / "PKG-INFO").write_text("".join(f"Project-URL: {name}, {link}\n" for name, link in links.items()))
    monkeypatch.delenv("PREFTUNE_REPOSITORY")
    assert of_setup("repository")(tmp_path) == page


def test_every_python_that_is_supported_is_named():
    named = [each.rpartition(" ")[2] for each in project()["classifiers"] if ":: Python :: 3." in each]
    assert named == ["3.11", "3.12", "3.13"] and project()["requires-python"] == f">={named[0]}"
