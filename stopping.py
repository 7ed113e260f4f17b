"""Being asked to stop: SIGTERM, SIGINT (Ctrl-C) and Slurm's SIGUSR1. Imports nothing heavy.

The first signal ends the work with `Stopped`: at once, or, within `deferred`, at the next place that looks, which is
where a training stage can write a checkpoint (`requested`), or where its work can be left off (`poll`, within
`interruptible`). A second signal ends the process at once; where the process is not ours (`signals(guest=True)`), it
does what it would without us.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

NUMBERS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]

_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
_here = threading.local()
"""Of a thread: what tells it alone to leave its work off (`told_by`)."""
_FOLLOWS = 2.0
"""Seconds after a signal to all processes within which the launcher's word is there."""


class Stopped(BaseException):
    """The work ended because a signal asked for it; nothing is wrong.

    Args:
        number: the signal's.
        said: what was stopped where: `sft: stopped by SIGTERM at step 20 of 60, with a checkpoint`.

    Attributes:
        kept: what of the whole run is kept, and where it goes on, in words; empty where there is none.
    """

    def __init__(self, number: int, said: str = "") -> None:
        self.number, self.kept = number, ""
        super().__init__(said or f"stopped by {signal.Signals(number).name}")

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as a shell reports it: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.number


class _Asked:
    """What this process was asked, and how it takes it."""

    number: int | None = None
    depth: int = 0
    interruptible: bool = False
    file: Path | None = None
    forward: Callable[[int], None] | None = None
    guest: dict[int, Any] | None = None


def requested() -> int | None:
    """The signal that asked this process, or the one that launched it, to stop; None."""
    if _Asked.number is None and _Asked.file is not None and _Asked.file.is_file():
        _Asked.number = int(_Asked.file.read_text(encoding="utf-8") or signal.SIGTERM)
    return _Asked.number


def poll() -> None:
    """For loops that may be part of such work.

    Raises:
        Stopped: this process was asked to stop, within `interruptible`; or this thread was, within `told_by`.
    """
    if (told := getattr(_here, "told", None)) is not None and told.is_set():
        raise Stopped(requested() or signal.SIGTERM)
    if _Asked.interruptible and (number := requested()) is not None:
        raise Stopped(number)


@contextmanager
def interruptible() -> Generator[None]:
    """Work within `deferred` that can be left off at every `poll`, as nothing of it is kept; as also at its ends."""
    before, _Asked.interruptible = _Asked.interruptible, True
    try:
        poll()
        yield
        poll()
    finally:
        _Asked.interruptible = before


@contextmanager
def told_by(told: threading.Event) -> Generator[None]:
    """Work of a thread of its own that is left off at a `poll` once the event is set."""
    _here.told = told
    try:
        yield
    finally:
        _here.told = None


@contextmanager
def deferred(forward: Callable[[int], None] | None = None) -> Generator[None]:
    """Within it a first signal only sets `requested`. When the outermost of these ends well, a request that nobody
    has answered is.

    Args:
        forward: is told the signal's number as well, at once.

    Raises:
        Stopped: at its end, asked to stop meanwhile.
    """
    before, _Asked.forward = _Asked.forward, forward or _Asked.forward
    _Asked.depth += 1
    try:
        yield
    finally:
        _Asked.depth -= 1
        _Asked.forward = before
    if not _Asked.depth and (number := requested()) is not None:
        raise Stopped(number)


@contextmanager
def signals(*, guest: bool = False) -> Generator[None]:
    """Within it the signals are taken as this module says; elsewhere, and outside the main thread, as Python does.

    Args:
        guest: the process is somebody else's, a notebook's say: signals for which it has a handler of its own stay with
            it, and a second one is the process's.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept: dict[int, Any] = {}
    _Asked.number, _Asked.depth, _Asked.guest = None, 0, kept if guest else None
    told, sys.unraisablehook = sys.unraisablehook, partial(_lost, sys.unraisablehook)
    try:
        for number in NUMBERS:
            # who started us may want us to hear nothing of it (nohup, a shell's background job)
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN and not (guest and before not in _DEFAULTS):
                kept[number] = signal.signal(number, _take)
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        _Asked.number, _Asked.guest, sys.unraisablehook = None, None, told


def _lost(told: Callable[[Any], object], found: Any) -> None:
    """A `Stopped` that was raised where nobody can catch it, in a destructor or a callback, is raised once more."""
    if not isinstance(found.exc_value, Stopped):
        told(found)
        return
    _Asked.number = None
    again = threading.Timer(0.01, os.kill, (os.getpid(), found.exc_value.number))
    again.daemon = True
    again.start()


def listen(file: Path) -> None:
    """In a process that another launched: signals mean nothing here, and that file, once it is there, holds the
    number of the one that its launcher got. A terminal's Ctrl-C reaches the whole group; its launcher alone decides.

    SIGTERM is also what torchrun ends the others with when one process fails: where no such file follows it, it ends
    this one. A thread waits for it, as the others may hang in a collective.
    """
    ignore()
    _Asked.file, _Asked.depth = file, 1
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        threading.Thread(target=_end_unless, args=(file,), daemon=True).start()


def _end_unless(file: Path) -> None:
    while True:
        signal.sigwait({signal.SIGTERM})
        time.sleep(_FOLLOWS)
        if not file.is_file():
            os._exit(128 + signal.SIGTERM)


def ignore() -> None:
    """Hear no signal that asks to stop; processes that this one starts inherit it."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def _take(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if _Asked.number is not None and _Asked.guest is not None:
        signal.signal(number, _Asked.guest[number])
        signal.raise_signal(number)
        return
    if _Asked.number is not None:
        # not `sys.exit`: it would wait for whatever holds us up
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{name} again: ends at once\n".encode())
        os._exit(128 + number)
    _Asked.number = number
    if not _Asked.depth:
        raise Stopped(number)
    os.write(2, f"{name}: stops at the next step, with a checkpoint; once more ends at once\n".encode())
    if _Asked.forward is not None:
        _Asked.forward(number)
