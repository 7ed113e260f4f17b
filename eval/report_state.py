"""What a report was written for: a run that changed since has another one. Imports nothing heavy."""

import hashlib
import re
from pathlib import Path

from ..errors import UserError
from ..files import DOCTOR, EVALUATION, OVER_OPTIMISATION, RECIPE, REPORT, RESULTS, REWARDS, RUN_STATE, SAMPLES

_READ = (
    *(RUN_STATE, RECIPE, DOCTOR),
    *(f"{EVALUATION}/{name}" for name in (RESULTS, SAMPLES, REWARDS, OVER_OPTIMISATION)),
)
_MARK = re.compile(rb'<meta name="preftune-made-for" content="([0-9a-f]{64})">')
_HEAD = 4096
"""Bytes in which a report of ours says that it is one."""


def state_of(run_dir: Path) -> str:
    """Hash of what a report of the run is made from: its stages by run.json, its recipe, evaluation and findings."""
    digest = hashlib.sha256()
    for name in _READ:
        file = run_dir / name
        digest.update(f"{name} {file.stat().st_size if file.is_file() else -1}\n".encode())
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


def report_is_old(run_dir: Path) -> bool:
    """Whether the run has no report, or one that was written before what lies there now."""
    found = _MARK.search(_head(run_dir / REPORT))
    return found is None or found[1].decode() != state_of(run_dir)


def check_replaceable(report: Path) -> None:
    """Raises UserError where a page that we did not write stands in a report's place."""
    if report.is_file() and b"preftune report" not in _head(report):
        raise UserError(str(report), "is no report of preftune's, and would be overwritten", "move it away")


def _head(file: Path) -> bytes:
    if not file.is_file():
        return b""
    with file.open("rb") as opened:
        return opened.read(_HEAD)
