"""The user's cache: folders built once and seen whole by every process, and hashes not computed twice.

Everything lies under $PREFTUNE_CACHE, or ~/.cache/preftune.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .. import stopping
from ..errors import UserError
from ..files import sha256_of, write_whole


def cache_place() -> Path:
    """Where the cache folder lies or would: nothing is made.

    Raises:
        RuntimeError: nobody knows where the home folder is that its path begins with.
    """
    return Path(_named()).expanduser()


def cache_dir() -> Path:
    """The cache folder, made if it is not there.

    Raises:
        UserError: it cannot be.
    """
    try:
        folder = cache_place()
        folder.mkdir(parents=True, exist_ok=True)
        return folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise _unusable(_named(), error) from error


def _named() -> str:
    return os.environ.get("PREFTUNE_CACHE") or "~/.cache/preftune"


def _unusable(folder: Path | str, error: Exception) -> UserError:
    said = getattr(error, "strerror", None) or " ".join(str(error).split())
    remedy = "set the environment variable PREFTUNE_CACHE to a folder that can be written to"
    return UserError(str(folder), f"cannot be used as the cache ({said})", remedy)


def build_once(
    name: str, build: Callable[[Path], None], *, within: str = "", whole: Callable[[Path], bool] = Path.is_dir
) -> Path:
    """The cache's folder `name`; where it is missing, `build(empty_folder)` fills it.

    It is filled beside its place and renamed, so it appears whole or not at all; a second process waits for the first.

    Args:
        within: a folder of the cache, for nobody's eyes but the user's, in which it lies.
        whole: whether a folder that lies there may be used; one that may not is built anew.

    Raises:
        Stopped: asked to stop while it waits.
    """
    place = cache_dir() / within
    target = place / name
    if whole(target):
        return target
    try:
        if within:
            place.mkdir(mode=0o700, exist_ok=True)
        with _held(FileLock(place / f".{name}.lock")):
            if not whole(target):
                shutil.rmtree(target, ignore_errors=True)
                _build(name, target, build)
    except OSError as error:
        raise _unusable(place, error) from error
    return target


@contextmanager
def _held(lock: FileLock) -> Generator[None]:
    """Within it the lock is this process'; whoever waits for it can be stopped."""
    while True:
        stopping.poll()
        with suppress(Timeout):
            lock.acquire(timeout=1.0)
            break
    try:
        yield
    finally:
        lock.release()


def _build(name: str, target: Path, build: Callable[[Path], None]) -> None:
    # Whoever held the lock before us and died may have left a half-filled folder.
    for left in target.parent.glob(f".{name}.partial-*"):
        shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{name}.partial-", dir=target.parent))
    try:
        build(partial)
        partial.chmod(0o755)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def file_sha256(file: Path) -> str:
    """Hex SHA-256 of a file's bytes, remembered as `remembered` does."""
    return remembered("file", [file], lambda: sha256_of(file))


def remembered(purpose: str, files: list[Path], compute: Callable[[], str]) -> str:
    """`compute()`, a hash in hex, kept in the cache for as long as no file of `files` changes its path, size or time of
    change. A cache that cannot be read or written costs time, and nothing else."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([purpose, stats]).encode()).hexdigest()
    with suppress(OSError, UserError, ValueError):
        kept = (cache_dir() / "hashes" / key).read_text(encoding="utf-8")
        if re.fullmatch("[0-9a-f]{64}", kept):
            return kept
    value = compute()
    with suppress(OSError, UserError):
        note = cache_dir() / "hashes" / key
        note.parent.mkdir(exist_ok=True)
        write_whole(note, value)
    return value
