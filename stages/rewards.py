"""Where PPO's scores come from: which sources, how they combine, what a missing EOS does, and how they are scaled.

`scorers.py` computes the scores of one source; here is the arithmetic between a source's raw score and the number that
lands on the last token.

Legend of shape suffixes: S sources, B responses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

RewardKind = Literal["stage", "model", "function"]


@dataclass(frozen=True)
class RewardSource:
    """One source of scores.

    Attributes:
        kind: "stage": the folder of a reward stage (an adapter on the same base); "model": a hub id or local folder of
            any sequence-classification model, with its own tokenizer; "function": "module:function" or a callable with
            TRL's signature `f(prompts, completions, **columns) -> list[float]`.
        target: the folder, the model or the function.
        weight: its factor in the sum; unused in an ensemble.
    """

    kind: RewardKind
    target: str | Callable[..., list[float]]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("stage", "model", "function"):
            raise ValueError(f"reward kind is {self.kind!r}, expected 'stage', 'model' or 'function'")
        if callable(self.target) and self.kind != "function":
            raise ValueError(f"a reward of kind {self.kind!r} was given a function, expected a path or a model id")

    @property
    def name(self) -> str:
        """For logs: the function's name, or the target as written."""
        return self.target if isinstance(self.target, str) else getattr(self.target, "__name__", repr(self.target))

    def as_dict(self) -> dict[str, Any]:
        """For lineage.json."""
        return {"kind": self.kind, "target": self.name, "weight": self.weight}


def combine(
    scores_SB: torch.Tensor, weights_S: torch.Tensor, *, how: Literal["sum", "ensemble"] = "sum", penalty: float = 1.0
) -> torch.Tensor:
    """One score a response [B]: the weighted sum, or (an ensemble's) mean minus `penalty` times standard deviation.

    The ensemble's standard deviation is over the S sources, population form, as in uncertainty-weighted optimisation
    (Coste et al. 2023, arXiv 2310.02743, eq. 4 uses the variance; the standard deviation keeps the score's unit).
    """
    if how == "sum":
        return (weights_S[:, None] * scores_SB).sum(0)
    return scores_SB.mean(0) - penalty * scores_SB.std(0, correction=0)


def apply_eos_rule(
    scores_B: torch.Tensor, finished_B: torch.Tensor, *, penalty: float | None, replacement: float | None
) -> torch.Tensor:
    """What a response without EOS gets: its score minus `penalty`, or `replacement` instead of it. Not the same.

    Raises:
        ValueError: both are given.
    """
    if penalty is not None and replacement is not None:
        raise ValueError(
            f"missing_eos_penalty is {penalty} and missing_eos_score is {replacement}, expected one of them; "
            "the first subtracts from the score, the second replaces it"
        )
    if replacement is not None:
        return torch.where(finished_B, scores_B, replacement)
    return torch.where(finished_B, scores_B, scores_B - penalty) if penalty is not None else scores_B


class RunningScale:
    """Running standard deviation of all scores seen (Chan et al.'s parallel update), to divide scores by."""

    def __init__(self, count: float = 0.0, mean: float = 0.0, m2: float = 0.0) -> None:
        self.count, self.mean, self.m2 = count, mean, m2

    def update(self, moments: torch.Tensor) -> None:
        """Add a batch given as [count, sum, sum of squares] over all processes."""
        count, total, squares = (float(x) for x in moments)
        if count == 0:
            return
        mean = total / count
        shift = mean - self.mean
        both = self.count + count
        self.m2 += max(squares - count * mean * mean, 0.0) + shift * shift * self.count * count / both
        self.mean += shift * count / both
        self.count = both

    @property
    def std(self) -> float:
        """1.0 until two different scores have been seen."""
        return (self.m2 / self.count) ** 0.5 if self.count > 1 and self.m2 > 0 else 1.0

    def state(self) -> list[float]:
        """Constructor arguments that bring this object back."""
        return [self.count, self.mean, self.m2]
