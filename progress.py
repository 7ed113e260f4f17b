"""Progress on standard error: a bar in a terminal, plain lines elsewhere, silence for what is quick.

Lines that a command writes to a file or a pipe begin with the time (`stamp`). Imports `rich` only once there is
something to show.
"""

import math
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, TextIO

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
        begun: so many steps were done before, by an earlier process say: the time left goes by the others.
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
        begun: int = 0,
    ) -> None:
        self._stoppable = stoppable
        self._label, self._total, self._quiet, self._lines = label, total, quiet, lines
        self._bar: tuple[Progress, TaskID] | None = None
        self._asked, self._begun = not bars, begun
        self._started = self._spoken = time.monotonic()
        self._said = -1

    def __call__(self, done: int, note: str = "", values: Sequence[float] = ()) -> None:
        """`done` steps are done; the note stands behind their number.

        Args:
            values: what was measured so far; a bar has their curve behind the note.

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
                whole = self._whole_run(self._seconds_left(done))
                curve = sparkline(values) if progress.console.encoding.startswith("utf") else ""
                shown = printable(", ".join(filter(None, [" ".join(filter(None, [note, curve])), whole])))
                progress.update(task, completed=done, note=shown, refresh=True)
        elif done == self._total or now - self._spoken > self._lines:
            self.say(done, note)

    def say(self, done: int, note: str = "") -> None:
        """Where there is no bar: a line now, unless it was the last one."""
        if self._bar is None and done != self._said:
            self._spoken, self._said = time.monotonic(), done
            of = "" if self._total is None else f"/{self._total}"
            left = self._seconds_left(done)
            soon = "" if left is None else f"about {duration(left)} left"
            said = f"{self._label}: {done}{of} {note}".rstrip()
            say(", ".join(filter(None, [said, soon, self._whole_run(left)])))

    def _seconds_left(self, done: int) -> float | None:
        """If each step takes as long as those so far; None where that cannot be said, or nothing is left."""
        if self._total is None or not self._begun < done < self._total:
            return None
        return (self._total - done) * (time.monotonic() - self._started) / (done - self._begun)

    @staticmethod
    def _whole_run(left: float | None) -> str:
        ahead = _Told.ahead
        return "" if ahead is None or left is None else f"the whole run {duration(left + ahead)}"

    def close(self) -> None:
        """Take the bar away, where there is one."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """A curve of at most so many characters from the lowest block to a full one; "" while there are under three points.

    Each character is the mean of as many neighbours as the others; what is not finite is left out.
    """
    points = [value for value in values if math.isfinite(value)]
    count = min(width, len(points))
    if count < 3:
        return ""
    ends = [place * len(points) // count for place in range(count + 1)]
    means = [sum(points[a:b]) / (b - a) for a, b in pairwise(ends)]
    low, spread = min(means), max(means) - min(means)
    return "".join(_BLOCKS[round((mean - low) / spread * (len(_BLOCKS) - 1)) if spread else 0] for mean in means)


_BLOCKS = "▁▂▃▄▅▆▇█"


class _Silent:
    """Whether this process says nothing."""

    now: bool = False


class _Told:
    """What this process was told of its lines: whether those that go to no terminal begin with the time, and how many
    seconds the run will take behind the work at hand (None: nobody knows)."""

    stamps: bool = False
    ahead: float | None = None


def stamp(on: bool = True) -> None:
    """From here on lines that go to no terminal begin with the time: for the processes of a command."""
    _Told.stamps = on


def stamped(line: str, stream: TextIO) -> str:
    """The line as it goes there: after the local time, to the second, if it is to be stamped."""
    if not _Told.stamps or not line.strip() or stream.isatty():
        return line
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}"


@contextmanager
def ahead(seconds: float | None) -> Generator[None]:
    """Within it so much of the run is known to come behind the work at hand."""
    before, _Told.ahead = _Told.ahead, seconds
    try:
        yield
    finally:
        _Told.ahead = before


def duration(seconds: float) -> str:
    """A time in words: `3.2 s`, `4 min 10 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


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
        print(printable(stamped(line, sys.stderr)), file=sys.stderr, flush=True)


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
