"""A limit on how long work may take that a user's own text decides. Imports nothing heavy."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from .errors import UserError


@contextmanager
def within(seconds: float, where: str, what: str, remedy: str) -> Generator[None]:
    """Work that should take no time is stopped after so many seconds; unlimited outside the main thread, or on Windows.

    Args:
        where, what, remedy: of the error: its place, what is at work, what to do.

    Raises:
        UserError: it took longer.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise UserError(where, f"{what} takes more than {seconds:g} s", remedy)

    before = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)
