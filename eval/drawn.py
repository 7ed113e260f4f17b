"""Replies that an evaluation drew, kept in the run folder: one changed stage redraws one policy.

One JSON file for each policy, named by the hash of all that shapes its replies: base, adapter, prompts, sampling. It
holds the replies' token ids (a text does not always become the ids again that it came from) and, for each reference
that they were held against, the KL of each reply.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import EVAL_CACHE, read_regular, write_whole

FORMAT = 1
"""Raise it when the sampler says other things than before with the same settings."""


def drawn_key(parts: dict[str, Any]) -> str:
    """sha256 of what shapes a policy's replies."""
    return hashlib.sha256(json.dumps([FORMAT, parts], sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class Drawn:
    """A policy's replies, in the prompts' order.

    Attributes:
        tokens, finished, completions: [N] as in `samples.Sample`.
        kls: hash of a reference -> [N] KL of each reply to it, in nats.
    """

    tokens: list[list[int]]
    finished: list[bool]
    completions: list[str]
    kls: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class DrawnReplies:
    """The files of a run folder.

    Attributes:
        folder: the run's; None: nothing is kept.
        keeps: whether new ones are written; else only read.
    """

    folder: Path | None
    keeps: bool = False

    def get(self, key: str, prompts: int) -> Drawn | None:
        """The kept replies; None where there are none, or the file cannot be read: then they are drawn again."""
        if self.folder is None:
            return None
        try:
            kept = json.loads(read_regular(self._file(key)))
            written = kept.pop("sha256", None)  # earlier versions wrote none
            found = Drawn(**kept)
            columns = (found.tokens, found.finished, found.completions, *found.kls.values())
            whole = written in (None, _sha256(found)) and all(len(column) == prompts for column in columns)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return None
        return found if whole else None

    def put(self, key: str, drawn: Drawn) -> None:
        if self.folder is None or not self.keeps:
            return
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({**vars(drawn), "sha256": _sha256(drawn)}) + "\n")

    def forget(self, but: Sequence[str] = ()) -> None:
        """Deletes what is kept, less the files of these keys."""
        if self.folder is None or not self.keeps:
            return
        wanted = {self._file(key).name for key in but}
        for file in (self.folder / EVAL_CACHE).glob("samples-*.json"):
            if file.name not in wanted:
                file.unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / EVAL_CACHE / f"samples-{key}.json"


def _sha256(drawn: Drawn) -> str:
    """A number that went bad on the disk must not become a result."""
    return hashlib.sha256(json.dumps(vars(drawn)).encode()).hexdigest()
