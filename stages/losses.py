"""PPO's losses and KL estimators: pure functions of tensors.

Every loss is a SUM over valid tokens divided by `denominator`, the number of valid tokens of the whole optimiser step
over all micro-batches and processes, so that neither split changes the gradient.

Legend of shape suffixes: B rows, R response positions. `mask_BR` is true on response tokens up to and including the
first stop token. delta = log pi - log pi_ref, per token.

Sources: Schulman et al. 2017 (arXiv 1707.06347) eq. 7 and 9; Schulman, "Approximating KL divergence" (2020);
Huang et al., "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031).
"""

from typing import NamedTuple

import torch

from ..models.masked import masked_sum

KL_ESTIMATORS = {"reward": ("k1",), "loss": ("k2", "k2_sequence", "k3")}
"""Where the penalty stands -> the estimators that give KL's gradient there (P11; arXiv 2512.21852)."""


class PolicyLoss(NamedTuple):
    """`loss` carries gradients; the sums are over valid tokens, detached, to be added up and divided once."""

    loss: torch.Tensor
    clipped: torch.Tensor
    """how many tokens the clip decided"""
    approx_kl: torch.Tensor
    """sum of (ratio - 1) - log ratio, the estimate of KL(old policy || new policy)"""
    ratio: torch.Tensor
    """sum of ratios"""
    ratio_squared: torch.Tensor


def ppo_policy_loss(
    logps_BR: torch.Tensor,
    old_logps_BR: torch.Tensor,
    advantages_BR: torch.Tensor,
    mask_BR: torch.Tensor,
    *,
    cliprange: float,
    denominator: torch.Tensor | float,
) -> PolicyLoss:
    """The clipped surrogate, negated: arXiv 1707.06347 eq. 7, one ratio per token.

    Args:
        logps_BR: log-probs of the sampled tokens under the policy being trained, nats.
        old_logps_BR: the same under the policy that sampled, from the training forward.
        advantages_BR: advantages, whitened or not.
        mask_BR: valid tokens.
        cliprange: epsilon.
        denominator: valid tokens of the optimiser step, over all processes.
    """
    log_ratio_BR = torch.where(mask_BR, logps_BR - old_logps_BR, 0.0)
    ratio_BR = log_ratio_BR.exp()
    plain_BR = -advantages_BR * ratio_BR
    clipped_BR = -advantages_BR * ratio_BR.clamp(1 - cliprange, 1 + cliprange)
    loss = masked_sum(torch.maximum(plain_BR, clipped_BR), mask_BR) / denominator
    with torch.no_grad():
        return PolicyLoss(
            loss,
            masked_sum((clipped_BR > plain_BR).float(), mask_BR),
            masked_sum(ratio_BR - 1 - log_ratio_BR, mask_BR),
            masked_sum(ratio_BR, mask_BR),
            masked_sum(ratio_BR * ratio_BR, mask_BR),
        )


class ValueLoss(NamedTuple):
    """`loss` carries gradients; `clipped` counts the tokens that the clip decided."""

    loss: torch.Tensor
    clipped: torch.Tensor


def value_loss(
    values_BR: torch.Tensor,
    old_values_BR: torch.Tensor,
    returns_BR: torch.Tensor,
    mask_BR: torch.Tensor,
    *,
    cliprange: float | None,
    denominator: torch.Tensor | float,
) -> ValueLoss:
    """0.5 * max((V - R)^2, (V_clipped - R)^2), V_clipped within `cliprange` of the rollout's value; None: no clip.

    Args:
        values_BR: the value head's output now.
        old_values_BR: its output when the rollout was taken.
        returns_BR: advantages + old values.
        mask_BR, denominator: as in `ppo_policy_loss`.
    """
    error_BR = (values_BR - returns_BR).square()
    if cliprange is None:
        return ValueLoss(0.5 * masked_sum(error_BR, mask_BR) / denominator, torch.zeros_like(error_BR[0, 0]).detach())
    near_BR = old_values_BR + (values_BR - old_values_BR).clamp(-cliprange, cliprange)
    clipped_error_BR = (near_BR - returns_BR).square()
    loss = 0.5 * masked_sum(torch.maximum(error_BR, clipped_error_BR), mask_BR) / denominator
    return ValueLoss(loss, masked_sum((clipped_error_BR > error_BR).float(), mask_BR).detach())


def kl_estimate(delta_BR: torch.Tensor, estimator: str) -> torch.Tensor:
    """Per-token estimate of KL(pi || ref) from samples of pi, in nats (Schulman 2020).

    k1 = delta: unbiased, may be negative. k2 = delta^2 / 2: biased, its gradient is KL's. k3 = exp(-delta) - 1 + delta:
    unbiased and never negative, but its gradient is not KL's (it is KL(ref || pi)'s).

    Raises:
        ValueError: an unknown estimator.
    """
    if estimator == "k1":
        return delta_BR
    if estimator == "k2":
        return 0.5 * delta_BR.square()
    if estimator == "k3":
        return torch.expm1(-delta_BR) + delta_BR
    raise ValueError(f"KL estimator is {estimator!r}, expected k1, k2 or k3")


def kl_loss(
    logps_BR: torch.Tensor,
    ref_logps_BR: torch.Tensor,
    mask_BR: torch.Tensor,
    *,
    estimator: str,
    denominator: torch.Tensor | float,
) -> torch.Tensor:
    """The KL penalty as a term of the loss, before its coefficient.

    What each estimator's autograd gradient is, in expectation over samples of pi:

    - "k2_sequence", half the square of a response's summed delta: the gradient of the sequence KL, exactly.
    - "k2", token by token: the gradient of each step's KL with the prefixes held fixed. What a token does to the KL of
      later tokens is left out; lower variance.
    - "k3": as k2 but of KL(ref || pi), the other direction: named bias.
    - "k1" is refused: its gradient is zero in expectation (arXiv 2512.21852).

    Raises:
        ValueError: k1, or an unknown estimator.
    """
    if estimator == "k1":
        raise ValueError("KL estimator k1 in the loss has a zero gradient in expectation; use k2, or k1 in the reward")
    delta_BR = torch.where(mask_BR, logps_BR - ref_logps_BR, 0.0)
    if estimator == "k2_sequence":
        return 0.5 * delta_BR.sum(1).square().sum() / denominator
    return masked_sum(kl_estimate(delta_BR, estimator), mask_BR) / denominator


def token_rewards(
    delta_BR: torch.Tensor, scores_B: torch.Tensor, mask_BR: torch.Tensor, kl_coef: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """reward_t = -kl_coef * delta_t, plus the score on the last valid token. Nothing is clamped.

    Args:
        delta_BR: log pi_old - log pi_ref.
        scores_B: one score a response.
        mask_BR: valid tokens; every row has at least one.
        kl_coef: beta; 0 when the KL stands in the loss.

    Returns:
        (rewards_BR, non_score_rewards_BR), zeros outside the mask.
    """
    non_score_BR = torch.where(mask_BR, -kl_coef * delta_BR, 0.0)
    last_B1 = mask_BR.long().sum(1, keepdim=True) - 1
    return non_score_BR.scatter_add(1, last_B1, scores_B[:, None].to(non_score_BR.dtype)), non_score_BR
