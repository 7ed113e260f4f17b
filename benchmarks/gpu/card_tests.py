"""The tests that need a real card (`tests/gpu`), by pytest in a process of its own."""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..measure import Measured

ROOT = Path(__file__).parents[2]


def measure(options: dict[str, Any]) -> Iterator[tuple[str, Measured]]:
    """Of each file: which of its tests passed, failed and were skipped, with the reasons."""
    # the libraries of a card's machine may warn of what those that we test with do not
    command = [sys.executable, "-m", "pytest", "-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as folder:
        for name in options["names"]:
            report, file = Path(folder) / f"{name}.xml", ROOT / "tests" / "gpu" / f"test_{name}.py"
            words = [f"--junit-xml={report}", "--import-mode=importlib", str(file)]
            done = subprocess.run([*command, *words], cwd=ROOT, stdout=sys.stderr, check=False)
            if not report.is_file():
                raise RuntimeError(f"pytest ended with exit code {done.returncode} and no report of {file}")
            yield name, outcome(report.read_text(encoding="utf-8"))


def outcome(xml: str) -> Measured:
    """What a report in JUnit's format says."""
    found: Measured = {"passed": [], "failed": {}, "skipped": {}, "seconds": {}}
    for case in ET.fromstring(xml).iter("testcase"):
        name = case.attrib["name"]
        found["seconds"][name] = float(case.attrib.get("time", 0))
        bad = [each for kind in ("failure", "error") for each in case.iter(kind)]
        skipped = list(case.iter("skipped"))
        if bad:
            found["failed"][name] = (bad[0].attrib.get("message") or bad[0].text or "")[:500]
        elif skipped:
            found["skipped"][name] = skipped[0].attrib.get("message", "")[:200]
        else:
            found["passed"].append(name)
    return found
