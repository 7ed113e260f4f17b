"""Preferences that somebody else collected: reading them, and their win-rates (`eval winrate --annotations`)."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.sources import read_file
from ..errors import UserError
from ..values import is_finite, is_number, plain
from .statistics.intervals import ratio_se, unit_totals
from .statistics.length_control import control_length


@dataclass(frozen=True)
class Annotations:
    """One model's comparisons with the baseline.

    Attributes:
        model: the file's stem.
        prompts: [N] the prompts' ids.
        outcomes: [N] in [0, 1], 1 where the model wins.
        differences: [N] length of the model's reply minus the baseline's.
    """

    model: str
    prompts: list[Hashable]
    outcomes: np.ndarray
    differences: np.ndarray


def read_annotations(path: Path) -> Annotations:
    """Reads JSONL rows `{"prompt": id, "baseline_length": int, "model_length": int, "preference": 1..2}`.

    A preference of 2 says that the model wins, 1 that the baseline does, anything between how sure that is. The file
    may end in .gz.

    Raises:
        UserError: no rows, a field that is missing, or one that is not what it should be.
    """
    prompts: list[Hashable] = []
    outcomes, differences = [], []
    for origin, row in read_file(path, str(path)):
        prompts.append(_prompt(row, origin))
        differences.append(_length(row, "model_length", origin) - _length(row, "baseline_length", origin))
        outcomes.append(read_preference(row, origin) - 1.0)
    if not prompts:
        raise UserError(str(path), "holds no rows", "write one annotation per line")
    stem = Path(path.name.removesuffix(".gz")).stem
    return Annotations(stem, prompts, np.array(outcomes), np.array(differences, dtype=np.float64))


def read_preference(row: dict[str, Any], origin: str) -> float:
    """The row's `preference`, a number from 1 to 2."""
    value = _field(row, "preference", origin)
    if not is_number(value) or not 1 <= value <= 2:
        remedy = "2 says that the second reply wins (in annotations the model's), 1 the first, 1.5 neither"
        raise UserError(origin, f"preference is {value!r}, expected a number from 1 to 2", remedy)
    return float(value)


def annotation_rows(paths: Sequence[Path], seed: int = 0) -> list[dict[str, Any]]:
    """Win-rates of the files' models, one row per file in the given order; rates are fractions of 1.

    Returns:
        Rows of model, n (prompts), win_rate, standard_error (over prompts), length_controlled_win_rate (fitted to all
        files jointly).
    """
    files = [read_annotations(path) for path in paths]
    controlled = control_length(
        [each.outcomes for each in files], [each.differences for each in files], [each.prompts for each in files], seed
    )
    rows = []
    for each, rate in zip(files, controlled, strict=True):
        sums, counts = unit_totals(each.outcomes.tolist(), each.prompts)
        win_rate, standard_error = ratio_se(sums.tolist(), counts.tolist())
        row = {"model": each.model, "n": len(sums), "win_rate": win_rate, "standard_error": standard_error}
        rows.append(plain(row | {"length_controlled_win_rate": rate}))
    return rows


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
