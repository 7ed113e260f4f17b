"""Preferences that somebody else collected: reading them, and their win-rates (`eval winrate --annotations`).

A file holds rows of our own, `{"prompt": id, "baseline_length": int, "model_length": int, "preference": 1..2}`, or rows
as public tools write them (`data/comparisons.py`): AlpacaEval, Chatbot Arena, Arena-Hard, MT-bench.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.compared import Comparison, said_nothing
from ..data.comparisons import COMPARED, compared_format
from ..data.sources import read_file
from ..errors import UserError, nearest
from ..progress import say
from ..values import is_finite, is_number, plain
from .statistics.intervals import ratio_se, unit_totals
from .statistics.length_control import control_length

_OWN = ("prompt", "baseline_length", "model_length", "preference")
_SHOWN = 12


@dataclass(frozen=True)
class Annotations:
    """One model's comparisons with the baseline.

    Attributes:
        model: its name in the file; the file's stem where the file names none.
        baseline: its name; None where neither the file nor the user says it.
        prompts: [N] the prompts' ids.
        outcomes: [N] in [0, 1], 1 where the model wins; nan where there is no verdict.
        differences: [N] length of the model's reply minus the baseline's; nan where the lengths are unknown.
    """

    model: str
    baseline: str | None
    prompts: list[Hashable]
    outcomes: np.ndarray
    differences: np.ndarray


@dataclass(frozen=True)
class _Judged:
    """A comparison with what else a win-rate needs. baseline_first: whether the format says that the first is it."""

    comparison: Comparison
    lengths: tuple[float, float] | None
    baseline_first: bool


def read_annotations(path: Path, baseline: str | None = None) -> list[Annotations]:
    """The comparisons of one file, one entry for each model that was compared with the baseline.

    Args:
        baseline: its name; None: the one that the format or all rows agree on.

    Raises:
        UserError: no rows, a row that is not what it should be, no verdict at all, or no way to tell the baseline.
    """
    stem = Path(path.name.removesuffix(".gz")).stem
    judged = [_read(row, origin, stem) for origin, row in read_file(path, str(path))]
    if not judged:
        raise UserError(str(path), "holds no rows", "write one annotation per line")
    settled = _baseline(judged, baseline, str(path))
    by_model: dict[str, list[tuple[Hashable, float, float]]] = {}
    beside = 0
    for each in judged:
        model, outcome, longer = _against(each, settled)
        if model is None:
            beside += 1
        else:
            by_model.setdefault(model, []).append((each.comparison.prompt, outcome, longer))
    if beside:
        say(f"{path}: {beside} of {len(judged)} rows do not compare a model with {settled}, and are left out")
    found = [
        Annotations(model, settled or baseline, [row[0] for row in rows], *np.array([row[1:] for row in rows]).T)
        for model, rows in by_model.items()
    ]
    if not any(np.isfinite(each.outcomes).any() for each in found):
        said = f"holds no verdict: all {len(judged) - beside} preferences are null"
        raise UserError(str(path), said, "ask the annotator again, or see that it could answer")
    return found


def generators(path: Path) -> set[str]:
    """The models that a file of annotations compares, by their names in it.

    Raises:
        UserError: a row that is not what it should be.
    """
    stem = Path(path.name.removesuffix(".gz")).stem
    read = (_read(row, origin, stem).comparison.models for origin, row in read_file(path, str(path)))
    return {name for models in read for name in models if name is not None}


def read_preference(row: dict[str, Any], origin: str) -> float:
    """The row's `preference`, a number from 1 to 2."""
    value = _field(row, "preference", origin)
    if not is_number(value) or not 1 <= value <= 2:
        remedy = "2 says that the second reply wins (in annotations the model's), 1 the first, 1.5 neither"
        raise UserError(origin, f"preference is {value!r}, expected a number from 1 to 2", remedy)
    return float(value)


def annotation_rows(paths: Sequence[Path], seed: int = 0, baseline: str | None = None) -> list[dict[str, Any]]:
    """Win-rates of the files' models, in the files' order; rates are fractions of 1.

    Returns:
        Rows of model, baseline, n (prompts with a verdict), unparsable (rows without one), win_rate, standard_error
        (over prompts), length_controlled_win_rate (fitted to all models jointly; None where the file has no lengths).
    """
    found = [each for path in paths for each in read_annotations(path, baseline)]
    measured = [each for each in found if np.isfinite(each.differences[np.isfinite(each.outcomes)]).all()]
    rates = control_length(
        [each.outcomes for each in measured],
        [each.differences for each in measured],
        [each.prompts for each in measured],
        seed,
    )
    controlled = {id(each): rate for each, rate in zip(measured, rates, strict=True)}
    rows = []
    for each in found:
        usable = np.isfinite(each.outcomes)
        prompts = [prompt for prompt, ok in zip(each.prompts, usable, strict=True) if ok]
        sums, counts = unit_totals(each.outcomes[usable].tolist(), prompts)
        win_rate, standard_error = ratio_se(sums.tolist(), counts.tolist())
        row = {"model": each.model, "baseline": each.baseline, "n": len(sums), "unparsable": int((~usable).sum())}
        row |= {"win_rate": win_rate, "standard_error": standard_error}
        rows.append(plain(row | {"length_controlled_win_rate": controlled.get(id(each), math.nan)}))
    return rows


def _read(row: dict[str, Any], origin: str, stem: str) -> _Judged:
    format = compared_format(row)
    if format is not None:
        found = format.read(row, origin)
        first, second = found.models
        named = Comparison(found.prompt, (first, stem if second is None else second), found.preference)
        return _Judged(named, found.lengths(), format.baseline_first)
    if not any(name in row for name in _OWN[1:]):
        formats = ", ".join(each.name for each in COMPARED)
        remedy = f"give annotations as {formats} write them, or rows of {', '.join(_OWN)}"
        raise UserError(origin, f"is no comparison that is known here: {', '.join(map(str, row)) or 'nothing'}", remedy)
    lengths = _length(row, "baseline_length", origin), _length(row, "model_length", origin)
    prompt = _prompt(row, origin)
    preference = _field(row, "preference", origin)
    for_model = None if said_nothing(preference) else read_preference(row, origin) - 1.0
    return _Judged(Comparison(prompt, (None, stem), for_model), lengths, True)


def _against(each: _Judged, baseline: str | None) -> tuple[str | None, float, float]:
    """(model, its outcome, its length minus the baseline's); the model is None where the row is on something else."""
    (first, second), preference = each.comparison.models, each.comparison.preference
    outcome = math.nan if preference is None else preference
    longer = math.nan if each.lengths is None else float(each.lengths[1] - each.lengths[0])
    if first == second or baseline not in (first, second):
        return None, outcome, longer
    return (second, outcome, longer) if first == baseline else (first, 1.0 - outcome, -longer)


def _baseline(judged: Sequence[_Judged], asked: str | None, shown: str) -> str | None:
    """The baseline's name in the file; None where it has none there.

    Raises:
        UserError: the one that was asked for is not in the file, or the rows leave open which it is.
    """
    pairs = [each.comparison.models for each in judged]
    names = list(dict.fromkeys(name for pair in pairs for name in pair if name is not None))
    known = f"{', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
    if asked is not None:
        if asked in names or any(None in pair for pair in pairs):
            return asked if asked in names else None
        raise UserError(
            f"--baseline {asked}", f"is no model in {shown} (there are {known})", nearest(asked, names, most=_SHOWN)
        )
    firsts = {pair[0] for pair in pairs}
    if len(firsts) == 1 and all(each.baseline_first for each in judged):
        return firsts.pop()
    everywhere = set(pairs[0]).intersection(*pairs)
    if len(everywhere) == 1:
        return everywhere.pop()
    said = "does not say which model is the baseline" if everywhere else "has no model that all rows compare with"
    raise UserError(shown, f"{said} (there are {known})", "name it with --baseline NAME")


def _field(row: dict[str, Any], name: str, origin: str) -> Any:
    if name not in row:
        found = ", ".join(map(str, row)) or "nothing"
        raise UserError(origin, f"no {name!r}, found {found}", f"give every row its {name}")
    return row[name]


def _prompt(row: dict[str, Any], origin: str) -> Hashable:
    value = _field(row, "prompt", origin)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(origin, f"prompt is {value!r}, expected an id", "write a whole number or a string")
    return value


def _length(row: dict[str, Any], name: str, origin: str) -> float:
    value = _field(row, name, origin)
    if not is_finite(value) or value < 0:
        raise UserError(
            origin, f"{name} is {value!r}, expected 0 or more", "write the reply's length, in characters say"
        )
    return float(value)
