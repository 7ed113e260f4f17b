"""GRPO: replies to one prompt are compared with each other, and those that scored better become likelier.

Source: Shao et al. 2024, DeepSeekMath (arXiv 2402.03300); names, defaults and formulas are those of TRL's GRPOTrainer
(1.16), but for `beta`. The variants (BNPO, Dr. GRPO, DAPO, CISPO, GSPO, GDPO) are settings of it.

Legend of shape suffixes: B episodes, R response positions.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..models.masked import masked_moments, masked_sum
from .advantages import decoupled_scores, group_advantages, group_moments, sample_std, standardised
from .groups import Counted, GroupConfig, GroupMethod, GroupTrainer, clip_metrics
from .job import StageJob
from .losses import group_kl, group_terms, importance_weights, on_policy_rows, row_factors
from .ppo.method import Forwards, Method, Step
from .ppo.rewards import RewardSource, Scorer, Scores
from .ppo.rollout import Episodes, Rollout
from .ppo.settings import GRPOSettings
from .ppo.stage import run_on_policy

logger = logging.getLogger(__name__)


@dataclass
class GRPOConfig(GRPOSettings, GroupConfig):
    """Everything that `OnPolicyConfig` takes, and GRPO's own settings (`GRPOSettings`)."""

    method = "GRPO"
    settings = GRPOSettings

    @property
    def kl_in_reward(self) -> bool:
        return False

    def kl_factor(self) -> float:
        return self.beta

    def first_step_measures(self) -> bool:
        # which tokens train is said by all entropies of a rollout
        return super().first_step_measures() and self.top_entropy_quantile == 1

    def _check_method(self) -> None:
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError(
                "epsilon_high is None with loss_type 'cispo', expected a number such as 5.0: cispo bounds the ratio "
                f"itself by it, and epsilon, {self.epsilon}, would keep every token back"
            )
        if self.delta is not None and self.delta <= 1 + self.clip_high():
            raise ValueError(
                f"delta is {self.delta}, expected more than 1 + epsilon_high = {1 + self.clip_high():g}: it bounds "
                "what the clip leaves free"
            )


class GRPO(GroupMethod):
    """The group's mean as the baseline, the clipped surrogate token by token, the KL to the reference in the loss."""

    config: GRPOConfig
    own_statistics = ("kl", "low", "high", "clip_count")

    def advantages(self, scores: Scores, kl_B: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """See `GroupMethod.advantages`: by `scale_rewards` and `multi_objective_aggregation`."""
        del kl_B
        config, group = self.config, self.samples_per_prompt
        if config.multi_objective_aggregation == "normalize_then_sum":
            weights_S = scores.parts_SB.new_tensor([source.weight for source in self.sources])
            sum_B = decoupled_scores(scores.parts_SB, weights_S, group)
            moments = self.reduce(masked_moments(sum_B, ~sum_B.isnan()), "sum")
            return standardised(sum_B, moments), sample_std(moments).to(sum_B.dtype).expand_as(sum_B)
        total_B = scores.total_B
        std_B = group_moments(total_B, group).std_B
        if config.scale_rewards == "batch":
            moments = self.reduce(masked_moments(total_B, ~total_B.isnan()), "sum")
            std_B = sample_std(moments).to(total_B.dtype).expand_as(total_B)
        return group_advantages(total_B, group, None if config.scale_rewards == "none" else std_B), std_B

    def rollout(self, episodes: Episodes, forwards: Forwards, rewards_BR: torch.Tensor, scores: Scores) -> Rollout:
        """The old policy's entropies beside, where they say which tokens train."""
        found = super().rollout(episodes, forwards, rewards_BR, scores)
        return found if self.config.top_entropy_quantile == 1 else replace(found, entropy_BR=forwards.entropy_BR)

    def loss(self, logps_BR: torch.Tensor, part: Rollout, counted_BR: torch.Tensor, step: Step) -> Counted:
        """See `GroupMethod.loss`; kl is that of TRL's log, as it stands in the loss."""
        config = self.config
        log_ratio_BR = torch.where(counted_BR, logps_BR - part.logps_BR, 0.0)
        weights_BX = importance_weights(log_ratio_BR, counted_BR, config.importance_sampling_level)
        found = group_terms(
            logps_BR,
            weights_BX,
            part.advantages_BR,
            epsilon=config.epsilon,
            epsilon_high=config.clip_high(),
            delta=config.delta,
            cispo=config.loss_type == "cispo",
        )
        terms_BR, kl = found.terms_BR, torch.zeros((), device=logps_BR.device)
        if config.off_policy_mask_threshold is not None:
            drawn_BR = part.logps_BR if config.rollout_engine is None else part.episodes.sampler_logps_BR
            threshold = config.off_policy_mask_threshold
            rows_B1 = on_policy_rows(logps_BR, drawn_BR, part.advantages_BR, counted_BR, threshold=threshold)
            terms_BR = terms_BR * rows_B1
        if config.top_entropy_quantile < 1 and part.entropy_BR is not None:
            terms_BR = torch.where(part.entropy_BR >= self._threshold(step.rollout), terms_BR, 0.0)
        if part.ref_logps_BR is not None:
            weights = weights_BX if config.use_bias_correction_kl else None
            kl_BR = group_kl(logps_BR, part.ref_logps_BR, counted_BR, weights)
            terms_BR, kl = terms_BR + config.beta * kl_BR, masked_sum(kl_BR, counted_BR)
        loss = masked_sum(terms_BR * self._factors(counted_BR, step), counted_BR)
        clips_BX = counted_BR if found.high_BX.shape == counted_BR.shape else torch.ones_like(found.high_BX)
        clipped = {"low": found.low_BX & clips_BX, "high": found.high_BX & clips_BX, "clip_count": clips_BX}
        low_B, high_B, count_B = (x_BX.sum(1).double() for x_BX in clipped.values())
        sums = {"kl": kl, **{name: x_BX.sum() for name, x_BX in clipped.items()}}
        return Counted(loss, sums, low_B / count_B, high_B / count_B)

    def _factors(self, counted_BR: torch.Tensor, step: Step) -> torch.Tensor:
        config = self.config
        masked = config.mask_truncated_completions
        return row_factors(
            counted_BR,
            config.loss_type,
            rows=step.rows,
            tokens=step.finished_tokens if masked else step.tokens,
            rollout_tokens=step.rollout_finished_tokens if masked else step.rollout_tokens,
            steps=config.num_mini_batches,
            longest=config.max_new_tokens,
        )

    def _threshold(self, rollout: Rollout) -> torch.Tensor:
        """The entropy that a token must reach to train: a quantile over the whole rollout's, so that neither
        micro-batches nor processes change it (arXiv 2506.01939)."""
        assert rollout.entropy_BR is not None
        entropy_N = rollout.entropy_BR[self.counted(rollout.episodes)]
        if not len(entropy_N):
            return entropy_N.new_zeros(())
        return torch.quantile(entropy_N, 1 - self.config.top_entropy_quantile)

    def own_metrics(self, mean: dict[str, float]) -> dict[str, float]:
        """TRL's names."""
        found = clip_metrics(mean)
        if self.config.loss_type == "cispo":
            high = found["clip_ratio/high_mean"]
            found = {"policy/clipfrac_avg": high, "cispo_clip_ratio": high}
        return {**({"kl": mean["kl"] / (mean["counted"] or 1.0)} if self.config.measures_kl() else {}), **found}


class GRPOTrainer(GroupTrainer):
    """GRPO on adapters. Arguments, attributes and errors are those of `OnPolicyTrainer`."""

    args: GRPOConfig  # pyright: ignore[reportIncompatibleVariableOverride]: it is never set to another
    config = GRPOConfig

    def build_method(self, sources: Sequence[RewardSource], scorers: Sequence[Scorer]) -> Method:
        """Advantages within groups, and GRPO's loss."""
        del scorers
        return GRPO(self.args, self.trunk, sources, self.reduce)


def run_grpo(job: StageJob) -> dict[str, Any]:
    """Run a GRPO stage (see `run_on_policy`): the parent's adapter is policy and reference, `job.rewards` score."""
    if job.says("beta") is None:
        beta = job.method_value("beta")
        said = "%s: beta is %g, which the recipe does not say (TRL's default is 0: no reference)"
        logger.warning(said, job.name, beta)
    return run_on_policy(job, GRPOTrainer)
