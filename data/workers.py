"""Several processes of this machine that share one piece of work, a chunk at a time and in order.

Each is a Python of its own, not a fork: the one that asks may have threads and a GPU by then, and any main module. It
ends when the connection to it does.
"""

import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from ..errors import UserError

_WANTED = "PREFTUNE_DATA_PROCESSES"
_AHEAD = 3
"""Chunks that each process has been given and not been asked for."""
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    f"from {__name__} import serve; serve(int(sys.argv[2]))"
)  # fmt: skip

Work = Callable[[Any], Any]


def processes_wanted() -> int:
    """How many there should be: as many as this process may use cores, or as the environment says.

    Raises:
        UserError: it says no number.
    """
    said = os.environ.get(_WANTED)
    if said is None:
        allowed = getattr(os, "sched_getaffinity", None)
        return len(allowed(0)) if allowed is not None and os.name == "posix" else 1
    if not said.isdecimal():
        raise UserError(_WANTED, f"{said!r} is no number", "write how many may encode rows, 1 for none besides this")
    return int(said) if os.name == "posix" else 1


class Workers:
    """Processes that do `task.work()` on what they are given.

    Args:
        task: can be pickled; its `work()` makes, once in each process, the function of a chunk.
    """

    def __init__(self, count: int, task: Any) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        for _ in range(count):
            ours, theirs = socket.socketpair()
            command = [sys.executable, "-P", "-W", "ignore", "-c", _START, json.dumps(sys.path), str(theirs.fileno())]
            with theirs:
                started = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
                )
            self._processes.append(started)
            self._connections.append(Connection(ours.detach()))
        self._starting = set(range(count))
        for place in range(count):
            self._send(place, task)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        for each in self._connections:
            each.close()
        for process in self._processes:
            if kind is not None:
                process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()

    def ready(self) -> bool:
        """Whether all of them can begin: a Python and its libraries take seconds to start.

        Raises:
            UserError: one has ended.
        """
        for place in sorted(self._starting):
            if not self._connections[place].poll():
                return False
            self._next(place, None)
            self._starting.discard(place)
        return True

    def done(self, chunks: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """For each (what it is, chunk to work on), in their order: (what it is, what became of the chunk).

        Raises:
            RuntimeError: the work raised; what it said.
            UserError: a process ended before its work did.
        """
        asked = deque[tuple[int, Any]]()
        for place in sorted(self._starting):
            self._next(place, None)
        self._starting.clear()
        for number, (name, chunk) in enumerate(chunks):
            place = number % len(self._connections)
            self._send(place, chunk)
            asked.append((place, name))
            if len(asked) >= _AHEAD * len(self._connections):
                yield self._next(*asked.popleft())
        while asked:
            yield self._next(*asked.popleft())

    def _send(self, place: int, what: Any) -> None:
        try:
            self._connections[place].send(what)
        except OSError as error:
            raise self._ended(place) from error

    def _next(self, place: int, name: Any) -> tuple[Any, Any]:
        try:
            well, found = self._connections[place].recv()
        except (EOFError, OSError) as error:
            raise self._ended(place) from error
        if not well:
            raise RuntimeError(f"a process that encodes rows failed:\n{found}")
        return name, found

    def _ended(self, place: int) -> UserError:
        code = self._processes[place].wait(10)
        how = f"by signal {-code}, as a system does that has no memory left" if code < 0 else f"with exit code {code}"
        remedy = f"make room, or set {_WANTED}=1 to have rows encoded by one process"
        return UserError("data", f"a process that encodes rows ended {how}", remedy)


def serve(handle: int) -> None:
    """What such a process does: chunks come in by the socket, and what becomes of them goes out."""
    import gc
    import signal
    import traceback

    for name in ("SIGINT", "SIGUSR1"):  # meant for the process that asks, which closes the connection
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    connection = Connection(handle)
    work = connection.recv().work()
    connection.send((True, None))
    waiting: queue.Queue[Any] = queue.Queue()
    # chunks are taken in while one is worked on: who gives them never waits for long
    threading.Thread(target=_take_in, args=(connection, waiting), daemon=True).start()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    with suppress(OSError):  # nobody asks any more
        while (chunk := waiting.get()) is not None:
            try:
                connection.send((True, work(chunk)))
            except OSError:
                raise
            except Exception:
                connection.send((False, traceback.format_exc()))


def _take_in(connection: Connection, waiting: "queue.Queue[Any]") -> None:
    with suppress(EOFError, OSError):
        while True:
            waiting.put(connection.recv())
    waiting.put(None)
