"""The user's cache: folders built once and seen whole by every process, and hashes not computed twice.

Everything lies under $PREFTUNE_CACHE, or ~/.cache/preftune.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from ..files import write_whole

_BLOCK = 1 << 22


def cache_dir() -> Path:
    """The cache folder, made if it is not there."""
    folder = Path(os.environ.get("PREFTUNE_CACHE") or "~/.cache/preftune").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The cache's folder `name`; where it is missing, `build(empty_folder)` fills it.

    It is filled beside its place and renamed, so it appears whole or not at all; a second process waits for the first.
    """
    target = cache_dir() / name
    if target.is_dir():
        return target
    with FileLock(cache_dir() / f".{name}.lock"):
        if target.is_dir():
            return target
        # Whoever held the lock before us and died may have left a half-filled folder.
        for left in cache_dir().glob(f".{name}.partial-*"):
            shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{name}.partial-", dir=cache_dir()))
        try:
            build(partial)
            partial.chmod(0o755)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def file_sha256(file: Path) -> str:
    """Hex SHA-256 of a file's bytes, remembered as `remembered` does."""
    return remembered("file", [file], lambda: _file_sha256(file))


def _file_sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def remembered(purpose: str, files: list[Path], compute: Callable[[], str]) -> str:
    """`compute()`, kept in the cache for as long as no file of `files` changes its path, size or time of change."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([purpose, stats]).encode()).hexdigest()
    note = cache_dir() / "hashes" / key
    if note.is_file():
        return note.read_text()
    value = compute()
    note.parent.mkdir(exist_ok=True)
    write_whole(note, value)
    return value
