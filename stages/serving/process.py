"""A server of vLLM's or SGLang's that this process starts and ends: in a session of its own, its words in a file.

Imports nothing heavy. A stage that draws its rollouts through one and `preftune serve` share it.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from shutil import which

from ... import stopping
from ...errors import UserError
from ...progress import Meter

READY_WITHIN = 1800.0
"""Seconds in which a server has to answer: reading a large base from a network's disk takes minutes."""
_LOOK, _LAST, _LINES = 0.25, 20.0, 6


class ServerProcess:
    """A server that was started here.

    Its session has a watchman, who ends the server when this process is gone, killed or not.

    Args:
        command: the server's (`command.server_command`).
        url: where it will answer.
        log: a file for what it says; what stands in it stays.
        environment: variables besides this process's.
        where: what asked for it, for messages.

    Raises:
        UserError: there is no such program.
    """

    def __init__(self, command: Sequence[str], url: str, log: Path, environment: Mapping[str, str], where: str) -> None:
        self.command, self.url, self.log, self.where = list(command), url, log, where
        watchman = [sys.executable, str(Path(__file__).with_name("watchman.py")), str(os.getpid())]
        check_program(self.command[0], where)
        # a terminal's Ctrl-C is for us alone: who started it ends it
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                [*watchman, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait_ready(self, within: float = READY_WITHIN) -> None:
        """Wait until it answers, with a line of how long it takes.

        Raises:
            UserError: it ended before, or took longer.
            Stopped: a signal asked for it.
        """
        began = time.monotonic()
        meter = Meter(f"{self.where}: seconds until {self.url} answers", None)
        try:
            while not answers(self.url):
                spent = time.monotonic() - began
                meter(int(spent))
                if not self.alive:
                    raise self._ended("ended before it answered")
                if spent > within:
                    raise self._ended(f"does not answer after {within:g} s")
                time.sleep(_LOOK)
        finally:
            meter.close()

    def _ended(self, how: str) -> UserError:
        last = " | ".join(self.last_words())
        return UserError(self.where, f"the server {how}{f' ({last})' if last else ''}", f"look at {self.log}")

    def last_words(self) -> list[str]:
        """The last lines that it said."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        return [" ".join(line.split())[:200] for line in lines if line.strip()][-_LINES:]

    def wait(self) -> int:
        """Wait for its end; its exit code."""
        return self._process.wait()

    def stop(self) -> None:
        """End it, and what it started. A second call does nothing."""
        if self.alive:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_LAST)
        if self.alive:
            # the watchman hangs: its session has no other master
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            self._process.wait()


def answers(url: str) -> bool:
    """Whether a server says there that it is well (`/health`, which vLLM and SGLang have alike)."""
    stopping.poll()
    # never by a proxy: it is a machine of ours
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False


def check_free(host: str, port: int, where: str) -> None:
    """Raises UserError where something listens there already."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_STREAM)) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            said = f"port {port} of {host} cannot be had ({error.strerror})"
            raise UserError(where, said, "take another one") from error


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody has at this moment."""
    with closing(socket.socket()) as tried:
        tried.bind((host, 0))
        return int(tried.getsockname()[1])


def check_program(program: str, where: str) -> None:
    """Raises UserError where there is none of that name."""
    if which(program) is None:
        remedy = "give the interpreter of the environment that has it, or its whole path"
        raise UserError(where, f"there is no program {program!r}", remedy)
