"""Progress on standard error: a bar in a terminal, plain lines elsewhere, silence for what is quick."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 2.0


class Meter:
    """Counts the steps of one piece of work; call it with the number done so far."""

    def __init__(self, label: str, total: int, bar: Progress | None) -> None:
        self._label, self._total, self._bar = label, total, bar
        self._task: int | None = None
        self._started = self._spoken = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._started < QUIET_SECONDS:
            return
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(self._label, total=self._total)
            self._bar.update(self._task, completed=done)  # type: ignore[arg-type]
        elif done == self._total or now - self._spoken > 10 * QUIET_SECONDS:
            self._spoken = now
            say(f"{self._label}: {done}/{self._total}")


def say(line: str) -> None:
    """One line for the log, on standard error."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def meter(label: str, total: int) -> Iterator[Meter]:
    """`with meter("sft: samples", 300) as done: ... done(32)`; nothing is shown in the first two seconds."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Meter(label, total, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield Meter(label, total, bar)
