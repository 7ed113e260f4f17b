"""Standard errors and confidence intervals, the only place where they are computed.

A unit is what was drawn independently: a prompt for win-rates, a row for perplexity, a response for KL. Several
values of one unit always stay together.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

DRAWS = 2000
Z95 = 1.96
"""Standard errors on either side of a normal estimate that make a 95% interval."""


def unit_totals(values: Sequence[float], units: Sequence[Any] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Adds up the values of each unit.

    Args:
        values: [N].
        units: [N], which unit each value belongs to; None: each value is its own unit.

    Returns:
        sums [U] and counts [U], both float64.
    """
    array = np.asarray(values, dtype=np.float64)
    if units is None:
        return array, np.ones_like(array)
    places: dict[Any, int] = {}
    index = np.array([places.setdefault(unit, len(places)) for unit in units], dtype=np.int64)
    if len(index) != len(array):
        raise ValueError(f"{len(array)} values and {len(index)} units; expected one unit per value")
    return np.bincount(index, weights=array), np.bincount(index).astype(np.float64)


def bootstrap_interval(
    values: Sequence[float],
    units: Sequence[Any] | None = None,
    *,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """Confidence interval of the mean of the values by a seeded bootstrap over units (Efron and Tibshirani 1993).

    Returns:
        (low, high); (nan, nan) for fewer than two units, where nothing can be said.
    """
    sums, counts = unit_totals(values, units)
    if len(sums) < 2:
        return math.nan, math.nan
    # in an order of their own: the draws are of places, and the interval must not depend on how the rows came
    order = np.lexsort((counts, sums))
    sums, counts = sums[order], counts[order]
    if np.ptp(sums / counts) == 0:
        only = float(sums[0] / counts[0])
        return only, only
    result = stats.bootstrap(
        (sums, counts),
        lambda s, c, axis=-1: s.sum(axis=axis) / c.sum(axis=axis),
        paired=True,
        vectorized=True,
        confidence_level=level,
        n_resamples=draws,
        # Resampled units held at once: bounds the memory for large evaluations.
        batch=max(1, 4_000_000 // len(sums)),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def wilson_interval(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927); never empty, also at 0 and n successes.

    Args:
        successes: may be fractional where ties count one half (then the interval is a little too wide, never too
            narrow: a half varies less than a coin).
        n: number of trials; 0 gives (0, 1).
    """
    if n == 0:
        return 0.0, 1.0
    z = float(stats.norm.ppf(0.5 + level / 2))
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_se(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error is nan for fewer than two values."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) == 0:
        return math.nan, math.nan
    if len(array) == 1:
        return float(array[0]), math.nan
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array)))


def ratio_se(totals: Sequence[float], sizes: Sequence[float]) -> tuple[float, float]:
    """sum(totals) / sum(sizes) with its standard error over units, by linearisation (Cochran 1977, eq. 6.13).

    For per-token means: a unit is a sequence, its total the sum over its tokens, its size their number. Treating
    tokens as independent would make the error far too small.
    """
    total, size = np.asarray(totals, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    if size.sum() == 0:
        return math.nan, math.nan
    ratio = float(total.sum() / size.sum())
    if len(total) < 2:
        return ratio, math.nan
    residual = total - ratio * size
    spread = math.sqrt(float((residual**2).sum()) / (len(total) - 1))
    return ratio, spread / (math.sqrt(len(total)) * float(size.mean()))
