"""What happened to the rows: each one that is dropped or cut is counted."""

from dataclasses import dataclass, field
from typing import Any

_SHOWN = 3


@dataclass
class Tally:
    """How many rows, and where the first few of them come from."""

    count: int = 0
    origins: list[str] = field(default_factory=list)

    def add(self, origin: str) -> None:
        self.count += 1
        if len(self.origins) < _SHOWN:
            self.origins.append(origin)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.origins) else ""
        return f"{self.count} ({', '.join(self.origins)}{more})" if self.origins else str(self.count)


@dataclass
class DataReport:
    """Counts of one pass over the data (reading, or encoding).

    Attributes:
        read: rows that came in.
        used: rows that went out.
        dropped: rows that did not, by reason.
        notes: rows that are used although something is worth noting (truncated, boundary moved, ...).
        sources: rows taken from each source.
        origins: where each row that went out comes from, in order; of an encoding.
    """

    read: int = 0
    used: int = 0
    dropped: dict[str, Tally] = field(default_factory=dict)
    notes: dict[str, Tally] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    origins: list[str] = field(default_factory=list)

    def drop(self, reason: str, origin: str) -> None:
        self.dropped.setdefault(reason, Tally()).add(origin)

    def note(self, what: str, origin: str) -> None:
        self.notes.setdefault(what, Tally()).add(origin)

    def count(self, what: str) -> int:
        """Rows dropped for, or noted with, `what`."""
        return sum(t.count for group in (self.dropped, self.notes) for name, t in group.items() if name == what)

    @property
    def dropped_rows(self) -> int:
        return sum(tally.count for tally in self.dropped.values())

    def lines(self) -> list[str]:
        """For people: one line with the totals, then one per reason."""
        lines = [f"{self.used} rows used of {self.read} read"]
        if len(self.sources) > 1:
            lines += [f"from {path}: {count}" for path, count in self.sources.items()]
        lines += [f"dropped, {reason}: {tally}" for reason, tally in self.dropped.items()]
        lines += [f"{what}: {tally}" for what, tally in self.notes.items()]
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json and --json: plain numbers."""
        return {
            "read": self.read,
            "used": self.used,
            "dropped": {reason: tally.count for reason, tally in self.dropped.items()},
            "notes": {what: tally.count for what, tally in self.notes.items()},
            "sources": dict(self.sources),
        }
