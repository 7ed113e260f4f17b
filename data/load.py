"""Sources -> normalised rows, with a count of every row that was dropped."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError
from ..progress import meter
from .formats import normalise
from .report import DataReport
from .rows import Row, Unusable, fingerprint, prompt_key, text_message
from .sources import Placed, read_source
from .spec import DataSpec, RowKind, SourceSpec
from .turns import has_system


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
    """Read, normalise, mix and count.

    Mixing: without weights (all equal) every row of every source is kept, one source after the other. With weights,
    each source's share of the result is its weight over the sum of the weights: as many rows as the scarcest source
    allows are drawn WITHOUT replacement, so the others are subsampled (seeded) and the result is shuffled (seeded).
    `spec.limit` takes the first rows of a single source, and a seeded sample of several.

    Args:
        kind: "demo", "pair", "label" or "prompt". Pairs also serve as demonstrations (the chosen side), as labelled
            completions (both sides) and as prompts; demonstrations also serve as prompts.
        folders: where relative paths are looked up, in order; the package's own `data/` comes last.

    Raises:
        UserError: a source is missing, a row cannot be read or lacks a field, or no row is left.
    """
    report = DataReport()
    per_source = [_read(source, spec, kind, folders, report) for source in spec.sources]
    rows, taken = _mix(spec, per_source)
    for source, count in zip(spec.sources, taken, strict=True):
        report.sources[source.path] = report.sources.get(source.path, 0) + count
    if not rows:
        why = "; ".join(report.lines()[1:]) or "it is empty"
        raise UserError(spec.describe(), f"no usable row ({why})", "check the data")
    seen: set[str] = set()
    for row in rows:
        key = prompt_key(row.prompt)
        # A pair that serves as two labelled completions repeats its prompt on purpose.
        if key in seen and kind != "label":
            report.note("prompt seen before", row.origin)
        seen.add(key)
    report.used = len(rows)
    return Loaded(rows, fingerprint(rows), report)


def _read(source: SourceSpec, spec: DataSpec, kind: RowKind, folders: Sequence[Path], report: DataReport) -> list[Row]:
    """The usable rows of one source, at most `source.limit`."""
    # Only the first rows matter when nothing is drawn from a larger pool.
    enough = [limit for limit in (source.limit, spec.limit if len(spec.sources) == 1 else None) if limit is not None]
    limit = min(enough, default=None)
    rows: list[Row] = []
    for origin, raw in _progress(read_source(source, folders, report.note), source.path):
        report.read += 1
        try:
            rows += [_with_system(row, spec.system) for row in normalise(raw, kind, origin, source.columns)]
        except Unusable as unusable:
            report.drop(unusable.reason, origin)
        if limit is not None and len(rows) >= limit:
            return rows[:limit]
    return rows


def _with_system(row: Row, system: str | None) -> Row:
    if system is None or has_system(row.prompt):
        return row
    return replace(row, prompt=[text_message("system", system), *row.prompt])


def _mix(spec: DataSpec, per_source: list[list[Row]]) -> tuple[list[Row], list[int]]:
    """(rows, how many of them come from each source)."""
    weights = [source.weight for source in spec.sources]
    if len(set(weights)) == 1:
        rows = [row for group in per_source for row in group]
        if len(per_source) == 1 or spec.limit is None or spec.limit >= len(rows):
            return rows, [len(group) for group in per_source]
        numbered = [(i, row) for i, group in enumerate(per_source) for row in group]
        drawn = random.Random(spec.seed).sample(numbered, spec.limit)
        return [row for _, row in drawn], [sum(i == j for i, _ in drawn) for j in range(len(per_source))]
    shares = [weight / sum(weights) for weight in weights]
    total = min(len(group) / share for group, share in zip(per_source, shares, strict=True))
    total = total if spec.limit is None else min(total, spec.limit)
    mixed: list[Row] = []
    counts = []
    for i, (group, share) in enumerate(zip(per_source, shares, strict=True)):
        # A generator of its own for each source: adding one leaves the others' draws alone.
        count = min(len(group), round(total * share))
        mixed += random.Random(f"{spec.seed}:{i}").sample(group, count)
        counts.append(count)
    random.Random(spec.seed).shuffle(mixed)
    return mixed, counts


def _progress(rows: Iterable[Placed], path: str) -> Iterator[Placed]:
    """The rows, with what is read shown if it takes longer than two seconds."""
    with meter(f"reading {path}, rows", None) as show:
        for done, row in enumerate(rows, 1):
            yield row
            show(done)
