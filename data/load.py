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
from .problems import RowProblems
from .report import DataReport
from .rows import Placed, Row, Unusable, fingerprint, text_message
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
    problems = RowProblems(spec.on_problem, report, where or spec.describe())
    report.sources |= {source.path: 0 for source in spec.sources}
    seen, repeated = Seen(), problems.answer("repeated")
    # what is in memory now stays there meanwhile: the collector need not walk over it at every thousandth row
    gc.freeze()
    try:
        for source, row in _mixed(spec, kind, folders, problems):
            # A pair that serves as two labelled completions repeats its prompt on purpose.
            if seen.add(number_of(row.key)) and kind != "label":
                if repeated != "keep":
                    said = "its prompt has been seen before"
                    problems.met("repeated", UserError(row.origin, said, "leave one of them out"), "prompt seen before")
                    continue
                report.note("prompt seen before", row.origin)
            report.sources[source] += 1
            report.used += 1
            yield row
    finally:
        gc.unfreeze()
    problems.raise_found()
    if not report.used:
        why = "; ".join(report.lines()[1:]) or "it is empty"
        raise UserError(spec.describe(), f"no usable row ({why})", "check the data")


def _read(
    source: SourceSpec, placed: Iterator[Placed], spec: DataSpec, kind: RowKind, problems: RowProblems
) -> Iterator[Row]:
    """The usable rows of one source, at most `source.limit`."""
    # Only the first rows matter when nothing is drawn from a larger pool.
    enough = [limit for limit in (source.limit, spec.limit if len(spec.sources) == 1 else None) if limit is not None]
    left = min(enough, default=-1)
    for origin, raw in _progress(placed, source.path):
        problems.report.read += 1
        try:
            rows = normalise(raw, kind, origin, source.columns)
        except Unusable as unusable:
            error = UserError(origin, unusable.reason, "correct the row, or leave it out")
            problems.met("unusable", error, unusable.reason)
            continue
        except UserError as error:
            problems.met("malformed", error)
            continue
        for row in rows:
            yield row if spec.system is None else _with_system(row, spec.system)
            left -= 1
            if left == 0:
                return


def _with_system(row: Row, system: str) -> Row:
    if has_system(row.prompt):
        return row
    return replace(row, prompt=[text_message("system", system), *row.prompt])


def _mixed(spec: DataSpec, kind: RowKind, folders: Sequence[Path], problems: RowProblems) -> Iterator[tuple[str, Row]]:
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
    if len(set(weights)) == 1 and (len(readers) == 1 or spec.limit is None):
        for path, rows in zip(paths, readers, strict=True):
            yield from ((path, row) for row in rows)
        return
    # packed, a row takes a fraction of the memory that its dictionaries take
    packed = [[(path, pickle.dumps(row)) for row in rows] for path, rows in zip(paths, readers, strict=True)]
    for path, row in _drawn(spec, weights, packed):
        yield path, pickle.loads(row)


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
