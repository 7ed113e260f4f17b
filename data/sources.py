"""Reading files, folders and hub datasets: every row with the place that it comes from.

What the rows mean is settled in `formats.py`.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TextIO, cast

from ..errors import UserError
from .json_rows import Bad, lines_of, read_json, read_lines
from .rows import Placed
from .spec import SourceSpec

# Takes (what, origin) of what a reader decided about a file by itself, so that it is said.
Note = Callable[[str, str], None]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_DELIMITERS = {";": "a semicolon", "\t": "a tab", "|": "a bar"}


def _unsaid(what: str, origin: str) -> None:
    """The note of a caller who wants none."""


def _refuse(error: UserError) -> None:
    """The answer of a caller for whom one bad row is too many."""
    raise error


def read_source(
    source: SourceSpec, folders: Sequence[Path], note: Note = _unsaid, bad: Bad = _refuse
) -> Iterator[Placed]:
    """The rows of one source, in order.

    Args:
        note: is told how a file was read, where that is not what its name says.
        bad: is told what is wrong with a single row.

    Raises:
        UserError: nothing is there, the format is unknown, or a line cannot be read.
    """
    return open_source(source, folders, note, bad)


def open_source(
    source: SourceSpec, folders: Sequence[Path], note: Note = _unsaid, bad: Bad = _refuse, *, lines: bool = False
) -> Iterator[tuple[str, Any]]:
    """The same; with `lines` a file of JSON lines gives each as the text that it is (see `json_rows.row_of`)."""
    found = find(source.path, folders)
    if found is None:
        if _suffix(Path(source.path)) or not _HUB_ID.fullmatch(source.path):
            looked = ", ".join(str(folder) for folder in _places(folders)) or "."
            raise UserError(source.path, f"no such file (looked in {looked})", "check the path")
        return _read_hub(source)
    if source.streaming:
        said = "streaming of what lies here, whose rows are read one at a time anyway"
        raise UserError(source.path, said, "leave `streaming` out")
    if found.is_dir():
        return _read_folder(found, source, note, bad, lines)
    if source.split is not None:
        raise UserError(source.path, f"split {source.split!r} of a single file", "leave `split` out")
    check_regular(found, source.path)
    return read_file(found, source.path, note, bad, lines=lines)


def find(path: str, folders: Sequence[Path]) -> Path | None:
    """`path` in the first of `folders` that has it, or in the package's own data; None if none does."""
    given = Path(path).expanduser()
    if given.is_absolute():
        return given if given.exists() else None
    return next((folder / given for folder in _places(folders) if (folder / given).exists()), None)


def files_of(source: SourceSpec, folders: Sequence[Path]) -> list[Path] | None:
    """The files that its rows can come from, in a fixed order; None where it is no file or folder here."""
    if (found := find(source.path, folders)) is None:
        return None
    if not found.is_dir():
        return [found] if found.is_file() else None
    every = sorted(file for file in found.rglob("*") if file.is_file() and not file.name.startswith("."))
    return [file for file in every if _suffix(file) or file.suffix == ".arrow"]


def _places(folders: Sequence[Path]) -> list[Path]:
    return [*folders, Path(__file__).parent]


def _suffix(path: Path) -> str | None:
    """The suffix of a known file format, ignoring `.gz`; None for an unknown one."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def check_regular(path: Path, shown: str) -> None:
    """Refuse what is neither a file nor a folder: data are read more than once, and a pipe or a device may never end.

    Raises:
        UserError: it is a pipe, a socket, a device, or a link that leads nowhere; or nothing is there.
    """
    if path.is_file():
        return
    if not path.exists() and not path.is_symlink():
        raise UserError(shown, "no such file", "check the path")
    kinds = {"fifo": "a pipe", "socket": "a socket", "char_device": "a device", "block_device": "a device"}
    what = next((words for name, words in kinds.items() if getattr(path, f"is_{name}")()), None)
    what = what or ("a link that leads nowhere" if path.is_symlink() else "no file")
    raise UserError(shown, f"is {what}, expected a file: it is read more than once", "write the rows to a file")


def read_file(
    path: Path, shown: str, note: Note = _unsaid, bad: Bad = _refuse, *, lines: bool = False
) -> Iterator[tuple[str, Any]]:
    """The rows of one file.

    Args:
        shown: the name of the file in error messages.
        note: is told how the file was read, where that is not what its name says.
        bad: is told what is wrong with a single row.
        lines: of JSON lines, give the texts.
    """
    check_regular(path, shown)
    suffix = _suffix(path)
    if suffix is None:
        raise UserError(shown, f"unknown format {path.suffix!r}", f"use one of {', '.join(SUFFIXES)} (also with .gz)")
    opener, encoding = gzip.open if path.name.lower().endswith(".gz") else open, "utf-8-sig"
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path, shown)
            return
        # tables come from spreadsheets, some of which save UTF-16; JSON is UTF-8 by its standard (RFC 8259)
        with opener(path, "rb") as raw:
            table = suffix in (".csv", ".tsv")
            encoding = _encoding(cast(IO[bytes], raw)) if table else "utf-8-sig"
        if encoding != "utf-8-sig":
            note(f"read as {encoding}, as it is not UTF-8", shown)
        with (
            opener(path, "rb") as raw,
            io.TextIOWrapper(cast(IO[bytes], raw), encoding=encoding, newline="") as text,
        ):
            if suffix in (".csv", ".tsv"):
                yield from _read_csv(text, shown, "\t" if suffix == ".tsv" else ",", note, bad)
            elif suffix == ".json":
                yield from read_json(text, shown, bad)
            else:
                yield from lines_of(text, shown) if lines else read_lines(text, shown, bad)
    except UnicodeDecodeError as error:
        number = _undecodable(path, opener) if encoding == "utf-8-sig" else None
        shown = shown if number is None else f"{shown}:{number}"
        like = ", but perhaps Windows-1252 (cp1252) as spreadsheets save" if suffix in (".csv", ".tsv") else ""
        problem = f"not UTF-8 ({error.reason}){like}"
        raise UserError(shown, problem, "save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(shown, f"cannot be read ({error})", "check the file") from error


def _undecodable(path: Path, opener: Callable[..., Any]) -> int | None:
    """The first line that is not UTF-8; None where that is the first of all: the whole file is something else."""
    with opener(path, "rb") as raw, suppress(OSError, EOFError, zlib.error):
        for number, line in enumerate(raw, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number if number > 1 else None
    return None


def _encoding(raw: IO[bytes]) -> str:
    """UTF-8 unless the file's first bytes say UTF-16."""
    return _MARKS.get(raw.read(2), "utf-8-sig")


def _read_csv(text: TextIO, shown: str, delimiter: str, note: Note, bad: Bad) -> Iterator[Placed]:
    # Replies are longer than the csv module's 128 KiB at times.
    csv.field_size_limit(2**31 - 1)
    header = text.readline()
    if delimiter not in header:
        # Another delimiter, as spreadsheets write it where the comma is the decimal mark; or one column.
        delimiter = next((each for each in (*_DELIMITERS, ",") if each in header), delimiter)
        if delimiter in _DELIMITERS:
            note(f"read with {_DELIMITERS[delimiter]} between the cells", shown)
    reader = csv.DictReader(itertools.chain([header], text), delimiter=delimiter, strict=True)
    start = 2
    try:
        for row in reader:
            origin = f"{shown}:{start}"
            if None in row or None in row.values():
                problem = f"not as many cells as the header's {len(reader.fieldnames or ())} columns"
                bad(UserError(origin, problem, "quote cells that hold the delimiter or a line break"))
            else:
                yield origin, dict(row)
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{shown}:{start}", f"broken CSV ({error})", "correct the quotes") from error


def _read_parquet(path: Path, shown: str) -> Iterator[Placed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        packed = path.name.lower().endswith(".gz")
        file = pq.ParquetFile(pa.BufferReader(gzip.decompress(path.read_bytes())) if packed else path)
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{shown}: row {number}", row
    except pa.ArrowException as error:
        raise UserError(shown, f"not a readable Parquet file ({error})", "write it again") from error


def _read_folder(folder: Path, source: SourceSpec, note: Note, bad: Bad, lines: bool) -> Iterator[tuple[str, Any]]:
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        yield from _read_saved(folder, source)
        return
    # what only looks like a file is not passed over in silence: `read_file` says what it is
    files = sorted(f for f in folder.rglob("*") if not f.is_dir() and _suffix(f) and not f.name.startswith("."))
    names = {*_SPLIT_NAMES, source.split}
    named = {f: _split_of(f.relative_to(folder), names) for f in files}
    wanted = source.split or ("train" if "train" in named.values() else None)
    if wanted is not None:
        files = [f for f in files if named[f] == wanted]
    if not files:
        asked = f" of the split {source.split!r}" if source.split else ""
        raise UserError(source.path, f"no data file{asked} in that folder", f"files end in {', '.join(SUFFIXES)}")
    for file in files:
        shown = f"{source.path.rstrip('/')}/{file.relative_to(folder).as_posix()}"
        yield from read_file(file, shown, note, bad, lines=lines)


def _split_of(path: Path, names: set[str | None]) -> str | None:
    """The split named by a file's folder or name: `test/0.jsonl`, `train-00000-of-00002.parquet`."""
    words = [*path.parts[:-1], re.split(r"[-_.]", path.name)[0]]
    return next((word for word in words if word in names), None)


def _read_saved(folder: Path, source: SourceSpec) -> Iterator[Placed]:
    from datasets import DatasetDict, load_from_disk

    _check_inside(folder, source.path)
    data: Any = load_from_disk(folder)
    if isinstance(data, DatasetDict):
        names = [str(name) for name in data]
        split = source.split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
        if split not in names:
            asked = f"no split {source.split!r}" if source.split else "several splits"
            raise UserError(source.path, f"{asked}; it has {', '.join(names)}", "name one as `split`")
        yield from _rows_of(data[split], f"{source.path}[{split}]")
        return
    if source.split not in (None, str(data.split)):
        raise UserError(source.path, f"no split {source.split!r}: it is one dataset", "leave `split` out")
    yield from _rows_of(data, source.path)


def _check_inside(folder: Path, shown: str) -> None:
    """The files that a saved dataset names are its own.

    Raises:
        UserError: one lies elsewhere.
    """
    named = [*_listed(folder / "dataset_dict.json", "splits")]
    for state in (folder / "state.json", *sorted(folder.glob("*/state.json"))):
        named += [each.get("filename") for each in _listed(state, "_data_files") if isinstance(each, dict)]
    for each in named:
        if not isinstance(each, str) or Path(each).name != each or "\\" in each or each == "..":
            raise UserError(shown, f"names {each!r}, which is no file of its own", "save the dataset again")


def _listed(file: Path, key: str) -> list[Any]:
    """A list in a JSON file; empty where there is none, of which whoever needs it says more."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return []
    return found if isinstance(found, list) else []


def _read_hub(source: SourceSpec) -> Iterator[Placed]:
    from datasets import load_dataset

    split = source.split or "train"
    streaming: dict[str, Any] = {"streaming": True} if source.streaming else {}
    try:
        data = load_dataset(source.path, source.name, split=split, revision=source.revision, **streaming)
        rows = iter(data)
        # of a stream nothing has been read yet: the first row says whether it can be
        first = next(rows, None)
    except Exception as error:
        # The hub client raises some twenty classes (offline, gated, unknown id, unknown split, ...).
        raise _not_from_hub(source, error, "neither a file or folder here, nor readable from the hub") from error
    shown, number = f"{source.path}[{split}]", 0
    while first is not None:
        number += 1
        yield f"{shown}: row {number}", cast(dict[str, Any], first)
        try:
            first = next(rows, None)
        except Exception as error:
            raise _not_from_hub(source, error, f"the hub's stream ends after row {number}") from error


def _not_from_hub(source: SourceSpec, error: Exception, said: str) -> UserError:
    detail = " ".join(str(error).split())[:200] or type(error).__name__
    remedy = "check the name and `split`, go online, or download it and give the folder's path"
    return UserError(source.path, f"{said} ({detail})", remedy)


def _rows_of(data: Any, shown: str) -> Iterator[Placed]:
    for number, row in enumerate(data, start=1):
        yield f"{shown}: row {number}", row
