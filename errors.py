"""The one exception for what the user can put right, and the words that messages share."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in the user's input, said in one line.

    Args:
        where: the place: a file with its line, a recipe key, a command-line option.
        problem: the value that was found and what was expected instead.
        remedy: what to do about it.

    The command line prints `where: problem; remedy` and ends with exit code 2.
    """

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        self.where, self.problem, self.remedy = where, problem, remedy
        super().__init__(f"{where}: {problem}; {remedy}")


def closest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known word that is most like this one; None where none is like it.

    Args:
        cutoff: how alike they must be, from 0 to 1 (`difflib.SequenceMatcher.ratio`).
    """
    found = get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def nearest(word: str, known: Iterable[str], *, most: int | None = None) -> str:
    """The remedy for an unknown word: the known one that it is most like, or else all of them.

    Args:
        most: of a long list, at most so many are named.
    """
    names = list(known)
    if (found := closest(word, names)) is not None:
        return f"did you mean {found!r}?"
    more = ", ..." if most is not None and len(names) > most else ""
    return f"use one of {', '.join(names[:most])}{more}"
