"""Rows as they lie in their sources, a chunk at a time: nothing of them has been looked at yet."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .encode import CHUNK
from .load import as_they_stand, mixed_rows
from .problems import RowProblems
from .rows import RawRow, Row
from .sources import open_source
from .spec import DataSpec, RowKind, SourceSpec


class Noted(NamedTuple):
    """What a reader decided about a file by itself."""

    what: str


class Broken(NamedTuple):
    """Where a source cannot be read any further; it counts only if reading comes so far."""

    error: Exception


Unread = str | RawRow | Row | None
"""A line of JSON, a row as it was read, one that has been read and mixed; None where a `Said` stands."""
Said = UserError | Noted | Broken
"""What is known of a place without a row that can be looked at."""


class Chunk(NamedTuple):
    """Neighbours in training order.

    sources: of each item, the place of its source; one source where rows have not been read. items: (origin, row).
    said: by the place of an item, what stands there instead.
    """

    sources: list[int]
    items: list[tuple[str, Unread]]
    said: dict[int, Said]


def chunks_of(
    spec: DataSpec, kind: RowKind, folders: Sequence[Path], problems: RowProblems, ended: set[int]
) -> Iterator[Chunk]:
    """The rows of all sources in training order.

    Args:
        problems: is told of those of rows that have to be read here, as they are mixed.
        ended: the sources of which no more rows are wanted; looked at now and then.

    Raises:
        UserError: a source is missing.
    """
    if not as_they_stand(spec):
        places = {source.path: place for place, source in enumerate(spec.sources)}
        mixed = mixed_rows(spec, kind, folders, problems)
        while drawn := list(islice(mixed, CHUNK)):
            yield Chunk([places[path] for path, _ in drawn], [(row.origin, row) for _, row in drawn], {})
        return
    # opened before the first is read: a path that is wrong should not wait for it
    opened = [_placed(source, folders) for source in spec.sources]
    for place, rows in enumerate(opened):
        while place not in ended and (found := list(islice(rows, CHUNK))):
            said = {at: each for at, (_, each) in enumerate(found) if isinstance(each, Said)}
            items = [(origin, None if isinstance(each, Said) else each) for origin, each in found]
            yield Chunk([place] * len(items), items, said)


def _placed(source: SourceSpec, folders: Sequence[Path]) -> Iterator[tuple[str, Unread | Said]]:
    """The source's rows, and between them what its reader says."""
    said: list[tuple[str, Said]] = []
    reader = open_source(
        source,
        folders,
        lambda what, origin: said.append((origin, Noted(what))),
        lambda error: said.append((error.where, error)),
        lines=True,
    )

    def placed() -> Iterator[tuple[str, Unread | Said]]:
        try:
            for row in reader:
                yield from said
                said.clear()
                yield row
        except Exception as error:
            said.append(("", Broken(error)))
        yield from said

    return placed()
