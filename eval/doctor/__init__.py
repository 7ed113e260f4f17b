"""`preftune doctor`: which stage of a run is bad, and why.

The checks (`*_checks.py`) are pure functions from numbers to a `Finding`, their thresholds named constants beside them;
what measures the numbers lies in `measure_*.py` and `records.py`; `examine.py` puts both together.
"""

from .examine import Checkup, Examination, examine, write_examination
from .finding import Finding, first_broken

__all__ = ["Checkup", "Examination", "Finding", "examine", "first_broken", "write_examination"]
