"""Rows of JSON text: an object a line, or an array of objects. Of either, only the row at hand is in memory."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from ..errors import UserError
from .rows import Placed, RawRow

# Takes what is wrong with one row: it raises, or the reader goes on behind that row.
Bad = Callable[[UserError], None]

MOST_CHARACTERS = 1 << 28
"""Of one row: what is longer is no row of a data set, but a file of another kind."""

_PIECE = 1 << 20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def read_lines(text: TextIO, shown: str, bad: Bad) -> Iterator[Placed]:
    """The rows of a file with one object a line."""
    for origin, line in lines_of(text, shown):
        try:
            row = row_of(line, origin)
        except UserError as error:
            bad(error)
            continue
        if row is not None:
            yield origin, row


def lines_of(text: TextIO, shown: str) -> Iterator[tuple[str, str]]:
    """The lines of such a file as they are, each with its place."""
    number = 0
    while line := text.readline(MOST_CHARACTERS):
        number += 1
        if len(line) == MOST_CHARACTERS and not line.endswith("\n"):
            said = f"a line of more than {MOST_CHARACTERS} characters, expected one JSON object a line"
            raise UserError(f"{shown}:{number}", said, "write a line break after each row")
        yield f"{shown}:{number}", line


def row_of(line: str, origin: str) -> RawRow | None:
    """The object that a line holds; None for an empty one.

    Raises:
        UserError: it holds none.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        if not line.strip():
            return None
        if isinstance(error, json.JSONDecodeError):
            problem = f"broken JSON ({error.msg} at column {error.colno})"
            raise UserError(origin, problem, "put one whole JSON object on each line") from error
        # a number of thousands of digits
        raise UserError(origin, f"cannot be read ({error})", "correct the row") from error
    except RecursionError as error:  # brackets within brackets
        raise UserError(origin, f"cannot be read ({error})", "correct the row") from error
    if (problem := _problem(row, origin, line)) is not None:
        raise problem
    return row


def read_json(text: TextIO, shown: str, bad: Bad) -> Iterator[Placed]:
    """The rows of an array of objects, or of {"data": [...]}; a file with one object a line is accepted as well.

    Args:
        text: can be wound back to its beginning.
    """
    window = _Window(text, shown)
    if window.next() != "[":
        content, _ = window.value()
        if window.next() == "{" and isinstance(content, dict):
            text.seek(0)
            yield from read_lines(text, shown, bad)
            return
        window.check_end()
        rows = content.get("data") if isinstance(content, dict) else content
        rows = [content] if isinstance(content, dict) and not isinstance(rows, list) else rows
        if not isinstance(rows, list):
            raise UserError(shown, f"holds a {type(rows).__name__}, expected an array of objects", "correct the file")
        elements: Iterator[tuple[Any, str]] = ((row, json.dumps(row)) for row in rows)
    else:
        elements = _elements(window)
    for number, (row, written) in enumerate(elements, start=1):
        origin = f"{shown}: row {number}"
        if (problem := _problem(row, origin, written)) is not None:
            bad(problem)
            continue
        yield origin, row


def _elements(window: "_Window") -> Iterator[tuple[Any, str]]:
    """The elements of the array that begins here, each with its text."""
    window.skip("[")
    if window.next() == "]":
        window.skip("]")
    else:
        while True:
            yield window.value()
            if window.next() != ",":
                break
            window.skip(",")
        window.skip("]")
    window.check_end()


class _Window:
    """The part of a JSON text that is being decoded; what was decoded is let go."""

    def __init__(self, text: TextIO, shown: str):
        self.text, self.shown = text, shown
        self.held, self.at, self.ended = "", 0, False
        self.line, self.column = 1, 0  # of the first character held

    def next(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self.at = _SPACE.match(self.held, self.at).end()  # type: ignore[union-attr]  # matches nothing, too
            if self.at < len(self.held) or self.ended:
                return self.held[self.at : self.at + 1]
            self._read()

    def skip(self, expected: str) -> None:
        """Passes one character, which must be this one."""
        if self.next() != expected:
            missing = "Expecting ',' delimiter" if expected == "]" else f"Expecting {expected!r}"
            raise self._broken(json.JSONDecodeError(missing, self.held, self.at))
        self.at += 1

    def check_end(self) -> None:
        """Refuses what comes after the last value."""
        if self.next():
            raise self._broken(json.JSONDecodeError("Extra data", self.held, self.at))

    def value(self) -> tuple[Any, str]:
        """The next value, and its text."""
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.held, self.at)
            except json.JSONDecodeError as error:
                if self.ended:
                    raise self._broken(error) from error
            except (ValueError, RecursionError) as error:  # thousands of digits; brackets within brackets
                raise UserError(self.shown, f"cannot be read ({error})", "correct the file") from error
            else:
                if end < len(self.held) or self.ended:  # else a number may go on
                    text, self.at = self.held[self.at : end], end
                    return value, text
            self._read()

    def _read(self) -> None:
        """Lets go of what is behind, and reads as much again as is left."""
        left = len(self.held) - self.at
        if left > MOST_CHARACTERS:
            said = f"one value of more than {MOST_CHARACTERS} characters, expected an array of objects"
            raise UserError(f"{self.shown}:{self.line}", said, "write one object a row")
        behind = self.held[: self.at]
        self.column = self.at - behind.rfind("\n") - 1 if "\n" in behind else self.column + self.at
        self.line += behind.count("\n")
        read = self.text.read(max(_PIECE, left))
        self.held, self.at, self.ended = self.held[self.at :] + read, 0, not read

    def _broken(self, error: json.JSONDecodeError) -> UserError:
        place = f"{self.shown}:{self.line + error.lineno - 1}"
        column = error.colno + (self.column if error.lineno == 1 else 0)
        return UserError(place, f"broken JSON ({error.msg} at column {column})", "correct the file")


def _problem(row: object, origin: str, written: str) -> UserError | None:
    """What is wrong with a row, which must be an object.

    Args:
        written: its JSON, in which escapes of half characters (surrogates) must come in pairs.
    """
    if not isinstance(row, dict):
        said = f"a {type(row).__name__}, expected an object with named fields"
        return UserError(origin, said, "correct the row")
    if "\\u" in written and _SURROGATE.search(written):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = str(error.object)[error.start]
            problem = f"half a character (the lone surrogate \\u{ord(half):04x}), which no tokenizer can read"
            return UserError(origin, problem, "write the whole character, or leave it out")
    return None
