"""Several machines at one run: what each tells the others, through files in the run's folder.

    RUN/.machines/0.json    of the first machine, which runs the chain: what it is at, and what it calls the others to
    RUN/.machines/1.json    of one that joined: whom it follows, and how far it is with what was called

Each writes its own anew every two seconds with a number that rises; whose number stands still is lost. No two clocks
are compared. A step goes like this: the first machine `calls`; the others see that they would do the same work, and are
`ready`; it `starts`, and all launch their share; each says how its share `ended`. A share that fails, and a machine
that is lost, end the step everywhere: no process waits for ever for one that is gone.

Every share runs beneath torch elastic, which is not asked to restart it. Measured with torch 2.13, two agents and
`--max-restarts 3`: where the first machine is killed, which holds the store, the other's agent ends in a traceback and
the restarted one waits for ever, with either rendezvous; c10d may give the ranks to other machines than before, and
the static one spent all three restarts on one loss. Neither tells a user's mistake from a crash.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import own_code, stopping
from ..errors import UserError
from ..files import write_whole
from ..stopping import Stopped
from .launched import PEER_GONE
from .process import StageFailed

FOLDER = ".machines"
BEAT, LOOK = 2.0, 0.25
"""Seconds between two writings, and between two looks at what others wrote."""
LOST, GRACE = 20.0, 5.0
"""So long nothing new of a machine: it is lost. So long a share may take to notice that it cannot go on."""
WAIT = 15 * 60.0
"""So long a machine that is not there is waited for: as long as torch's own rendezvous."""

CALLS, STARTS, ENDED, DONE, FAILED, STOPPED = "calls", "starts", "ended", "done", "failed", "stopped"
PREPARES, FOLLOWS, READY, LEFT = "prepares", "follows", "ready", "left"
OVER = (DONE, FAILED, STOPPED)


@dataclass(frozen=True)
class Machines:
    """The machines of an accelerate config.

    Attributes:
        count: how many. rank: which of them this one is, from 0. processes: on all of them together.
        address, port: where the first one is found by all processes.
    """

    count: int
    rank: int
    processes: int
    address: str = ""
    port: int = 0

    def reach(self) -> None:
        """Whether the first machine, which calls, is found where the config says. Raises UserError."""
        try:
            socket.create_connection((self.address, self.port), timeout=LOST).close()
        except OSError as error:
            place = f"{self.address}:{self.port}"
            said = f"machine {self.rank} does not reach machine 0 at {place} ({error.strerror or error})"
            remedy = "main_process_ip and main_process_port are where the others find machine 0; a firewall lets them"
            raise UserError("--launch", said, remedy) from None

    @contextmanager
    def reachable(self) -> Generator[None]:
        """Within it the port is open, so that others see whether they reach it. Raises UserError where it is taken."""
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            door = socket.create_server(("", self.port), family=family, backlog=self.count, dualstack_ipv6=both)
        except OSError as error:
            said = f"main_process_port {self.port} cannot be opened on this machine ({error.strerror or error})"
            raise UserError("--launch", said, "name another one, the same on every machine") from None
        with door:
            yield


class LostMachine(Exception):
    """One of the others is gone; whoever starts it again has it go on."""


class Board:
    """What this machine says, for as long as the `with` lasts."""

    def __init__(self, run_dir: Path, rank: int, **values: Any) -> None:
        self.id = uuid.uuid4().hex
        self._file = run_dir / FOLDER / f"{rank}.json"
        self._values = {"id": self.id, "host": socket.gethostname(), "pid": os.getpid(), **values}
        self._beat, self._lock, self._over = 0, threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beating, daemon=True)

    def __enter__(self) -> "Board":
        self._file.parent.mkdir(exist_ok=True)
        self.say()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def say(self, **values: Any) -> None:
        """Change what it says, at once."""
        with self._lock:
            self._values |= values
            self._beat += 1
            write_whole(self._file, json.dumps({**self._values, "beat": self._beat}) + "\n")

    def says(self, name: str) -> Any:
        """What it said last under that name."""
        return self._values.get(name)

    def _beating(self) -> None:
        while not self._over.wait(BEAT):
            with suppress(OSError):  # a disk that is back before we count as lost
                self.say()


class Other:
    """What another machine says, as far as it is seen from here.

    Attributes:
        alive: it has said something since it was first looked at.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.rank = rank
        self._file = run_dir / FOLDER / f"{rank}.json"
        self._said: dict[str, Any] | None = None
        self._news = time.monotonic()
        self.alive = False

    def look(self) -> Mapping[str, Any]:
        """What it says now; empty where it has not said anything."""
        before = self._said
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = before  # being replaced, or not there
        self._said = found if isinstance(found, dict) else before or {}
        if self._said != before:
            self._news, self.alive = time.monotonic(), before is not None
        return self._said

    @property
    def silent(self) -> float:
        """Seconds since it said anything new."""
        return time.monotonic() - self._news

    @property
    def lost(self) -> bool:
        """Whether it has been silent for too long."""
        return self.silent > LOST


class Lead:
    """The first machine's part, for as long as its chain runs.

    Args:
        about: what the others must have alike, by name (see `join.compare`).
        say: tells the user a line.
    """

    def __init__(self, run_dir: Path, machines: Machines, about: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self.run_dir, self.machines, self._say = run_dir, machines, say
        self._board = Board(run_dir, 0, state=PREPARES, attempt=0, about=about)
        self._others = [Other(run_dir, rank) for rank in range(1, machines.count)]
        self._attempt, self._step = 0, ""
        self._present: dict[int, str] = {}

    def __enter__(self) -> "Lead":
        self._board.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        state = DONE if error is None else STOPPED if isinstance(error, Stopped) else FAILED
        number = error.number if isinstance(error, Stopped) else None
        with suppress(OSError):  # a full disk may be what this is about
            self._board.say(state=state, number=number)
        self._board.__exit__()

    def start(self, step: str, key: str, from_adapter: Path | None) -> None:
        """Call the others to a step, wait for them, and start it.

        Args:
            step: a stage's name. key: what it is made for, which the others find by themselves.

        Raises:
            UserError: something is wrong on one of them.
            StageFailed: one did not come.
            Stopped: a signal asked for it.
        """
        self._attempt, self._step, self._present = self._attempt + 1, step, {}
        folders = own_code.environment()[own_code.FOLDERS_VARIABLE]
        adapter = str(from_adapter) if from_adapter else None
        call = {"step": step, "key": key, "from_adapter": adapter, "code": folders}
        with self.machines.reachable():
            self._board.say(state=CALLS, attempt=self._attempt, **call)
            with stopping.interruptible():
                self._gather()
        self._board.say(state=STARTS)

    def _gather(self) -> None:
        called, said = time.monotonic(), False
        while missing := [each for each in self._others if not self._ready(each)]:
            stopping.poll()
            for each in missing:
                if error := self._report(each).get("error"):
                    raise UserError(*error)
            which = ", ".join(str(each.rank) for each in missing)
            waited = time.monotonic() - called
            if not said and waited > BEAT:
                here = f"preftune join {self.run_dir} --launch FILE"
                self._say(f"{self._step}: waits for machine {which} of {self.machines.count}: there, {here}")
                said = True
            if waited > WAIT and any(each.lost or not self._follows(each) for each in missing):
                raise StageFailed(f"{self._step}: machine {which} did not come within {WAIT / 60:g} minutes")
            time.sleep(LOOK)

    def trouble(self) -> bool:
        """Whether the step that was started cannot go on, as one of the others has failed or is lost."""
        return any(self._is_lost(each) or _ended_badly(self._report(each)) for each in self._others)

    def end(self, code: int) -> None:
        """Tell the others how this machine's share ended."""
        self._board.say(state=ENDED, ended={"attempt": self._attempt, "code": code})

    def why(self, code: int, words: str) -> Exception | Stopped:
        """What to raise, where this machine's share ended with an exit code, and no word of a mistake or a signal: what
        the others say of theirs, who may need a moment to notice.

        Args:
            words: of this machine's share.
        """
        reports: dict[int, Mapping[str, Any]] = {0: {"code": code, "words": words}}
        for each in self._others:
            while not (report := self._report(each)) and not self._is_lost(each):
                time.sleep(LOOK)
            reports[each.rank] = report
        for report in reports.values():
            if report.get("error"):
                return UserError(*report["error"])
            if report.get("stopped"):
                return Stopped(*report["stopped"])
        if gone := [str(rank) for rank, report in reports.items() if not report]:
            return LostMachine(f"{self._step}: machine {', '.join(gone)} is lost")
        # who failed by itself, and not because another one had
        failed = [rank for rank, report in reports.items() if report["code"] not in (0, PEER_GONE)]
        rank = failed[0] if failed else 0
        said = reports[rank].get("words") or f"its launcher ended with exit code {reports[rank]['code']}"
        return StageFailed(f"{self._step}: on machine {rank}, {said}")

    def _follows(self, other: Other) -> bool:
        return other.look().get("follows") == self._board.id

    def _ready(self, other: Other) -> bool:
        said = other.look()
        ready = self._follows(other) and said.get("state") == READY and said.get("attempt") == self._attempt
        if ready:
            self._present[other.rank] = str(said["id"])
        return ready

    def _is_lost(self, other: Other) -> bool:
        """Gone, or another one in its place."""
        said = other.look()
        return said.get("id") != self._present.get(other.rank) or said.get("state") == LEFT or other.lost

    def _report(self, other: Other) -> Mapping[str, Any]:
        """How its share of this attempt ended; empty where it has not."""
        ended = other.look().get("ended") or {}
        return ended if self._follows(other) and ended.get("attempt") == self._attempt else {}


def _ended_badly(report: Mapping[str, Any]) -> bool:
    return any(report.get(each) for each in ("code", "error", "stopped"))
