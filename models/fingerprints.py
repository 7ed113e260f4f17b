"""Hashes of what a recipe names: an adapter, a model's folder, the code of a function. Imports nothing heavy."""

import hashlib
from pathlib import Path

from ..files import ADAPTER_WEIGHTS, ROWS
from ..own_code import find_named
from .cache import file_sha256

_MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".txt", ".model")


def content(folder: Path) -> str | None:
    """Hash of the adapter in a folder, or of the rows of a stage that samples; None where there is neither."""
    from .lineage import adapter_sha256

    if (folder / ADAPTER_WEIGHTS).is_file():
        return adapter_sha256(folder)
    return file_sha256(folder / ROWS) if (folder / ROWS).is_file() else None


def folder_sha256(folder: Path) -> str:
    """Hash of a model's own files in a folder: weights, config, tokenizer."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in _MODEL_FILES)
    return hashlib.sha256("".join(f"{file.name} {file_sha256(file)}\n" for file in files).encode()).hexdigest()


def code_sha256(target: str) -> str | None:
    """Hash of the file that `module:function` lies in; None where it cannot be found (who imports it says so)."""
    try:
        found = find_named(target.partition(":")[0])
    except (ImportError, ValueError):
        return None
    if found is None or found.origin is None or not Path(found.origin).is_file():
        return None
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()
