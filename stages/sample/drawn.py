"""Replies that a sampling stage has drawn and scored, kept until it is done: one that was cut off goes on behind them.

One JSON file for each piece of the prompts, in the folder of the stage's checkpoints.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files import read_regular, to_disk, write_whole
from .keep import Reply


@dataclass(frozen=True)
class Piece:
    """Some neighbouring prompts.

    Attributes:
        first: the place of the first of them.
        replies: of each prompt, in the order in which they were drawn.
        seconds: that they took.
    """

    first: int
    replies: list[list[Reply]]
    seconds: float

    @property
    def end(self) -> int:
        """The place behind the last of its prompts."""
        return self.first + len(self.replies)


def kept_pieces(folder: Path) -> list[Piece]:
    """The pieces that follow each other from the first prompt on; the first that is missing or damaged ends them."""
    found: list[Piece] = []
    while True:
        done = found[-1].end if found else 0
        pieces = (_read(file) for file in sorted(folder.glob(f"replies-{done:08d}-*.json")))
        piece = next((each for each in pieces if each is not None and each.first == done and each.replies), None)
        if piece is None:
            return found
        found.append(piece)


def keep_piece(folder: Path, piece: Piece) -> None:
    """Write one, by the name `replies-FIRST-END.json`; it is on the disk when this returns."""
    folder.mkdir(parents=True, exist_ok=True)
    content, file = _content(piece), folder / f"replies-{piece.first:08d}-{piece.end:08d}.json"
    to_disk(write_whole(file, json.dumps({**content, "sha256": _sha256(content)}) + "\n"))


def _content(piece: Piece) -> dict[str, Any]:
    replies = [[each.as_dict() for each in those] for those in piece.replies]
    return {"first": piece.first, "replies": replies, "seconds": piece.seconds}


def _read(file: Path) -> Piece | None:
    try:
        content = json.loads(read_regular(file))
        written = content.pop("sha256")
        replies = [[Reply(**each) for each in those] for those in content["replies"]]
        return Piece(content["first"], replies, content["seconds"]) if written == _sha256(content) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
