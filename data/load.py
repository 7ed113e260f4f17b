"""Sources -> normalised rows, with a count of every row that was dropped."""

import gc
import pickle
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError
from ..progress import meter
from .formats import normalise
from .problems import Problem, RowProblems
from .report import DataReport
from .rows import Placed, RawRow, Row, Unusable, fingerprint, text_message
from .seen import Seen, number_of
from .sources import read_source
from .spec import DataSpec, RowKind, SourceSpec
from .turns import has_system

# (path of its source, pickled row)
_Packed = tuple[str, bytes]


@dataclass(frozen=True)
class Loaded:
    """Rows that were read.

    Attributes:
        rows: in training order.
        fingerprint: sha256 of their content, independent of where they were read from.
        report: what was read, dropped and noted.
    """

    rows: list[Row]
    fingerprint: str
    report: DataReport


def load_rows(spec: DataSpec, kind: RowKind, folders: Sequence[Path] = ()) -> Loaded:
    """Read, normalise, mix and count: all that `stream_rows` yields.

    Raises:
        UserError: as `stream_rows`.
    """
    report = DataReport()
    rows = list(stream_rows(spec, kind, folders, report))
    return Loaded(rows, fingerprint(rows), report)


def stream_rows(
    spec: DataSpec, kind: RowKind, folders: Sequence[Path], report: DataReport, where: str | None = None
) -> Iterator[Row]:
    """The rows in training order, one at a time: what has been yielded is not kept.

    Mixing: without weights (all equal) every row of every source is kept, one source after the other. With weights,
    each source's share of the result is its weight over the sum of the weights: as many rows as the scarcest source
    allows are drawn WITHOUT replacement, so the others are subsampled (seeded) and the result is shuffled (seeded).
    `spec.limit` takes the first rows of a single source, and a seeded sample of several. What is drawn from or shuffled
    is kept in memory, packed.

    Args:
        kind: "demo", "pair", "label" or "prompt". Pairs also serve as demonstrations (the chosen side), as labelled
            completions (both sides) and as prompts; demonstrations also serve as prompts.
        folders: where relative paths are looked up, in order; the package's own `data/` comes last.
        report: is filled; it is complete when the rows are at their end.
        where: the entry's place, for the line that counts several problems; by default the sources' paths.

    Raises:
        UserError: a source is missing, or no row is left. After the last row: rows with a problem that
            `spec.on_problem` says is an error, the first of them with their places and all of them counted.
    """
    order = Order(spec, kind, report, where)
    # what is in memory now stays there meanwhile: the collector need not walk over it at every thousandth row
    gc.freeze()
    try:
        for source, row in mixed_rows(spec, kind, folders, order.problems):
            if order.take(source, number_of(row.key), row.origin):
                yield row
    finally:
        gc.unfreeze()
    order.close()


class Order:
    """What is known of rows only in their order: which prompts have been seen before, how many there are, what is
    wrong with them.

    Args:
        report: is filled. where: as of `stream_rows`.
    """

    def __init__(self, spec: DataSpec, kind: RowKind, report: DataReport, where: str | None) -> None:
        self._spec, self._kind, self._report = spec, kind, report
        self.problems = RowProblems(spec.on_problem, report, where or spec.describe())
        report.sources |= {source.path: 0 for source in spec.sources}
        self._seen, self._repeated = Seen(), self.problems.answer("repeated")

    def take(self, source: str, number: int, origin: str) -> bool:
        """The next usable row; whether it is used.

        Args:
            source: the path of its source. number: its prompt's (see `seen.number_of`).
        """
        # A pair that serves as two labelled completions repeats its prompt on purpose.
        if self._seen.add(number) and self._kind != "label":
            if self._repeated != "keep":
                said = "its prompt has been seen before"
                error = UserError(origin, said, "leave one of them out")
                self.problems.met("repeated", error, "prompt seen before")
                return False
            self._report.note("prompt seen before", origin)
        self._report.sources[source] += 1
        self._report.used += 1
        return True

    def close(self) -> None:
        """No row follows. Raises as `stream_rows` does after the last row."""
        self.problems.raise_found()
        if not self._report.used:
            why = "; ".join(self._report.lines()[1:]) or "it is empty"
            raise UserError(self._spec.describe(), f"no usable row ({why})", "check the data")


def _read(
    source: SourceSpec, placed: Iterator[Placed], spec: DataSpec, kind: RowKind, problems: RowProblems
) -> Iterator[Row]:
    """The usable rows of one source, at most `source.limit`."""
    left = most(source, spec)
    for origin, raw in _progress(placed, source.path):
        problems.report.read += 1
        rows = usable(raw, kind, origin, source, spec.system)
        if isinstance(rows, Problem):
            problems.met(*rows)
            continue
        for row in rows:
            yield row
            left -= 1
            if left == 0:
                return


def most(source: SourceSpec, spec: DataSpec) -> int:
    """How many usable rows of the source are wanted; -1: all. Only the first rows matter when nothing is drawn from a
    larger pool."""
    enough = [limit for limit in (source.limit, spec.limit if len(spec.sources) == 1 else None) if limit is not None]
    return min(enough, default=-1)


def usable(raw: RawRow, kind: RowKind, origin: str, source: SourceSpec, system: str | None) -> list[Row] | Problem:
    """The rows of that kind that a row as it was read stands for."""
    try:
        rows = normalise(raw, kind, origin, source.columns)
    except Unusable as unusable:
        error = UserError(origin, unusable.reason, "correct the row, or leave it out")
        return Problem("unusable", error, unusable.reason)
    except UserError as error:
        return Problem("malformed", error)
    return rows if system is None else [_with_system(row, system) for row in rows]


def _with_system(row: Row, system: str) -> Row:
    if has_system(row.prompt):
        return row
    return replace(row, prompt=[text_message("system", system), *row.prompt])


def mixed_rows(
    spec: DataSpec, kind: RowKind, folders: Sequence[Path], problems: RowProblems
) -> Iterator[tuple[str, Row]]:
    """(the path of the source that it comes from, row), in training order."""
    report = problems.report

    def unreadable(error: UserError) -> None:
        report.read += 1
        problems.met("malformed", error)

    # opened before the first is read: a path that is wrong should not wait for it
    opened = [read_source(source, folders, report.note, unreadable) for source in spec.sources]
    readers = [_read(*each, spec, kind, problems) for each in zip(spec.sources, opened, strict=True)]
    paths = [source.path for source in spec.sources]
    weights = [source.weight for source in spec.sources]
    if as_they_stand(spec):
        for path, rows in zip(paths, readers, strict=True):
            yield from ((path, row) for row in rows)
        return
    # packed, a row takes a fraction of the memory that its dictionaries take
    packed = [[(path, pickle.dumps(row)) for row in rows] for path, rows in zip(paths, readers, strict=True)]
    for path, row in _drawn(spec, weights, packed):
        yield path, pickle.loads(row)


def as_they_stand(spec: DataSpec) -> bool:
    """Whether the rows of all sources follow one another as they are read, and none is drawn."""
    return len({source.weight for source in spec.sources}) == 1 and (len(spec.sources) == 1 or spec.limit is None)


def _drawn(spec: DataSpec, weights: list[float], per_source: list[list[_Packed]]) -> list[_Packed]:
    """What is taken of several sources, in its order."""
    if len(set(weights)) == 1:
        rows = [row for group in per_source for row in group]
        if spec.limit is None or spec.limit >= len(rows):
            return rows
        return random.Random(spec.seed).sample(rows, spec.limit)
    shares = [weight / sum(weights) for weight in weights]
    total = min(len(group) / share for group, share in zip(per_source, shares, strict=True))
    total = total if spec.limit is None else min(total, spec.limit)
    mixed: list[_Packed] = []
    for i, (group, share) in enumerate(zip(per_source, shares, strict=True)):
        # A generator of its own for each source: adding one leaves the others' draws alone.
        count = min(len(group), round(total * share))
        mixed += random.Random(f"{spec.seed}:{i}").sample(group, count)
    random.Random(spec.seed).shuffle(mixed)
    return mixed


def _progress(rows: Iterable[Placed], path: str) -> Iterator[Placed]:
    """The rows, with what is read shown if it takes longer than two seconds."""
    with meter(f"reading {path}, rows", None) as show:
        for done, row in enumerate(rows, 1):
            yield row
            show(done)
