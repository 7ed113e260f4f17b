"""Checkpoints' pickles, which transformers writes: what in one is more than tensors and plain values is never read."""

import pickle
import re
import zipfile
from pathlib import Path

import torch
from transformers.trainer_pt_utils import safe_globals

from ..errors import UserError

_UNREAD = "training_args.bin"
"""Written by transformers beside its own and read by nobody."""
_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_NAMED = re.compile(r"GLOBAL ([\w.]+)")


def pickle_problem(checkpoint: Path) -> str | None:
    """What in a checkpoint's folder could run code when somebody reads it, in words; None: nothing.

    Each pickle in it is read as transformers will read it (`weights_only`: tensors, numbers, texts), mapped and not
    copied. A sharded checkpoint's index (`.metadata`) is read without such a limit, so there must be none.
    """
    for file in sorted(each for each in checkpoint.rglob("*") if each.is_file()):
        if file.name == ".metadata" or file.suffix == ".distcp":
            return f"{file.name} belongs to a sharded checkpoint, whose index is a pickle that could run code"
        if file.suffix in _SUFFIXES and file.name != _UNREAD and (why := _problem(file)) is not None:
            return f"{file.name} {why}"
    return None


def _problem(file: Path) -> str | None:
    try:
        with safe_globals():
            torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        named = _NAMED.search(str(error))
        return f"would run code when it is read ({named[1]})" if named else "holds more than tensors and plain values"
    except Exception as error:  # cut off, or no such file at all
        return f"cannot be read ({' '.join(str(error).split())[:100] or type(error).__name__})"
    return None


def check_pickles(checkpoint: Path) -> None:
    """Refuse a checkpoint with a `pickle_problem`.

    Raises:
        UserError: what it is.
    """
    if (why := pickle_problem(checkpoint)) is not None:
        raise UserError(str(checkpoint), f"not read: {why}", "delete the checkpoint, and find out who wrote it")
