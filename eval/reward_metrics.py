"""How well a reward model orders pairs that it never saw (checklist R5, R6)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..stages.metrics import length_baselines, pair_accuracy
from .intervals import bootstrap_interval, unit_totals, wilson_interval
from .winrate import score_outcomes

CALIBRATION_BINS = 10


def log_loss(margins: Sequence[float] | np.ndarray) -> float:
    """Mean of -log sigmoid(chosen - rejected) in nats, the Bradley-Terry loss; ln 2 where nothing is told apart."""
    return float(np.logaddexp(0.0, -np.asarray(margins, dtype=np.float64)).mean())


def calibration_error(margins: Sequence[float] | np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error (Guo et al., arXiv 1706.04599, eq. 3) of the favoured side's probability.

    The probability sigmoid(|margin|) lies in [1/2, 1], cut into equal bins; in each it is compared with the share of
    pairs in which the favoured side was the chosen one, a tie one half.

    Args:
        margins: [N], chosen score minus rejected score.
    """
    array = np.asarray(margins, dtype=np.float64)
    confidence = np.exp(-np.logaddexp(0.0, -np.abs(array)))
    correct = 0.5 + 0.5 * np.sign(array)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(array))


def reward_metrics(
    chosen: Sequence[float],
    rejected: Sequence[float],
    chosen_lengths: Sequence[int],
    rejected_lengths: Sequence[int],
    *,
    prompts: Sequence[Any] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """All reward-model numbers of a set of pairs.

    Args:
        chosen, rejected: [N] scores.
        chosen_lengths, rejected_lengths: [N] response tokens, for the two baselines that read no text.
        prompts: [N] which prompt a pair belongs to; pairs of one prompt stay together in the interval.

    Returns:
        n, accuracy, ci_low, ci_high, ties, log_loss, calibration_error, margin_mean, longer_wins, shorter_wins; rates
        are fractions of 1 and ties count one half everywhere.
    """
    outcomes = score_outcomes(chosen, rejected)
    if len(outcomes) == 0:
        raise ValueError("no pairs, expected at least one")
    if np.isnan(outcomes).any():
        raise ValueError("a score is nan, expected finite scores")
    margins = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    accuracy = pair_accuracy(chosen, rejected)
    units = len(unit_totals(outcomes.tolist(), prompts)[0])
    if units == len(outcomes) or np.ptp(outcomes) == 0:
        low, high = wilson_interval(accuracy * units, units, level)
    else:
        low, high = bootstrap_interval(outcomes.tolist(), prompts, level=level, seed=seed)
    return {
        "n": len(outcomes),
        "accuracy": accuracy,
        "ci_low": low,
        "ci_high": high,
        "ties": int((outcomes == 0.5).sum()),
        "log_loss": log_loss(margins),
        "calibration_error": calibration_error(margins),
        "margin_mean": float(margins.mean()),
        **length_baselines(chosen_lengths, rejected_lengths),
    }
