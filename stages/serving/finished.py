"""Policies that are finished, on a server: a stage that samples and the evaluation draw their replies there.

Nothing trains here, so an adapter goes over once, under a name that says its content, from the folder in which it lies.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from ...models.generate import Generation
from ...models.lineage import adapter_sha256
from .engines import Draw
from .server import RolloutServer


class FinishedPolicies:
    """Replies of the base and of finished adapters on it, one adapter on the server at a time.

    Args:
        server: held against our base already.
        check: is told an adapter's folder and its name on the server, once it is loaded for the first time.
    """

    def __init__(self, server: RolloutServer, check: Callable[[Path, str], None] = lambda folder, name: None) -> None:
        self.server, self.check = server, check
        self.base = server.listing().base
        self._checked: set[str] = set()

    def sample(
        self,
        folder: Path | None,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        draw: Draw,
        on_batch: Callable[[int], None] | None = None,
    ) -> Generation:
        """One reply to each prompt, in their order.

        Args:
            folder: of the adapter that speaks; None: the base.
            seeds: one for each prompt.

        Raises:
            UserError: as `RolloutServer.load` and `sample`.
        """
        if folder is None:
            return self.server.sample(self.base, prompts, seeds, draw, on_batch=on_batch, learns=False)
        name = served_name(folder)

        def load() -> None:
            self.server.load(name, folder.resolve())

        load()
        try:
            if name not in self._checked:
                self.check(folder, name)
                self._checked.add(name)
            return self.server.sample(name, prompts, seeds, draw, again=load, on_batch=on_batch, learns=False)
        finally:
            self.server.unload(name)

    def close(self) -> None:
        """End the server, where it was started for this."""
        if self.server.own is not None:
            self.server.own.stop()


def served_name(folder: Path) -> str:
    """What a server calls a finished adapter: by its content, so that what it said for another one is never taken for
    it."""
    return f"preftune-{adapter_sha256(folder)[:16]}"
