"""Sources -> encoded rows, a chunk at a time: however many rows there are, a few thousand are in memory.

What can be said of a chunk alone (reading its lines, normalising, the template, tokens) is said by `_Work`, in this
process or in several. What is known only in order (which prompts repeat, what is counted, where a limit ends the
reading) is settled by `_Replay`, chunk after chunk, so that nothing depends on how many processes there are.
"""

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..errors import UserError
from ..progress import duration, meter
from .encode import Counts, Encoder, Outcome, Shape
from .json_rows import row_of
from .load import Order, most, usable
from .problems import Problem
from .report import DataReport
from .rows import Fingerprint, RawRow, Row, content_of
from .seen import number_of
from .sources import files_of
from .spec import DataSpec, RowKind
from .split import check_sides, prompt_position
from .unread import Broken, Chunk, Noted, Unread, chunks_of
from .workers import Workers, processes_wanted

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

ORIGIN = "origin"
"""The column that says where an encoded row comes from."""
_ALONE = 16
"""So many chunks are worked on by this process alone: where there are no more, others would take longer to start."""


@dataclass(frozen=True)
class Task:
    """What is to be made of which rows: those of `kind` in the given shape."""

    spec: DataSpec
    kind: RowKind
    shape: Shape
    tokenizer: "PreTrainedTokenizerBase"

    def work(self) -> "_Work":
        """What a process does with each chunk."""
        return _Work(self)


class _Known(NamedTuple):
    """What is known of one normalised row.

    number: of its prompt. held: whether it is kept out of training. content: what its fingerprint is made of.
    problem: (kind, place, what is wrong, remedy, reason): an exception of ours does not travel.
    """

    number: int
    held: bool
    content: bytes
    encoded: bool
    margin: bool
    label: bool | None
    remarks: tuple[str, ...]
    problem: tuple[str, str, str, str, str | None] | None

    def outcome(self) -> Outcome:
        problem = None if self.problem is None else _problem(self.problem)
        return Outcome({} if self.encoded else None, self.remarks, problem, self.margin, self.label)


class Looked(NamedTuple):
    """What became of a chunk.

    found: of each item, its rows, or why it cannot be used; None of an empty line. train, held: Arrow record batches.
    """

    found: "list[list[_Known] | tuple[str, str, str, str, str | None] | None]"
    train: bytes
    held: bytes


class _Work:
    """The part of the work that looks at one chunk alone."""

    def __init__(self, task: Task) -> None:
        self.task, self.encoder = task, Encoder(task.shape, task.tokenizer, task.spec)
        self.schema = self._table([]).schema

    def __call__(self, chunk: tuple[list[int], list[tuple[str, Unread]]]) -> Looked:
        found = [self._rows(source, *item) for source, item in zip(*chunk, strict=True)]
        outcomes = iter(self.encoder.encode([row for each in found if isinstance(each, list) for row in each]))
        sides: tuple[list[Any], list[Any]] = ([], [])
        known: list[list[_Known] | tuple[str, str, str, str, str | None] | None] = []
        for each in found:
            if isinstance(each, Problem):
                known.append(_packed(each))
            elif each is None:
                known.append(None)
            else:
                known.append([self._known(row, next(outcomes), sides) for row in each])
        return Looked(known, *(_serialised(self._table(side)) for side in sides))

    def _rows(self, source: int, origin: str, row: Unread) -> list[Row] | Problem | None:
        """The rows that an item stands for."""
        if isinstance(row, Row):
            return [row]
        raw: RawRow | None
        if isinstance(row, str):
            try:
                raw = row_of(row, origin)
            except UserError as error:
                return Problem("malformed", error)
        else:
            raw = row
        if raw is None:
            return None
        task = self.task
        return usable(raw, task.kind, origin, task.spec.sources[source], task.spec.system)

    def _known(self, row: Row, outcome: Outcome, sides: tuple[list[Any], list[Any]]) -> _Known:
        spec = self.task.spec
        held = spec.held_out > 0 and prompt_position(row, spec.seed) < spec.held_out
        if outcome.encoded is not None:
            sides[held].append((outcome.encoded, row.origin))
        problem = None if outcome.problem is None else _packed(outcome.problem)
        used = outcome.encoded is not None
        return _Known(
            number_of(row.key), held, content_of(row), used, outcome.margin, outcome.label, outcome.remarks, problem
        )

    def _table(self, rows: list[tuple[dict[str, Any], str]]) -> "pa.Table":
        import pyarrow as pa

        table = self.encoder.table([encoded for encoded, _ in rows])
        return table.append_column(ORIGIN, pa.array([origin for _, origin in rows], pa.string()))


def _packed(problem: Problem) -> tuple[str, str, str, str, str | None]:
    error = problem.error
    return problem.kind, error.where, error.problem, error.remedy, problem.reason


def _problem(packed: tuple[str, str, str, str, str | None]) -> Problem:
    kind, where, said, remedy, reason = packed
    return Problem(kind, UserError(where, said, remedy), reason)


def _serialised(table: "pa.Table") -> bytes:
    if not table.num_rows:
        return b""
    (batch,) = table.combine_chunks().to_batches()
    return batch.serialize().to_pybytes()


class Sink(Protocol):
    """Takes encoded rows."""

    def write(self, batch: "pa.RecordBatch") -> None: ...


class Sinks(Protocol):
    """Where the rows to train on and those held out go."""

    def open(self, name: str, schema: "pa.Schema") -> Sink: ...


@dataclass
class Streamed:
    """What was found on the way.

    Attributes:
        fingerprint: as `load.Loaded` has it. margins: whether every pair has one.
        read: of all rows; train, held: of the encoding of either part (None where nothing is held out).
    """

    fingerprint: str
    margins: dict[str, bool]
    read: DataReport
    train: DataReport
    held: DataReport | None


TRAIN, HELD = "train", "held_out"


class _Replay:
    """The part of the work that goes in order."""

    def __init__(self, task: Task, where: str, sinks: Sinks, schema: "pa.Schema") -> None:
        self.spec, self.schema, self.sinks = task.spec, schema, sinks
        self.report = DataReport()
        self.order = Order(task.spec, task.kind, self.report, where)
        self.content = Fingerprint()
        self.counts = [Counts(task.shape, task.spec, named=False) for _ in (TRAIN, HELD)]
        self.ended: set[int] = set()
        self._left = [most(source, task.spec) for source in task.spec.sources]
        self._sinks: dict[str, Sink] = {}

    def take(self, chunk: Chunk, looked: Looked) -> None:
        """The next chunk."""
        kept: tuple[list[bool], list[bool]] = ([], [])
        for place, (origin, row) in enumerate(chunk.items):
            source = chunk.sources[place]
            if (said := chunk.said.get(place)) is not None and source not in self.ended:
                self._hear(said, origin)
            found = looked.found[place]
            if found is None:
                continue
            if isinstance(found, list):
                self._rows(found, source, origin, kept, read=not isinstance(row, Row))
            elif source not in self.ended:
                self.report.read += 1
                self.order.problems.met(*_problem(found))
        for name, batch, keep in zip((TRAIN, HELD), (looked.train, looked.held), kept, strict=True):
            self._write(name, batch, keep)

    def _hear(self, said: UserError | Noted | Broken, origin: str) -> None:
        if isinstance(said, Broken):
            raise said.error
        if isinstance(said, Noted):
            self.report.note(said.what, origin)
            return
        self.report.read += 1
        self.order.problems.met("malformed", said)

    def _rows(
        self, rows: list[_Known], source: int, origin: str, kept: tuple[list[bool], list[bool]], *, read: bool
    ) -> None:
        self.report.read += read and source not in self.ended
        for row in rows:
            used = source not in self.ended and self.order.take(self.spec.sources[source].path, row.number, origin)
            if used:
                self.content.update(row.content)
                self.counts[row.held].take(origin, row.outcome())
            if row.encoded:
                kept[row.held].append(used)
            if read and source not in self.ended:
                self._left[source] -= 1
                if self._left[source] == 0:
                    self.ended.add(source)

    def _write(self, name: str, batch: bytes, keep: list[bool]) -> None:
        import pyarrow as pa

        if not any(keep):
            return
        rows = pa.ipc.read_record_batch(pa.py_buffer(batch), self.schema)
        if name not in self._sinks:
            self._sinks[name] = self.sinks.open(name, self.schema)
        self._sinks[name].write(rows if all(keep) else rows.filter(pa.array(keep)))

    def close(self) -> Streamed:
        """No row follows. Raises as `stream_rows` and the encoders do."""
        self.order.close()
        train, held = self.counts
        if not train.report.read:
            check_sides(self.spec.held_out, 0, held.report.read)
        train.close()
        if self.spec.held_out > 0:
            check_sides(self.spec.held_out, train.report.read, held.report.read)
            held.close()
        margins = {TRAIN: train.margins, HELD: held.margins}
        second = held.report if self.spec.held_out > 0 else None
        return Streamed(self.content.hexdigest(), margins, self.report, train.report, second)


def encode_sources(task: Task, folders: Sequence[Path], where: str, sinks: Sinks) -> Streamed:
    """Read, normalise, mix, count, split and encode.

    Args:
        where: the data entry's place, for errors. sinks: get the rows, with the column `origin`.

    Raises:
        UserError: as `stream_rows` and the encoder of the shape do, with the same words.
    """
    here = task.work()
    replay = _Replay(task, where, sinks, here.schema)
    show = _Shown(_characters(task.spec, folders))
    chunks = chunks_of(task.spec, task.kind, folders, replay.order.problems, replay.ended)
    # what is in memory now stays there meanwhile: the collector need not walk over it at every thousandth row
    gc.freeze()
    try:
        with meter(f"encoding {task.spec.describe()}, rows", None) as bar:
            for chunk, looked in _looked_at(task, here, chunks):
                replay.take(chunk, looked)
                bar(replay.report.read, show.note(chunk, replay.report.read))
    finally:
        gc.unfreeze()
    return replay.close()


class _Shown:
    """How fast it goes, and how long it will take; `characters` are to be read, 0 where nobody knows how many."""

    def __init__(self, characters: int) -> None:
        self._all, self._began, self._done = characters, time.monotonic(), 0

    def note(self, chunk: Chunk, rows: int) -> str:
        """Behind the chunk, `rows` in all."""
        self._done += sum(len(row) for _, row in chunk.items if isinstance(row, str))
        seconds = max(time.monotonic() - self._began, 1e-9)
        left = seconds * (self._all - self._done) / self._done if 0 < self._done < self._all else None
        return f"({rows / seconds:,.0f} a second{'' if left is None else f', about {duration(left)} left'})"


def _looked_at(task: Task, here: _Work, chunks: Iterator[Chunk]) -> Iterable[tuple[Chunk, Looked]]:
    """The chunks in order with what became of each, by as many processes as are worth it."""
    for chunk in islice(chunks, _ALONE):
        yield chunk, here((chunk.sources, chunk.items))
    if (first := next(chunks, None)) is None:
        return
    rest = chain([first], chunks)
    if (count := processes_wanted()) < 2:
        yield from ((chunk, here((chunk.sources, chunk.items))) for chunk in rest)
        return
    with Workers(count, task) as workers:
        while not workers.ready() and (chunk := next(rest, None)) is not None:
            yield chunk, here((chunk.sources, chunk.items))
        yield from workers.done((chunk, (chunk.sources, chunk.items)) for chunk in rest)


def _characters(spec: DataSpec, folders: Sequence[Path]) -> int:
    """About how many there are to read, where it is files of JSON lines alone; 0 where nobody knows."""
    files = [file for source in spec.sources for file in files_of(source, folders) or [Path()]]
    if spec.limit is not None or any(source.limit for source in spec.sources):
        return 0
    lines = all(file.suffix in (".jsonl", ".ndjson") for file in files)
    return sum(file.stat().st_size for file in files) if lines else 0
