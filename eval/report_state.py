"""What a report was written for: a run that changed since has another one. Imports nothing heavy."""

import hashlib
import re
from pathlib import Path

from ..errors import UserError
from ..files import (
    BENCHMARKS,
    DOCTOR,
    EVALUATION,
    OVER_OPTIMISATION,
    RECIPE,
    REPORT,
    RESULTS,
    REWARDS,
    RUN_STATE,
    SAMPLES,
)

_READ = (
    *(RUN_STATE, RECIPE, DOCTOR),
    *(f"{EVALUATION}/{name}" for name in (RESULTS, SAMPLES, REWARDS, OVER_OPTIMISATION, BENCHMARKS)),
)
_MARK = re.compile(rb"</html>\s*<!-- preftune-made-for ([0-9a-f]{64}) -->\s*$")
_BYTES = 4096
"""At its beginning a report says that it is one, at its end what it was written for."""


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
    found = _MARK.search(_part(run_dir / REPORT, end=True))
    return found is None or found[1].decode() != state_of(run_dir)


def check_replaceable(report: Path) -> None:
    """Raises UserError where a page that we did not write stands in a report's place."""
    if report.is_file() and b"preftune report" not in _part(report):
        raise UserError(str(report), "is no report of preftune's, and would be overwritten", "move it away")


def _part(file: Path, *, end: bool = False) -> bytes:
    """The first or the last bytes of a file; none where there is none."""
    if not file.is_file():
        return b""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - _BYTES) if end else 0)
        return opened.read(_BYTES)
