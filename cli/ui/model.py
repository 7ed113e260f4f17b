"""The run's one model in memory: opened at the first need, asked by one at a time."""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from ...files import ADAPTER_WEIGHTS
from ...recipes.build import policy_folder
from ...recipes.schema import BASE, Recipe
from ..policies import check_policy

if TYPE_CHECKING:
    from ...data.rows import Message
    from ...eval.chat.conversation import Conversation, Reply
    from ...eval.spec import EvalSpec


class Model:
    """The policies of a run, on one base.

    Attributes:
        spec: how they are asked; its policies are loaded as they are needed.
    """

    def __init__(self, recipe: Recipe, run: Path, spec: "EvalSpec") -> None:
        self.spec = replace(spec, policies={}, reference=BASE, kl=False)
        self._recipe, self._run = recipe, run
        self._lock = threading.Lock()
        self._talk: Conversation | None = None
        self._loaded: dict[str, tuple[object, str]] = {}

    @contextmanager
    def talking(self, policies: Sequence[str]) -> "Iterator[tuple[Conversation, dict[str, str | None]]]":
        """Within it the policies can be asked, and nobody else asks. Yields the hashes of their adapters too.

        Raises:
            UserError: one of them is unknown or has no adapter.
        """
        with self._lock:
            for name in policies:
                check_policy(self._recipe, self._run, name, "policy")
            if self._talk is None:
                from ...eval.chat.conversation import Conversation
                from ...eval.workbench import Workbench

                self._talk = Conversation(Workbench.open(self.spec))
            yield self._talk, {name: self._ready(self._talk, name) for name in policies}

    def _ready(self, talk: "Conversation", name: str) -> str | None:
        """Have a policy loaded as it lies in the run now; the hash of its adapter."""
        if name == BASE:
            talk.add(name, None)
            return None
        from ...models.lineage import adapter_sha256

        folder = policy_folder(self._recipe, self._run, name)
        stat = (folder / ADAPTER_WEIGHTS).stat()
        mark = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        known = self._loaded.get(name)
        if known is None or known[0] != mark:
            bench = talk.bench
            bench.roles.pop(name, None)
            if (old := bench.loaded.pop(folder.resolve(), None)) is not None:
                # it was trained again while the page was open
                bench.adapters.remove(old)
            digest = adapter_sha256(folder)
            talk.add(name, folder)
            self._loaded[name] = known = (mark, digest)
        return known[1]

    def stream(
        self, policy: str, messages: "Sequence[Message]", seed: int, stop: Callable[[], bool] = lambda: False
    ) -> "Generator[str | Reply, None, None]":
        """The reply as it grows: the text so far, again and again, and the whole reply at the end.

        Closing the iterator stops the reply.

        Raises:
            UserError: as `talking` and `Conversation.reply`.
        """
        heard: SimpleQueue[str | Reply | BaseException] = SimpleQueue()
        gone = threading.Event()

        def speak() -> None:
            try:
                with self.talking([policy]) as (talk, _):
                    over = lambda: gone.is_set() or stop()  # noqa: E731
                    heard.put(talk.reply(policy, messages, seed=seed, on_text=heard.put, stop=over))
            except BaseException as error:
                heard.put(error)

        threading.Thread(target=speak, daemon=True).start()
        text = ""
        try:
            while True:
                said = heard.get()
                if isinstance(said, BaseException):
                    raise said
                if not isinstance(said, str):
                    yield said
                    return
                text += said
                yield text
        finally:
            gone.set()
