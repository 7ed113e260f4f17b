"""The one exception for what the user can put right, and the words that messages share."""

import os
import traceback
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from .stopping import Stopped

_OURS, _STANDARD = Path(__file__).parent, Path(os.__file__).parent
_ROOMS = ("data", "models", "stages", "eval", "recipes", "cli", "api")

MOST = 20
"""So many mistakes are said at once; of more, how many there are."""


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


class Lost(UserError):
    """What the work needs went away, a server say, and did not come back in time: what is done so far is kept."""


class Summary(UserError):
    """How many mistakes there are of each kind, said above those that are said one by one.

    Args:
        unsaid: so many of them are not among those that follow.
        of: those that follow.
    """

    def __init__(self, where: str, problem: str, remedy: str, unsaid: int = 0, of: Iterable[UserError] = ()) -> None:
        self.unsaid, self.of = unsaid, tuple(of)
        super().__init__(where, problem, remedy)

    def as_one(self) -> UserError:
        """The first of those that it counts, and how many there are."""
        if not self.of:
            return self
        first = self.of[0]
        return UserError(first.where, first.problem, f"{first.remedy} ({self.problem}; `preftune validate` lists them)")


class UserErrors(UserError):
    """Several mistakes, found together: a line each.

    Args:
        errors: two or more, in the order in which they are said.
    """

    def __init__(self, errors: Iterable[UserError]) -> None:
        self.errors = tuple(errors)
        first = self.errors[0]
        super().__init__(first.where, first.problem, first.remedy)
        single = [each for each in self.errors if not isinstance(each, Summary)]
        said = {id(each) for each in single[:MOST]}
        shown = [each for each in self.errors if isinstance(each, Summary) or id(each) in said]
        more = len(single) - len(said) + sum(each.unsaid for each in self.errors if isinstance(each, Summary))
        lines = [" ".join(str(each).split()) for each in shown]
        self.args = ("\n".join([*lines, *([f"... and {more} more"] if more > 0 else [])]),)


@contextmanager
def in_brief() -> Generator[None]:
    """Within it several mistakes that a `Summary` counts are raised as one: the first of them, with their number.

    Raises:
        UserError: as many as there are besides.
    """
    try:
        yield
    except UserErrors as several:
        counted = {id(each) for error in several.errors if isinstance(error, Summary) for each in error.of}
        found = [error.as_one() if isinstance(error, Summary) else error for error in several.errors]
        raise_found(new for old, new in zip(several.errors, found, strict=True) if id(old) not in counted)


@contextmanager
def gathering(found: list[UserError]) -> Generator[None]:
    """What is wrong within it is added to `found`, and the work goes on behind it."""
    try:
        yield
    except UserErrors as several:
        found += several.errors
    except UserError as error:
        found.append(error)


def raise_found(found: Iterable[UserError]) -> None:
    """Raise what was found: one mistake as it is, several together; each is said once.

    Raises:
        UserError: something was.
    """
    each = list({str(error): error for error in found}.values())
    if each:
        raise each[0] if len(each) == 1 else UserErrors(each)


@contextmanager
def user_code(where: str, what: str, remedy: str) -> Generator[None]:
    """Within it runs code of the user's: what it raises is said with the last line of theirs that it came from.

    Args:
        where: the place that names the code. what: what came of it. remedy: as in `UserError`.

    Raises:
        UserError: it raised anything but an interruption, `SystemExit` included.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, GeneratorExit, Stopped):
        raise
    except BaseException as error:
        said = " ".join(str(error).split())
        named = f"{type(error).__name__}: {said}" if said else type(error).__name__
        raise UserError(where, f"{what}: {_last_frame(error)}{named}", remedy) from error


def _last_frame(error: BaseException) -> str:
    """ "FILE:LINE in FUNCTION: " of the user's last frame; empty where none is theirs."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: "
    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        ours = path.parent == _OURS or (path.is_relative_to(_OURS) and path.relative_to(_OURS).parts[0] in _ROOMS)
        library = {"site-packages", "dist-packages"} & set(path.parts) or path.is_relative_to(_STANDARD)
        if not (ours or library or frame.filename.startswith("<")):
            found = f"{frame.filename}:{frame.lineno} in {frame.name}: "
    return found


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
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
