"""The Dockerfile says what pyproject.toml says. (Docker itself is not asked: CI's machines need not have one.)"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .test_packaging import project

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
JOINED = re.sub(r"\\\n\s*", " ", TEXT)
LINES = [line for line in JOINED.splitlines() if line and not line.startswith("#")]


def test_the_linter_has_nothing_to_say() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint has no wheel for this machine")
    done = subprocess.run([linter, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_its_python_is_one_that_is_supported_and_tested() -> None:
    (version,) = re.findall(r"^ARG PYTHON_VERSION=(\S+)$", TEXT, re.MULTILINE)
    assert f"Programming Language :: Python :: {version}" in project()["classifiers"]
    assert project()["requires-python"] == f">={version}", "the oldest is what the tests run with"


def test_what_it_copies_is_here_and_not_left_out() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    copied = [name for line in LINES if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert copied == [".", "pyproject.toml", "constraints.txt"]
    assert not [name for name in copied if not (ROOT / name).exists() or name in ignored]
    # what setup.py packs must reach the image
    assert not [room for room in ("data", "models", "recipes", "README.md", "LICENSE", "setup.py") if room in ignored]


def test_both_targets_end_alike_and_not_as_root() -> None:
    stages = re.split(r"^FROM ", "\n".join(LINES), flags=re.MULTILINE)[1:]
    made = {stage.splitlines()[0].split(" AS ")[1]: stage.splitlines()[1:] for stage in stages}
    assert list(made)[-2:] == ["cpu", "cuda"]
    for name in ("cpu", "cuda"):
        assert made[name][-4:] == ["USER 1000", "WORKDIR /work", 'ENTRYPOINT ["preftune"]', 'CMD ["--help"]']
    assert list(project()["scripts"]) == ["preftune"]
    # all but torch's own line
    assert [line for line in made["cpu"] if "torch" not in line.lower()] == [
        line for line in made["cuda"] if "torch" not in line.lower()
    ]


def test_the_line_that_lists_what_is_needed_does_so(tmp_path: Path) -> None:
    (line,) = [line.removeprefix("RUN ") for line in LINES if "tomllib" in line]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    line = line.replace("python -c", f"{sys.executable} -c", 1)
    extra = "quantization"
    done = subprocess.run(
        ["sh", "-c", line], cwd=tmp_path, env={"EXTRAS": extra}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "needs.txt").read_text().splitlines()
    assert said == [*project()["dependencies"], *project()["optional-dependencies"][extra]]
