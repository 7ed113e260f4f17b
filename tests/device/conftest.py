"""The shadow device as a fixture: built once, every program on it a process of its own."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .building import built, why_not

REHEARSE = Path(__file__).with_name("rehearse.py")


@dataclass(frozen=True)
class Done:
    """A program's end: its exit code, what it printed, and what it did on the device (see `rehearse.report`)."""

    code: int
    out: str
    err: str
    report: dict[str, Any]


class Device:
    """Runs programs on a GPU made of CPU memory. See README.md of this folder."""

    def __init__(self, library: Path, folder: Path) -> None:
        self.library, self.folder = library, folder

    def run(self, *arguments: str, **environment: str) -> Done:
        """A preftune command, or a script, as `rehearse.py` says.

        Args:
            environment: variables beside this process' own, for example SHADOW_N="2".
        """
        report = self.folder / "report.json"
        report.unlink(missing_ok=True)
        settings = {"OMP_NUM_THREADS": "1", "SHADOW_LIBRARY": str(self.library), "SHADOW_REPORT": str(report)}
        done = subprocess.run(
            [sys.executable, str(REHEARSE), *arguments],
            env={**os.environ, **settings, **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        return Done(
            done.returncode,
            done.stdout,
            done.stderr,
            json.loads(report.read_text()) if report.exists() else {},
        )

    def call(self, function: Callable[..., Any], environment: dict[str, str] | None = None, **arguments: Any) -> Any:
        """What a function of a test's file returns when it is called on the device.

        Its file is loaded there by its path, so it imports nothing relatively; arguments and result are JSON.
        """
        place = f"{inspect.getsourcefile(function)}::{function.__name__}"
        done = self.run(place, json.dumps(arguments), **(environment or {}))
        assert done.code == 0, done.err
        return done.report["returned"]


@pytest.fixture(scope="session")
def _library() -> Path:
    if reason := why_not():
        if os.environ.get("PREFTUNE_SHADOW") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    return built()


@pytest.fixture
def device(_library: Path, tmp_path: Path) -> Device:
    """A GPU made of CPU memory; the test is skipped where it cannot be built."""
    return Device(_library, tmp_path)
