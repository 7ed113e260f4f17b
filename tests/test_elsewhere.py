"""A wheel of this tree, installed by itself, works from a folder with no checkout near."""

import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from .test_packaging import build, copied, repository_files

pytestmark = pytest.mark.slow


class Installed:
    """An environment that holds the wheel, and of the test's own environment the libraries alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.python = folder, folder / "venv" / "bin" / "python"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        apart = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        kept = {name: value for name, value in os.environ.items() if name not in apart}
        self.environment = {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def run(self, *command: str | Path) -> str:
        """What it prints; it must end well."""
        done = subprocess.run(
            [str(each) for each in command],
            cwd=self.elsewhere, env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
        return done.stdout

    def preftune(self, *words: str | Path) -> str:
        return self.run(self.python.parent / "preftune", *words)

    def seconds(self, *command: str | Path) -> float:
        """Of the processor, the best of five: what else the machine does is not its fault."""
        found = []
        for _ in range(5):
            before = os.times()
            self.run(*command)
            after = os.times()
            found.append(after.children_user + after.children_system - before.children_user - before.children_system)
        return min(found)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    there = Installed(folder)
    wheel = build("wheel", copied(repository_files(), folder / "source"), folder)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    # A folder in a .pth file is searched, and the .pth files in it are not obeyed: no editable install of this tree.
    (own,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (own / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--quiet", "--python", there.python, "install", "--no-deps", "--no-index"]
    subprocess.run([*command, wheel], check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    return there


def test_it_is_the_wheel_that_runs(installed: Installed) -> None:
    found = Path(installed.run(installed.python, "-c", "import preftune; print(preftune.__file__)").strip())
    assert found.is_relative_to(installed.folder / "venv")


def test_a_chain_is_checked_run_and_handed_on(installed: Installed) -> None:
    folder = installed.elsewhere
    rows = [{"prompt": f"What is {place}?", "completion": "A number."} for place in range(20)]
    (folder / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    installed.preftune("init", "demos.jsonl", "--base", "random:llama", "--output", "mine.yaml")
    assert "demos" in installed.preftune("validate", "mine.yaml")
    installed.preftune("run", "smoke", "eval.max_new_tokens=4")
    said = installed.preftune("status", "runs/smoke")
    assert all(name in said for name in ("sft", "reward", "dpo", "ppo"))
    assert (folder / "runs/smoke/report.html").stat().st_size > 10_000
    installed.preftune("merge", "runs/smoke/dpo", "merged")
    installed.preftune("export", "runs/smoke", "--to", "verl", "--output-dir", "verl")
    assert (folder / "merged/model.safetensors").is_file() and any((folder / "verl").iterdir())
    assert json.loads(installed.preftune("schema"))["title"]


def test_it_starts_quickly(installed: Installed) -> None:
    began = time.perf_counter()
    installed.run(installed.python, "-c", "import preftune")
    installed.preftune("--help")
    assert time.perf_counter() - began < 10, "something waits"
    nothing = installed.seconds(installed.python, "-c", "pass")
    assert installed.seconds(installed.python, "-c", "import preftune") - nothing < 0.2
    assert installed.seconds(installed.python.parent / "preftune", "--help") < 0.5
