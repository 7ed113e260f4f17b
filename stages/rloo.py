"""RLOO: a reply's baseline is the mean score of the other replies to its prompt, and a whole reply is one action.

Source: Ahmadian et al. 2024, "Back to basics" (arXiv 2402.14740); names, defaults and formulas are those of TRL's
RLOOTrainer (1.16).

Legend of shape suffixes: B episodes, R response positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models.masked import masked_moments
from .advantages import group_moments, leave_one_out, standardised
from .groups import Counted, GroupConfig, GroupMethod, GroupTrainer, clip_metrics
from .job import StageJob
from .losses import sequence_policy_loss
from .ppo.method import Method, Step
from .ppo.rewards import RewardSource, Scorer, Scores
from .ppo.rollout import Rollout
from .ppo.settings import RLOOSettings
from .ppo.stage import run_on_policy


@dataclass
class RLOOConfig(RLOOSettings, GroupConfig):
    """Everything that `OnPolicyConfig` takes, and RLOO's own settings (`RLOOSettings`)."""

    method = "RLOO"
    settings = RLOOSettings

    @property
    def kl_in_reward(self) -> bool:
        return True

    def kl_factor(self) -> float:
        return self.beta

    def _check_method(self) -> None:
        if self.rollout_engine is not None and self.importance_sampling_mode.startswith("token"):
            raise ValueError(
                f"importance_sampling_mode is {self.importance_sampling_mode!r}, expected sequence_mask or "
                "sequence_truncate: a whole reply is one action in RLOO, and has one weight"
            )


class RLOO(GroupMethod):
    """The others' mean as the baseline, one clipped ratio a reply, the KL to the reference in the reward."""

    config: RLOOConfig
    own_statistics = ("low", "high", "clip_count")

    def advantages(self, scores: Scores, kl_B: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """See `GroupMethod.advantages`: of the score less beta times the reply's KL."""
        config, group = self.config, self.samples_per_prompt
        total_B = scores.total_B if kl_B is None else scores.total_B - config.beta * kl_B
        found_B = leave_one_out(total_B, group)
        if config.normalize_advantages:
            found_B = standardised(found_B, self.reduce(masked_moments(found_B, ~found_B.isnan()), "sum"))
        return found_B.nan_to_num(0.0), group_moments(total_B, group).std_B

    def loss(self, logps_BR: torch.Tensor, part: Rollout, counted_BR: torch.Tensor, step: Step) -> Counted:
        """See `GroupMethod.loss`; a reply that does not count has ratio 1, and no gradient."""
        config = self.config
        log_ratio_BR = torch.where(counted_BR, logps_BR - part.logps_BR, 0.0)
        found = sequence_policy_loss(
            log_ratio_BR,
            part.advantages_BR[:, 0],
            epsilon=config.epsilon,
            epsilon_high=config.clip_high(),
            rows=step.rows,
        )
        count = torch.ones_like(found.low_B)
        sums = {"low": found.low_B.sum(), "high": found.high_B.sum(), "clip_count": count.sum()}
        return Counted(found.loss, sums, found.low_B.double(), found.high_B.double())

    def own_metrics(self, mean: dict[str, float]) -> dict[str, float]:
        """TRL's names."""
        return clip_metrics(mean)

    def rollout_metrics(self, rollout: Rollout) -> dict[str, float]:
        """The KL per token beside, as TRL's RLOO logs it: of the rollout, with k1."""
        found = super().rollout_metrics(rollout)
        if rollout.ref_logps_BR is None:
            return found
        counted_BR = self.counted(rollout.episodes)
        moments = self.reduce(masked_moments(rollout.logps_BR - rollout.ref_logps_BR, counted_BR), "sum")
        return {**found, "kl": float(moments[1] / moments[0].clamp(min=1.0))}


class RLOOTrainer(GroupTrainer):
    """RLOO on adapters. Arguments, attributes and errors are those of `OnPolicyTrainer`."""

    args: RLOOConfig  # pyright: ignore[reportIncompatibleVariableOverride]: it is never set to another
    config = RLOOConfig

    def build_method(self, sources: Sequence[RewardSource], scorers: Sequence[Scorer]) -> Method:
        """Leave-one-out advantages, and RLOO's loss."""
        del scorers
        return RLOO(self.args, self.trunk, sources, self.reduce)


def run_rloo(job: StageJob) -> dict[str, Any]:
    """Run an RLOO stage (see `run_on_policy`): the parent's adapter is policy and reference, `job.rewards` score."""
    return run_on_policy(job, RLOOTrainer)
