"""Files of JSON lines that several programs add to at the same time, and that a kill cannot spoil."""

import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock


@contextmanager
def alone_with(path: Path) -> Generator[None]:
    """Within it nobody else adds to the file, in this process or another that asks the same."""
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line to the file; when this returns it is on disk, whatever happens to the process.

    Call it within `alone_with`.
    """
    line = json.dumps(row, ensure_ascii=False) + "\n"
    with path.open("a+b") as file:
        end = _mended(file)
        try:
            file.write(line.encode("utf-8", "surrogatepass"))
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)  # a disk that is full takes half a line
            raise


def mend(path: Path) -> None:
    """Make a file whole again that a kill left with half a line at its end; nothing where there is none."""
    if path.is_file() and path.stat().st_size:
        with alone_with(path), path.open("a+b") as file:
            _mended(file)


def _mended(file: BinaryIO) -> int:
    """See that an open file ends with a line break; where it ends now, in bytes.

    A file written by hand may end without one: it gets it. What a kill in the middle of a line left is cut off.
    """
    end = file.seek(0, os.SEEK_END)
    at, tail = end, b""
    while at and b"\n" not in tail:
        start = max(0, at - (1 << 16))
        file.seek(start)
        tail, at = file.read(at - start) + tail, start
    last = tail[tail.rfind(b"\n") + 1 :]
    if not last:
        return end
    try:
        json.loads(last)
    except ValueError:
        file.truncate(end - len(last))
        return end - len(last)
    file.write(b"\n")
    return end + 1
