"""Progress on standard error: a bar in a terminal, plain lines elsewhere, silence for what is quick.

Imports `rich` only once there is something to show.
"""

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from . import stopping
from .printed import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

QUIET_SECONDS, LINE_SECONDS = 2.0, 20.0
"""Nothing is shown before the first; where there is no terminal, a line at most so often as the second."""


class Meter:
    """Counts the steps of one piece of work; call it with the number done so far.

    Args:
        label: what is being done.
        total: how many steps there are; None: nobody knows.
        quiet: seconds in which nothing is shown. lines: seconds between two lines where there is no terminal.
        bars: False: lines in a terminal too.
        stoppable: the work can be left off at every step, if a signal asks for it (see `stopping`).
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        *,
        quiet: float = QUIET_SECONDS,
        lines: float = LINE_SECONDS,
        bars: bool = True,
        stoppable: bool = True,
    ) -> None:
        self._stoppable = stoppable
        self._label, self._total, self._quiet, self._lines = label, total, quiet, lines
        self._bar: tuple[Progress, TaskID] | None = None
        self._asked = not bars
        self._started = self._spoken = time.monotonic()
        self._said = -1

    def __call__(self, done: int, note: str = "") -> None:
        """`done` steps are done; the note stands behind their number.

        Raises:
            Stopped: a signal asked for it.
        """
        if self._stoppable:
            stopping.poll()
        now = time.monotonic()
        if now - self._started < self._quiet or _Silent.now:
            return
        if not self._asked:
            self._asked, self._bar = True, _open_bar(self._label, self._total)
        if self._bar is not None:
            # a bar is drawn ten times a second: more often it would cost more than quick steps do
            if now - self._spoken > 0.1 or done == self._total:
                self._spoken = now
                progress, task = self._bar
                progress.update(task, completed=done, note=printable(note), refresh=True)
        elif done == self._total or now - self._spoken > self._lines:
            self.say(done, note)

    def say(self, done: int, note: str = "") -> None:
        """Where there is no bar: a line now, unless it was the last one."""
        if self._bar is None and done != self._said:
            self._spoken, self._said = time.monotonic(), done
            of = "" if self._total is None else f"/{self._total}"
            say(f"{self._label}: {done}{of} {note}".rstrip())

    def close(self) -> None:
        """Take the bar away, where there is one."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None


class _Silent:
    """Whether this process says nothing."""

    now: bool = False


def silence(on: bool) -> None:
    """From here on say nothing, or speak again: of several processes that do one piece of work one speaks for all."""
    _Silent.now = on


@contextmanager
def silent(on: bool) -> Generator[None]:
    """Within it nothing is said; with `on` False as before."""
    before = _Silent.now
    _Silent.now = before or on
    try:
        yield
    finally:
        _Silent.now = before


def say(line: str) -> None:
    """One line for the log, on standard error."""
    if not _Silent.now:
        print(printable(line), file=sys.stderr, flush=True)


@contextmanager
def meter(label: str, total: int | None) -> Generator[Meter]:
    """`with meter("sft: samples", 300) as done: ... done(32)`; nothing is shown in the first two seconds."""
    made = Meter(label, total)
    try:
        yield made
    finally:
        made.close()


def _open_bar(label: str, total: int | None) -> "tuple[Progress, TaskID] | None":
    """A bar that disappears when it is stopped; None where standard error is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    # texts of the data's and the recipe's: no markup
    label_, note = (TextColumn(field, markup=False) for field in ("{task.description}", "{task.fields[note]}"))
    counted = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
    # drawn when it moves: a thread of its own would take turns with the work at Python's lock
    bar = Progress(label_, *counted, console=console, transient=True, auto_refresh=False)
    bar.start()
    return bar, bar.add_task(printable(label), total=total, note="")
