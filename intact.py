"""Whether a finished folder still holds what was written into it: its stamp has the hash of every file that counts."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import CHECKPOINTS, EVALUATION, LOG, LOGS, RECIPE, ROLLOUTS, STAMP, read_regular, sha256_of

_NOT_COUNTED = (CHECKPOINTS, LOGS, LOG, ROLLOUTS, "README.md", STAMP)
"""Directly in the folder."""


def contents(folder: Path) -> dict[str, list[int | str]]:
    """Path below the folder -> [bytes, sha256] of each file that others read: not logs, checkpoints and cards.

    The hash is taken anew every time: what goes by a file's time of change does not see a disk that went bad.
    """
    found: dict[str, list[int | str]] = {}
    for root, folders, files in os.walk(folder):
        here = Path(root)
        left_out = _NOT_COUNTED if here == folder else ()
        folders[:] = [each for each in folders if each not in left_out]
        for file in (here / name for name in files if name not in left_out):
            if file.is_file():
                found[str(file.relative_to(folder))] = [file.stat().st_size, sha256_of(file)]
    return dict(sorted(found.items()))


def damage(folder: Path, only: Collection[str] | None = None) -> str | None:
    """What of a finished folder is not as it was written, in words; None where all is, or where no stamp says.

    Args:
        only: the files to look at; None: all.
    """
    try:
        written = json.loads(read_regular(folder / STAMP))["files"]
        wanted = {str(name): (int(size), str(sha256)) for name, (size, sha256) in written.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    for name, (size, sha256) in wanted.items():
        if only is not None and name not in only:
            continue
        file = folder / name
        if not file.is_file():
            return f"{name} is gone"
        if (now := file.stat().st_size) != size:
            return f"{name} {'is cut off' if now < size else 'has grown'}: {now} bytes, {size} were written"
        if sha256_of(file) != sha256:
            return f"{name} has other content than was written"
    return None


def check_intact(folder: Path, only: Collection[str] | None = None) -> None:
    """Refuse a finished folder that is damaged. One without a stamp passes, as does one of an earlier version.

    Args:
        only: the files to look at; None: all.

    Raises:
        UserError: a file of it is gone, cut off or changed.
    """
    found = damage(folder, only)
    if found is not None:
        recipe = folder.parent / RECIPE
        until = "" if folder.name == EVALUATION else f" --until {folder.name}"
        command = f"preftune run {recipe} --output-dir {folder.parent}{until}"
        remedy = f"run it again: {command}" if recipe.is_file() else "train it again, or take it from a copy"
        raise UserError(str(folder), f"is damaged, {found}", remedy)


def read_json(file: Path) -> Any:
    """What a JSON file of a run holds; None where there is no file.

    Raises:
        UserError: it cannot be read.
    """
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())[:120]
        remedy = "run the recipe again, which makes what is damaged anew; or delete it"
        raise UserError(str(file), f"cannot be read ({said})", remedy) from error


def read_json_object(file: Path) -> dict[str, Any]:
    """The same, of a file that holds an object; empty where there is no file."""
    found = read_json(file)
    if found is not None and not isinstance(found, dict):
        raise UserError(str(file), "holds no object", "run the recipe again, which makes what is damaged anew")
    return found or {}
