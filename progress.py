"""Progress on standard error: a bar in a terminal, plain lines elsewhere, silence for what is quick.

Imports `rich` only once there is something to show.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

QUIET_SECONDS = 2.0


class Meter:
    """Counts the steps of one piece of work; call it with the number done so far."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total = label, total
        self._bar: tuple[Progress, TaskID] | None = None
        self._asked = False
        self._started = self._spoken = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._started < QUIET_SECONDS:
            return
        if not self._asked:
            self._asked, self._bar = True, _open_bar(self._label, self._total)
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, completed=done)
        elif done == self._total or now - self._spoken > 10 * QUIET_SECONDS:
            self._spoken = now
            say(f"{self._label}: {done}/{self._total}")

    def close(self) -> None:
        """Take the bar away, where there is one."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None


def say(line: str) -> None:
    """One line for the log, on standard error."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def meter(label: str, total: int) -> Iterator[Meter]:
    """`with meter("sft: samples", 300) as done: ... done(32)`; nothing is shown in the first two seconds."""
    made = Meter(label, total)
    try:
        yield made
    finally:
        made.close()


def _open_bar(label: str, total: int) -> "tuple[Progress, TaskID] | None":
    """A bar that disappears when it is stopped; None where standard error is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    bar.start()
    return bar, bar.add_task(label, total=total)
