"""Small measures that stages and the evaluation share: pair accuracy, length baselines."""

import math
from collections.abc import Sequence

import torch


def pair_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Share of pairs in which the chosen side scores higher; a tie counts one half (R5). NaN for no pairs.

    An all-equal scorer has accuracy 0.5. Raises ValueError where the lengths differ.
    """
    if len(chosen) != len(rejected):
        raise ValueError(f"{len(chosen)} chosen scores for {len(rejected)} rejected ones, expected as many")
    if not chosen:
        return math.nan
    wins = sum(1.0 if good > bad else 0.5 if good == bad else 0.0 for good, bad in zip(chosen, rejected, strict=True))
    return wins / len(chosen)


def length_baselines(chosen: Sequence[int], rejected: Sequence[int]) -> dict[str, float]:
    """Accuracy of "longer wins" and "shorter wins" on response lengths: what a reward model must beat (R6)."""
    longer = pair_accuracy(chosen, rejected)
    return {"longer_wins": longer, "shorter_wins": 1 - longer}


def mean_std(values: Sequence[float]) -> dict[str, float]:
    """Mean and population standard deviation; the deviation of fewer than two values is 1 (it divides)."""
    tensor = torch.tensor(values, dtype=torch.float64)
    std = tensor.std(correction=0).item() if len(values) > 1 else 0.0
    return {"mean": tensor.mean().item() if len(values) else 0.0, "std": std or 1.0}
