"""Answers of a chat endpoint, kept on disk: one JSON file an answer, named by the hash of its request."""

import json
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import read_regular, write_whole


class Answers:
    """A folder of answers. A file appears whole or not at all, so that several runs may share the folder.

    Args:
        folder: made if it is not there; None: nothing is kept.
        where: the judge's place in the recipe, for errors.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None, where: str) -> None:
        self.folder = folder
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                said = f"{str(folder)!r} cannot be made ({error.strerror})"
                raise UserError(f"{where}.cache", said, "name a folder that can be written to") from error

    def get(self, key: str) -> str | None:
        """The kept answer; None where there is none, or its file cannot be read: then it is asked for again."""
        if self.folder is None:
            return None
        try:
            kept = json.loads(read_regular(self.folder / f"{key}.json"))
            return kept["answer"] if isinstance(kept["answer"], str) else None
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def put(self, key: str, kept: dict[str, Any]) -> None:
        """Keeps `{"answer": text, ...}`; whatever else it holds is for people who look into the folder."""
        if self.folder is None:
            return
        write_whole(self.folder / f"{key}.json", json.dumps(kept, ensure_ascii=False, indent=1) + "\n")
