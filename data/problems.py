"""Rows with something wrong: what becomes of each, by its kind, and what is said about them in the end."""

from collections import Counter
from typing import NamedTuple

from ..errors import MOST, Summary, UserError, raise_found
from .report import DataReport
from .spec import Answer, OnProblem

WORDS = {
    "malformed": "malformed (cannot be read as a row)",
    "template": "refused by the chat template",
    "unusable": "of no use (empty, the same on both sides, a tie)",
    "repeated": "with a prompt seen before",
    "overflow": "too long",
}
"""The kinds of problems, in words."""

_REMEDIES = {
    "malformed": "on_problem: {malformed: drop}",
    "template": "on_problem: {template: drop}",
    "unusable": "on_problem: {unusable: drop}",
    "repeated": "on_problem: {repeated: drop}",
    "overflow": "overflow: drop",
}


class Problem(NamedTuple):
    """Why a row is not used.

    kind: one of `WORDS`, or `LIMIT`. reason: under which it is counted where it is dropped; None: the kind in words.
    """

    kind: str
    error: UserError
    reason: str | None = None


LIMIT = "limit"
"""The kind of a row that is dropped for its length, as `overflow` says."""


class RowProblems:
    """The problems of one pass over the rows of a data entry.

    What the entry's policy says is dropped goes into the report; what it says is an error is kept, the first of them in
    full and all of them by number, until `raise_found`: one bad row never hides the next.

    Args:
        where: the entry, for the line that counts them.
    """

    def __init__(self, policy: OnProblem, report: DataReport, where: str) -> None:
        self.policy, self.report, self.where = policy, report, where
        self.counts: Counter[str] = Counter()
        self._first: list[UserError] = []

    def answer(self, kind: str) -> Answer:
        """What becomes of rows with a problem of this kind."""
        return getattr(self.policy, kind, "error")

    def met(self, kind: str, error: UserError, reason: str | None = None) -> None:
        """A row that is not used.

        Args:
            reason: under which it is counted where it is dropped; by default the kind in words.
        """
        if self.answer(kind) == "drop":
            self.report.drop(reason or WORDS[kind], error.where)
            return
        self.counts[kind] += 1
        if len(self._first) < MOST:
            self._first.append(error)

    def raise_found(self) -> None:
        """Raise what was found: one error as it is, several below a line that counts them.

        Raises:
            UserError: a row has a problem that is an error.
        """
        total = sum(self.counts.values())
        if total <= 1:
            raise_found(self._first)
            return
        kinds = ", ".join(f"{count} {WORDS[kind]}" for kind, count in self.counts.items())
        drops = ", ".join(_REMEDIES[kind] for kind in self.counts)
        said = f"{total} of {self.report.read} rows have a problem: {kinds}"
        remedy = f"correct them, or leave them out and have them counted with {drops}"
        raise_found([Summary(self.where, said, remedy, total - len(self._first), self._first), *self._first])
