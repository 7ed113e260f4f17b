"""Encoded rows in a folder: written a chunk at a time, read as a memory-mapped dataset, which takes no memory."""

import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

from ..files import write_whole
from .stream import HELD, ORIGIN, TRAIN, Sink, Streamed

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

ABOUT = "about.json"
"""Beside the rows: what was counted, and how large each file is. Written last."""
FORMAT = 1


class Origins(Sequence[str]):
    """Where each row comes from, read from the file when it is asked for."""

    def __init__(self, rows: "Dataset") -> None:
        self._rows: Any = rows.select_columns([ORIGIN])

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        return self._rows[place][ORIGIN]

    def __iter__(self) -> Iterator[str]:
        return (row[ORIGIN] for row in self._rows)


@dataclass(frozen=True)
class Stored:
    """Encoded rows that lie in a folder.

    Attributes:
        train, held: memory-mapped; `held` is None where nothing is held out.
        origins: of `train`.
        fingerprint: of the rows' content (see `load.Loaded`).
        reports: by `read`, `train`, `held_out`: the counts as numbers; lines: the same in words.
    """

    train: "Dataset"
    held: "Dataset | None"
    origins: Sequence[str]
    fingerprint: str
    reports: dict[str, dict[str, Any]]
    lines: dict[str, list[str]]


class Files:
    """Arrow files in a folder, one a part, in the streaming format that `datasets` maps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}

    def open(self, name: str, schema: "pa.Schema") -> Sink:
        import pyarrow as pa

        file = pa.OSFile(str(self.folder / f"{name}.arrow"), "wb")
        writer = _Writer(file, pa.ipc.new_stream(file, schema))
        self._open[name] = writer
        return writer

    def close(self) -> None:
        for each in self._open.values():
            each.close()
        self._open.clear()


class _Writer:
    def __init__(self, file: Any, stream: Any) -> None:
        self._file, self._stream = file, stream

    def write(self, batch: "pa.RecordBatch") -> None:
        self._stream.write_batch(batch)

    def close(self) -> None:
        self._stream.close()
        self._file.close()


def derived(rows: "Dataset", name: str, tables: Callable[[], Iterable["pa.Table"]]) -> "Dataset":
    """Rows made of others, a piece at a time: in a file beside those if they lie in one, and else in memory.

    Args:
        name: says all that they depend on besides the rows; the same name stands for the same rows.
        tables: makes them, in order.
    """
    import pyarrow as pa
    from datasets import Dataset

    if not rows.cache_files:
        return Dataset(pa.concat_tables(tables()))
    source = Path(rows.cache_files[0]["filename"])
    target = source.with_name(f"{source.stem}-{name}.arrow")
    with suppress(OSError, pa.ArrowException):
        if target.is_file() and len(found := Dataset.from_file(str(target))) == len(rows):
            return found
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        pieces = iter(tables())
        first = next(pieces)
        with pa.OSFile(str(beside), "wb") as file, pa.ipc.new_stream(file, first.schema) as stream:
            for each in chain([first], pieces):
                stream.write_table(each)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    return Dataset.from_file(str(target))


@contextmanager
def files(folder: Path) -> Generator[Files]:
    """The files of a folder, closed at the end."""
    made = Files(folder)
    try:
        yield made
    finally:
        made.close()


def describe(folder: Path, streamed: Streamed) -> None:
    """Write what was found beside the rows: from then on they are whole."""
    parts = {"read": streamed.read, TRAIN: streamed.train, **({HELD: streamed.held} if streamed.held else {})}
    about = {
        "format": FORMAT,
        "fingerprint": streamed.fingerprint,
        "margins": streamed.margins,
        "bytes": {file.name: file.stat().st_size for file in sorted(folder.glob("*.arrow"))},
        "reports": {name: report.as_dict() for name, report in parts.items()},
        "lines": {name: report.lines() for name, report in parts.items()},
    }
    write_whole(folder / ABOUT, json.dumps(about))


def open_stored(folder: Path) -> Stored | None:
    """The rows of a folder; None where they are not whole: nothing of them may be used."""
    from datasets import Dataset

    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in about["bytes"]}
        if about["format"] != FORMAT or sizes != about["bytes"]:
            return None
        names = [TRAIN, *([HELD] if HELD in about["reports"] else [])]
        found = {name: Dataset.from_file(str(folder / f"{name}.arrow")) for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if any(len(found[name]) != about["reports"][name]["used"] for name in names):
        return None
    rows = {name: _without(each, about["margins"][name]) for name, each in found.items()}
    return Stored(
        rows[TRAIN], rows.get(HELD), Origins(found[TRAIN]), about["fingerprint"], about["reports"], about["lines"]
    )


def _without(rows: "Dataset", margins: bool) -> "Dataset":
    """The columns that a trainer reads: a margin only where every pair has one."""
    more = [ORIGIN, *(["margin"] if "margin" in rows.column_names and not margins else [])]
    return cast("Dataset", rows.remove_columns(more))
