"""Limits on work that a text decides which somebody else wrote: how long it may take, and how much memory.

Made to cost a microsecond where nothing goes wrong: such work is done once a row. Imports nothing heavy.
"""

import atexit
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from .errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

T = TypeVar("T")

MEMORY = 1 << 30
"""Bytes that such work may take."""

_STATM = Path("/proc/self/statm")
_FRESH = 0.5
"""Seconds for which the process's size is taken to be known."""


class _TimeUp(BaseException):
    """No `Exception`: what is interrupted must not take it for an error of its own."""


class _Watch:
    """The main thread's timer. It counts processor time and goes on from one piece of work to the next: set anew for
    each, it would cost more than the work. It interrupts Python's long operations too (the power of large numbers).

    Attributes:
        deadline: by `time.monotonic`, of the work at hand; None: there is none.
    """

    def __init__(self) -> None:
        self.deadline: float | None = None
        self._armed = self._handles = False
        self._before: Any = None
        self._interval = 0.0

    def arm(self, seconds: float) -> None:
        """See to it that `_tick` runs once so much processor time has been used, or before."""
        if not self._handles:
            self._before = signal.signal(signal.SIGVTALRM, self._tick)
            signal.siginterrupt(signal.SIGVTALRM, False)
            self._handles = True
        if not self._armed or seconds < self._interval:
            self._set(seconds)

    def disarm(self) -> None:
        """At the end: Python gives the signal back to the system before it is over, and the system ends the process."""
        if self._armed:
            self._armed = False
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def hand_back(self) -> None:
        """Take the timer and its handler away, until they are needed again. In the main thread."""
        self.disarm()
        if self._handles:
            self._handles = False
            signal.signal(signal.SIGVTALRM, signal.SIG_DFL if self._before is None else self._before)

    def forget(self) -> None:
        """In a forked child, which inherits no timer."""
        self.deadline, self._armed = None, False

    def _set(self, seconds: float) -> None:
        self._armed, self._interval = True, max(seconds, 0.01)
        signal.setitimer(signal.ITIMER_VIRTUAL, self._interval)

    def _tick(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._armed = False
        if self.deadline is None:
            return
        left = self.deadline - time.monotonic()
        # once more a little later: an exception within a destructor is lost
        self._set(left if left > 0 else 0.1)
        if left <= 0:
            raise _TimeUp


_WATCH = _Watch()
_TIMED = hasattr(signal, "setitimer") and hasattr(signal, "SIGVTALRM")
atexit.register(_WATCH.disarm)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_WATCH.forget)


def hand_back() -> None:
    """Leave the process without a timer of ours and its signal's handler; the next limited work sets them again."""
    if _TIMED and threading.current_thread() is threading.main_thread():
        _WATCH.hand_back()


@contextmanager
def within(seconds: float, where: str, what: str, remedy: str) -> Generator[None]:
    """Work that should take no time is stopped after so many seconds, in whichever thread it runs.

    Outside the main thread, and on Windows, a single operation of Python's cannot be interrupted, only what follows it.

    Args:
        where, what, remedy: of the error: its place, what is at work, what to do.

    Raises:
        UserError: it took longer.
    """
    main = _TIMED and threading.current_thread() is threading.main_thread()
    try:
        with _main_thread(seconds) if main else _other_thread(seconds):
            yield
    except _TimeUp:
        raise UserError(where, f"{what} takes more than {seconds:g} s", remedy) from None


@contextmanager
def _main_thread(seconds: float) -> Generator[None]:
    before = _WATCH.deadline
    ends = time.monotonic() + seconds
    _WATCH.deadline = ends if before is None else min(before, ends)
    _WATCH.arm(seconds)
    try:
        yield
    finally:
        _WATCH.deadline = before


@contextmanager
def _other_thread(seconds: float) -> Generator[None]:
    thread, lock, over = threading.get_ident(), threading.Lock(), False

    def interrupt(kind: object) -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), kind)

    def up() -> None:
        with lock:
            if not over:
                interrupt(ctypes.py_object(_TimeUp))

    timer = threading.Timer(seconds, up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            over = True
            interrupt(None)
        timer.cancel()


def bounded(work: Callable[[], T], seconds: float, where: str, what: str, remedy: str) -> T:
    """What the work returns: `within` so many seconds, and on Linux's main thread within `MEMORY` as well.

    Args:
        work: without side effects; it may be begun twice.
        where, what, remedy: of the error, as of `within`.

    Raises:
        UserError: it took longer, or more memory.
    """
    if not _TIMED or threading.current_thread() is not threading.main_thread():
        with within(seconds, where, what, remedy):
            return work()
    # as `within` does, without what its generators cost
    before, ends = _WATCH.deadline, time.monotonic() + seconds
    _WATCH.deadline = ends if before is None else min(before, ends)
    _WATCH.arm(seconds)
    try:
        return _SIZE.limit(work)
    except _TimeUp:
        raise UserError(where, f"{what} takes more than {seconds:g} s", remedy) from None
    except MemoryError:
        said = f"{what} takes more than {MEMORY / (1 << 30):g} GB of memory"
        raise UserError(where, said, remedy) from None
    finally:
        _WATCH.deadline = before


class _Size:
    """How much address space this process has, and a limit on its growth."""

    def __init__(self) -> None:
        self._known = _STATM.is_file() and resource is not None
        self._page = os.sysconf("SC_PAGE_SIZE") if self._known else 0
        self._bytes, self._limits, self._read = 0, (0, 0), -_FRESH

    def limit(self, work: Callable[[], T]) -> T:
        """What the work returns, for which no more than `MEMORY` is had.

        Raises:
            MemoryError: it wants more.
        """
        if not self._known:
            return work()
        if time.monotonic() - self._read > _FRESH:
            self._measure()
        try:
            return self._within_limit(work)
        except MemoryError:
            # the process may have grown since it was measured
            self._measure()
            return self._within_limit(work)

    def _measure(self) -> None:
        assert resource is not None
        self._read = time.monotonic()
        self._limits = resource.getrlimit(resource.RLIMIT_AS)
        size = int(_STATM.read_bytes().split()[0]) * self._page + MEMORY
        self._bytes = min([size, *(each for each in self._limits if each != resource.RLIM_INFINITY)])

    def _within_limit(self, work: Callable[[], T]) -> T:
        assert resource is not None
        resource.setrlimit(resource.RLIMIT_AS, (self._bytes, self._limits[1]))
        try:
            return work()
        finally:
            resource.setrlimit(resource.RLIMIT_AS, self._limits)


_SIZE = _Size()
