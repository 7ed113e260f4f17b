"""How well a reward model orders pairs that it never saw (checklist R5, R6)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...stages.metrics import length_baselines, pair_accuracy
from .intervals import bootstrap_interval, unit_totals, wilson_interval
from .winrate import score_outcomes

CALIBRATION_BINS = 10


def log_loss(margins: Sequence[float] | np.ndarray) -> float:
    """Mean of -log sigmoid(chosen - rejected) in nats, the Bradley-Terry loss; ln 2 where nothing is told apart."""
    return float(np.logaddexp(0.0, -np.asarray(margins, dtype=np.float64)).mean())


def calibration_bins(margins: Sequence[float] | np.ndarray, bins: int = CALIBRATION_BINS) -> list[dict[str, Any]]:
    """How often the favoured side was the chosen one, by how sure the model was of it.

    The favoured side's probability sigmoid(|margin|) lies in [1/2, 1], cut into equal bins; a tie is right by one half.

    Args:
        margins: [N], chosen score minus rejected score.

    Returns:
        From the least sure bin on, those that hold pairs: low and high (its ends), n, confidence (mean probability of
        the favoured side), accuracy (share of pairs whose favoured side was chosen) and ci_low, ci_high (Wilson's,
        pairs taken as independent).
    """
    array = np.asarray(margins, dtype=np.float64)
    confidence = np.exp(-np.logaddexp(0.0, -np.abs(array)))
    correct = 0.5 + 0.5 * np.sign(array)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    counts, sure, right = (np.bincount(place, weights, bins) for weights in (None, confidence, correct))
    found = []
    for each in np.flatnonzero(counts).tolist():
        n = int(counts[each])
        low, high = wilson_interval(float(right[each]), n)
        found.append(
            {
                "low": 0.5 + each / (2 * bins),
                "high": 0.5 + (each + 1) / (2 * bins),
                "n": n,
                "confidence": float(sure[each]) / n,
                "accuracy": float(right[each]) / n,
                "ci_low": low,
                "ci_high": high,
            }
        )
    return found


def calibration_error(margins: Sequence[float] | np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error (Guo et al., arXiv 1706.04599, eq. 3): the bins' mean gap, weighted by their pairs.

    Args:
        margins: [N], chosen score minus rejected score.
    """
    return _expected_error(calibration_bins(margins, bins))


def _expected_error(bins: Sequence[dict[str, Any]]) -> float:
    gaps = sum(each["n"] * abs(each["confidence"] - each["accuracy"]) for each in bins)
    return gaps / sum(each["n"] for each in bins)


def pair_metrics(
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
        n, accuracy, ci_low, ci_high, ties, log_loss, calibration_error, margin_mean, longer_wins, shorter_wins,
        calibration (see `calibration_bins`); rates are fractions of 1 and ties count one half everywhere.
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
    calibration = calibration_bins(margins)
    return {
        "n": len(outcomes),
        "accuracy": accuracy,
        "ci_low": low,
        "ci_high": high,
        "ties": int((outcomes == 0.5).sum()),
        "log_loss": log_loss(margins),
        "calibration_error": _expected_error(calibration),
        "margin_mean": float(margins.mean()),
        **length_baselines(chosen_lengths, rejected_lengths),
        "calibration": calibration,
    }
