"""A server is asked by one process for all, however many of them draw replies.

So it hears of each reply once, and of as many at a time as `concurrency` says; what a failure means is decided for all
replies together, as in one process; and an error is every process' error, so that none waits for another.
"""

from ..processes import Processes
from .replies import Replies, TextScorer

SERVERS = ("http", "endpoint")
"""The kinds of sources that are."""


class AskedOnce:
    """A source that the first process asks about the replies of all. All of them call it, those without replies too."""

    def __init__(self, scorer: TextScorer, these: Processes) -> None:
        self.scorer, self.these = scorer, these

    def __call__(self, replies: Replies) -> list[float]:
        """The scores of this process' replies.

        Raises:
            UserError: in every process, where the source failed in the first.
        """
        these = self.these
        parts = these.gathered([replies])
        scores = these.by_first(lambda: self.scorer(Replies.joined(parts)))
        first = sum(len(part) for part in parts[: these.rank])
        return scores[first : first + len(replies)]
