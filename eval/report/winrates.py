"""Win-rates, ratings and the matrix of all pairs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ...stages.scorers.unread import unread_words
from ..judges.self_preference import self_judged
from ..results import silence_words, unread_answers
from ..statistics.intervals import mean_se, wilson_interval
from ..statistics.over_seeds import over_seeds, seed_groups
from . import svg
from .axes import Axis, axis
from .read import Run, number
from .text import fixed, percent, percents, short

HEAT_MOST = 26  # per cent of the colour in a cell that always wins; the text on it stays readable


def score_errors(run: Run) -> dict[tuple[str, str], float]:
    """(policy, judge) -> standard error of the mean score over prompts, from the samples."""
    scores: dict[tuple[str, str], list[float]] = {}
    for sample in run.samples:
        for judge, score in (sample.get("scores") or {}).items():
            value = number(score)
            if value is not None:
                scores.setdefault((sample["policy"], judge), []).append(value)
    return {key: mean_se(values)[1] for key, values in scores.items()}


def judge_tables(run: Run) -> list[dict[str, Any]]:
    """One table per judge: its rows with bars, ratings, and the matrix where it compared more than two policies."""
    errors, places = score_errors(run), {policy: i for i, policy in enumerate(run.policies())}
    tables, own = [], self_judged(run.plan, run.policies(), run.folder or Path(run.name))
    groups = seed_groups(run.plan.get("stages") or {})
    for judge in run.judges():
        rows = [row for row in run.results if row.get("judge") == judge]
        rated = [r for r in rows if number(r.get("rating_log_odds")) is not None]
        scale = _rating_axis(rated)
        shown = [
            {
                **row,
                "place": places[row["policy"]],
                "score_se": errors.get((row["policy"], judge)),
                "is_reference": row["policy"] == row.get("reference"),
                "bar": _rate_bar({**row, "place": places[row["policy"]]}),
                "rating_bar": _rating_bar({**row, "place": places[row["policy"]]}, scale) if scale else "",
            }
            for row in rows
        ]
        matrix = [row for row in rows if row.get("against")]
        tables.append(
            {
                "judge": judge,
                "rows": shown,
                "controlled": any(number(row.get("length_controlled_win_rate")) is not None for row in rows),
                "scored": any(number(row.get("mean_score")) is not None for row in rows),
                "rated": bool(scale),
                "missing": sum(row.get("unparsable") or 0 for row in rows),
                "silent": next(iter(silence_words(rows)), ""),
                "unread": unread_words(unread) if (unread := unread_answers(rows).get(judge)) else "",
                "first_place": first_place_words(rows[0]),
                "self": own.get(judge, ""),
                "seeds": [each for each in over_seeds(rows, groups) if "win_rate" in each],
                "matrix": heat_matrix(matrix, places) if len(matrix) > 2 else [],
                "names": [row["policy"] for row in matrix],
            }
        )
    return tables


def first_place_words(row: Mapping[str, Any]) -> str:
    """How often the reply shown first won; "" for a judge that does not see two at once. Every pair is shown in both
    orders, so that a judge that favours no place gives the first one half of its verdicts."""
    share, n = number(row.get("first_place")), number(row.get("first_place_n"))
    if share is None or not n:
        return ""
    low, high = wilson_interval(share * n, int(n))
    said = (
        f"The reply shown first won {percent(share)} of {short(int(n))} verdicts (95% interval {percents(low, high)})"
    )
    if low <= 0.5 <= high:
        return f"{said}: no favour for a place shows."
    place = "first" if share > 0.5 else "second"
    return f"{said}: this judge favours the {place} place, which both orders even out."


def heat_matrix(rows: Sequence[Mapping[str, Any]], places: Mapping[str, int]) -> list[dict[str, Any]]:
    """The row's policy against the column's: number, interval, and how strongly the cell is coloured."""
    table = []
    for row in rows:
        cells = []
        for other in rows:
            cell = (row.get("against") or {}).get(other["policy"]) or {}
            rate = number(cell.get("win_rate"))
            if rate is None:
                cells.append(None)
                continue
            strength = round(2 * abs(rate - 0.5) * HEAT_MOST)
            side = "wins" if rate > 0.5 else "loses" if rate < 0.5 else "even"
            low, high = number(cell.get("ci_low")), number(cell.get("ci_high"))
            decided = low is not None and high is not None and (low > 0.5 or high < 0.5)
            cells.append({**cell, "side": side, "strength": strength, "decided": decided})
        table.append({"policy": row["policy"], "place": places[row["policy"]], "cells": cells})
    return table


def interval_bar(
    place: int, value: float, low: float, high: float, scale: Axis, middle: float, label: str, ends: tuple[str, str]
) -> Markup:
    """A value with its interval on a line; the tick stands at `middle`."""
    at = scale.at
    return svg.figure(
        180, 22, label, "",
        [
            svg.line(scale.start, 11, scale.end, 11, "axis"),
            svg.line(at(middle), 3, at(middle), 19, "middle"),
            svg.line(at(low), 11, at(high), 11, f"range {svg.series(place)}"),
            svg.line(at(low), 7, at(low), 15, f"cap {svg.series(place)}"),
            svg.line(at(high), 7, at(high), 15, f"cap {svg.series(place)}"),
            svg.marker(place, at(value), 11, 4.5, title=f"{ends[0]} ({ends[1]})"),
        ],
        kind="bar",
    )  # fmt: skip


def _rate_bar(row: Mapping[str, Any]) -> Markup | str:
    rate, low, high = (number(row.get(key)) for key in ("win_rate", "ci_low", "ci_high"))
    if rate is None or low is None or high is None or row["policy"] == row.get("reference"):
        return ""
    scale = Axis(0.0, 1.0, 8.0, 172.0, ())
    said = f"{row['policy']} wins {percent(rate)}, 95% interval {percents(low, high)}"
    place = row.get("place", 0)
    return interval_bar(place, rate, low, high, scale, 0.5, said, (percent(rate), percents(low, high)))


def _rating_axis(rows: Sequence[Mapping[str, Any]]) -> Axis | None:
    ends = [number(row.get(key)) for row in rows for key in ("rating_low", "rating_high", "rating_log_odds")]
    known = [end for end in ends if end is not None]
    return axis([*known, 0.0], 8.0, 172.0, tight=True) if known else None


def _rating_bar(row: Mapping[str, Any], scale: Axis) -> Markup | str:
    value, low, high = (number(row.get(key)) for key in ("rating_log_odds", "rating_low", "rating_high"))
    if value is None or low is None or high is None:
        return ""
    said = f"{row['policy']}: rating {fixed(value)}, 95% interval {fixed(low)} to {fixed(high)}"
    return interval_bar(
        row["place"], value, low, high, scale, 0.0, said, (short(value), f"{fixed(low)} to {fixed(high)}")
    )
