"""What a check says."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["OK", "look", "broken"]


@dataclass(frozen=True)
class Finding:
    """One check of one stage.

    Attributes:
        level: OK; look: unusual, and worth a person's eye; broken: what comes of this stage cannot be trusted.
        measured: the number; NaN where there was nothing to measure and that is the finding.
        unit: what the number counts.
        threshold: when it would be worse, in words.
        remedy: what to do; empty where the level is OK.
        low, high: 95% confidence interval of the number, where it is a rate or a mean over samples.
        adapter: hash of the stage's adapter that was looked at; None where there was none yet.
    """

    stage: str
    check: str
    level: Level
    measured: float
    unit: str
    threshold: str
    remedy: str = ""
    low: float | None = None
    high: float | None = None
    adapter: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is not finite is None."""
        return {key: _finite(value) for key, value in asdict(self).items()}

    def number(self) -> str:
        """The measured number with its interval and unit, for people."""
        if math.isnan(self.measured):
            return self.unit
        interval = (
            "" if self.low is None or self.high is None else f" ({round(self.low, 6):.3g} to {round(self.high, 6):.3g})"
        )
        return f"{self.measured:.4g}{interval} {self.unit}"


def judge(
    stage: str,
    check: str,
    measured: float,
    *,
    unit: str,
    threshold: str,
    remedy: str,
    broken: bool = False,
    look: bool = False,
    interval: tuple[float, float] | None = None,
) -> Finding:
    """A finding of the worse of the levels that hold; what is NaN in an interval is no interval."""
    level: Level = "broken" if broken else "look" if look else "OK"
    low, high = interval if interval is not None and not math.isnan(sum(interval)) else (None, None)
    return Finding(stage, check, level, float(measured), unit, threshold, "" if level == "OK" else remedy, low, high)


def first_broken(findings: Sequence[Finding]) -> Finding | None:
    """The first broken finding; in running order the stages after it inherit what is wrong with it."""
    return next((each for each in findings if each.level == "broken"), None)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
