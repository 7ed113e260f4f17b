"""A program beside a server that we start: it ends the server when we end, however we do.

Run as a file, `python watchman.py PID COMMAND...`, in a session of its own; it needs nothing of the package. PID is
whoever started it. It ends with the server's exit code, and takes with it what the server started.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import FrameType

_LOOK, _GRACE = 0.2, 15.0
"""Seconds between two looks, and those that a server has to end by itself."""


def watch(parent: int, command: list[str]) -> int:
    """Run the command until it ends, the parent is gone or a signal asks for it; its exit code."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        del frame
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    child = subprocess.Popen(command)
    while child.poll() is None and not asked and os.getppid() == parent:
        time.sleep(_LOOK)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # the whole session: a server's own workers outlive it now and then
    with suppress(ProcessLookupError):
        os.killpg(0, signal.SIGTERM)
    until = time.monotonic() + _GRACE
    while time.monotonic() < until and (child.poll() is None or _others()):
        time.sleep(_LOOK)
    code = child.poll()
    if code is None or _others():
        os.killpg(0, signal.SIGKILL)  # ourselves as well
    return code if code is not None and code >= 0 else 1


def _others() -> bool:
    """Whether anybody else is left in the session, as far as this system says."""
    group = os.getpgrp()
    try:
        numbers = [int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()]
    except OSError:
        return False
    return any(_in_group(number, group) for number in numbers)


def _in_group(number: int, group: int) -> bool:
    try:
        with open(f"/proc/{number}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] != "Z" and int(fields[2]) == group


if __name__ == "__main__":
    sys.exit(watch(int(sys.argv[1]), sys.argv[2:]))
