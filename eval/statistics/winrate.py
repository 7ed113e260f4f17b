"""Win-rate of a policy against a reference, with an interval over prompts (checklist E1, E2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .intervals import DRAWS, bootstrap_interval, unit_totals, wilson_interval


@dataclass(frozen=True)
class WinRate:
    """One win-rate, as a fraction of 1.

    Attributes:
        win_rate: mean outcome, ties one half; nan when there is no usable verdict.
        ci_low, ci_high: confidence interval from a bootstrap over prompts.
        n: prompts with at least one usable verdict.
        wins, losses, ties: comparisons whose outcome is above, below, at one half.
        unparsable: comparisons without a verdict; they are in none of the other numbers.
    """

    win_rate: float
    ci_low: float
    ci_high: float
    n: int
    wins: int
    losses: int
    ties: int
    unparsable: int = 0


def score_outcomes(policy: Sequence[float], reference: Sequence[float]) -> np.ndarray:
    """Outcomes of a judge that scores one sample at a time: 1 win, 0.5 tie, 0 loss, nan where a score is nan.

    Args:
        policy, reference: [N], the scores of both on the same prompts, in the same order.
    """
    ours, theirs = np.asarray(policy, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"{len(ours)} policy scores and {len(theirs)} reference scores; expected as many")
    # Compared, not subtracted: two equal infinities are a tie.
    outcomes = np.where(ours > theirs, 1.0, np.where(ours < theirs, 0.0, 0.5))
    outcomes[np.isnan(ours) | np.isnan(theirs)] = np.nan
    return outcomes


def order_outcomes(policy_first: Sequence[float | None], reference_first: Sequence[float | None]) -> np.ndarray:
    """Outcomes of a judge that reads both replies at once and may favour a place (E1).

    Args:
        policy_first: [N] verdicts with the policy's reply shown first: the preference for the FIRST reply (1, 0.5, 0),
            None where the verdict could not be parsed.
        reference_first: [N] verdicts on the same pairs with the reference's reply shown first, again for the first.

    Returns:
        [N] half the sum of what the policy got in both orders; nan where either verdict is missing, since one order
        alone carries the judge's favour for a place.
    """
    first = np.array([np.nan if verdict is None else verdict for verdict in policy_first], dtype=np.float64)
    second = np.array([np.nan if verdict is None else verdict for verdict in reference_first], dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} verdicts; expected both orders of every pair")
    return 0.5 * (first + (1.0 - second))


def win_rate(
    outcomes: Sequence[float] | np.ndarray,
    prompts: Sequence[Any] | None = None,
    *,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> WinRate:
    """Win-rate with its interval from a bootstrap over prompts (E2).

    Args:
        outcomes: [N] in [0, 1], nan for an unparsable verdict.
        prompts: [N] which prompt each outcome belongs to, so that several outcomes of a prompt stay together; None:
            one outcome per prompt.
        level: of the interval.

    Where every prompt came out the same the bootstrap sees no spread, and Wilson's interval stands in: 20 wins of 20
    are not certainty.
    """
    array = np.asarray(outcomes, dtype=np.float64)
    usable = ~np.isnan(array)
    kept = array[usable]
    units = None if prompts is None else [unit for unit, ok in zip(prompts, usable, strict=True) if ok]
    unparsable = int((~usable).sum())
    if len(kept) == 0:
        return WinRate(float("nan"), float("nan"), float("nan"), 0, 0, 0, 0, unparsable)
    if kept.min() < 0 or kept.max() > 1:
        raise ValueError(f"outcomes from {kept.min()} to {kept.max()}; expected within 0 and 1")
    sums, counts = unit_totals(kept.tolist(), units)
    n = len(sums)
    rate = float(kept.mean())
    if np.ptp(sums / counts) == 0:
        low, high = wilson_interval(rate * n, n, level)
    else:
        low, high = bootstrap_interval(kept.tolist(), units, level=level, draws=draws, seed=seed)
    wins, losses = int((kept > 0.5).sum()), int((kept < 0.5).sum())
    return WinRate(rate, low, high, n, wins, losses, len(kept) - wins - losses, unparsable)


def against_itself(n: int) -> WinRate:
    """The reference against itself: one half by definition, without any uncertainty."""
    return WinRate(0.5, 0.5, 0.5, n, 0, 0, n)
