"""A server that a stage or an evaluation starts itself, by the recipe's `rollout: {command: ...}`, and ends with it."""

import logging
import shlex
import weakref
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import torch

from ...models.adapters import AdapterSet
from .command import Serving, asked_rank, server_command, server_environment
from .place import Place
from .process import ServerProcess, check_free

logger = logging.getLogger(__name__)

LOG = "server.log"
"""In a stage's folder: what its server says."""
_LEAST = 80
"""Tokens that a server is to take at least: on rows of 64 it is held against the base."""


class OwnServer:
    """The server of a place that says how it is started. It runs between `start` and `stop`.

    Args:
        serving: what it serves (`serving_of`).
        log: a file for what it says.

    Raises:
        UserError: the command says what is filled in here.
    """

    def __init__(self, place: Place, serving: Serving, log: Path) -> None:
        self.where, self.url, self.log = f"{place.where}.command", place.url, log
        self.host, self.port = serving.host, serving.port
        self.command = server_command(serving, shlex.split(place.command), self.where)
        self.environment = server_environment(serving)
        self._process: ServerProcess | None = None
        self._end: Callable[[], object] = lambda: None

    def start(self) -> None:
        """Start it, and wait until it answers.

        Raises:
            UserError: it does not, or something else listens there.
        """
        check_free(self.host, self.port, self.where)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        logger.info("%s: starts %s", self.where, shlex.join(self.command))
        self._process = ServerProcess(self.command, self.url, self.log, self.environment, self.where)
        # whoever forgets to stop it, through an error say, ends it too
        self._end = weakref.finalize(self, self._process.stop)
        try:
            self._process.wait_ready()
        except BaseException:
            self.stop()
            raise

    def revive(self) -> None:
        """Start it if it does not run."""
        if self._process is not None and self._process.alive:
            return
        if self._process is not None:
            last = " | ".join(self._process.last_words())
            logger.warning("%s: the server has ended (%s), and is started again", self.where, last)
            self._end()
        self.start()

    def stop(self) -> None:
        """End it. A second call does nothing."""
        self._end()
        self._process = None


def own_server(place: Place, adapters: AdapterSet, longest: int, rank: int, log: Path) -> OwnServer | None:
    """The server of a place that says how it is started; None where it runs by itself.

    Args:
        longest: tokens of a prompt and its reply that it is to take.
        rank: of the largest adapter that it will be given (`ranks_of`).
    """
    if not place.command:
        return None
    parts = urlsplit(place.url)
    serving = Serving(
        engine=place.engine,
        base=adapters.base.path,
        tokenizer=adapters.base.path,
        rank=rank,
        dtype=str(adapters.head.weight.dtype).removeprefix("torch."),
        max_model_len=max(longest, _LEAST),
        host=str(parts.hostname),
        port=parts.port or 80,
        on_cpu=not torch.cuda.is_available(),
    )
    return OwnServer(place, serving, log)


def rank_of(place: Place, config: dict[str, object]) -> int:
    """What a server is to be asked for, for an adapter of that config (see `asked_rank`)."""
    return asked_rank(place.where, config, place.engine)
