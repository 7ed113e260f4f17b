"""The losses of PPO, GRPO and RLOO, and KL estimators: pure functions of tensors.

Every loss is a SUM over valid tokens or rows, divided by numbers of the whole optimiser step (or rollout) over all
micro-batches and processes, so that neither split changes the gradient.

Legend of shape suffixes: B rows, R response positions, X response positions or 1 (one number a row). `mask_BR` is true
on response tokens up to and including the first stop token. delta = log pi - log pi_ref, per token.

Sources: Schulman et al. 2017 (arXiv 1707.06347) eq. 7 and 9; Schulman, "Approximating KL divergence" (2020);
Huang et al., "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031); those of the group methods stand at
their functions.
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


def importance_weights(log_ratio_BR: torch.Tensor, mask_BR: torch.Tensor, level: str) -> torch.Tensor:
    """pi / pi_old: one a token [B, R], or at level "sequence" one a row [B, 1].

    A row's is the geometric mean of its tokens' (GSPO; arXiv 2507.18071).

    Args:
        log_ratio_BR: log pi - log pi_old, zero outside the mask.
        mask_BR: tokens that count; a row without any has weight 1.
    """
    if level == "token":
        return log_ratio_BR.exp()
    return (log_ratio_BR.sum(1, keepdim=True) / mask_BR.sum(1, keepdim=True).clamp(min=1)).exp()


def sampling_weights(
    log_ratio_BR: torch.Tensor,
    mask_BR: torch.Tensor,
    *,
    mode: str,
    clip_min: float | None = None,
    clip_max: float | None = None,
) -> torch.Tensor:
    """By how much a token counts that another engine drew: pi_old / its own probability there, within bounds.

    Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"), with the modes of TRL's `vllm_importance_sampling_mode` (1.16). "token_": one a token [B, R];
    "sequence_": one a reply [B, 1], the product of its tokens'. "_truncate": what is beyond a bound becomes the bound.
    "_mask": it becomes 0.

    Args:
        log_ratio_BR: log pi_old - log-prob of the engine that drew, at the same temperature and before any cut.
        mask_BR: valid tokens.

    Returns:
        Weights [B, R] or [B, 1], of 0 or more.
    """
    log_ratio_BR = torch.where(mask_BR, log_ratio_BR, 0.0)
    level, _, beyond = mode.partition("_")
    weights_BX = (log_ratio_BR if level == "token" else log_ratio_BR.sum(1, keepdim=True)).exp()
    if beyond == "truncate":
        return weights_BX.clamp(clip_min, clip_max) if (clip_min, clip_max) != (None, None) else weights_BX
    low = -torch.inf if clip_min is None else clip_min
    high = torch.inf if clip_max is None else clip_max
    return weights_BX.masked_fill((weights_BX < low) | (weights_BX > high), 0.0)


def on_policy_rows(
    logps_BR: torch.Tensor,
    drawn_logps_BR: torch.Tensor,
    advantages_BR: torch.Tensor,
    mask_BR: torch.Tensor,
    *,
    threshold: float,
) -> torch.Tensor:
    """Which rows train [B, 1], 1 or 0: not those that are to become less likely and are far from the policy already.

    A row with a negative advantage is left out where log-prob when drawn - log pi, the mean over its tokens, is above
    the threshold (DeepSeek-V3.2, arXiv 2512.02556 eq. 9; TRL's `off_policy_mask_threshold`).

    Args:
        logps_BR: under the policy that is trained, nats.
        drawn_logps_BR: of whoever drew them.
        advantages_BR: of one sign in a row.
        mask_BR: tokens that count.
    """
    gap_BR = torch.where(mask_BR, drawn_logps_BR - logps_BR.detach(), 0.0)
    mean_B1 = gap_BR.sum(1, keepdim=True) / mask_BR.sum(1, keepdim=True).clamp(min=1)
    falls_B1 = (torch.where(mask_BR, advantages_BR, 0.0) < 0).any(1, keepdim=True)
    return (~falls_B1 | (mean_B1 <= threshold)).to(logps_BR.dtype)


class GroupTerms(NamedTuple):
    """The surrogate's terms before they are summed, with gradients, and what the clip did to them."""

    terms_BR: torch.Tensor
    low_BX: torch.Tensor
    """whether a falling weight would have counted no more; X is 1 where weights are those of rows"""
    high_BX: torch.Tensor
    """whether a rising one would have"""


def group_terms(
    logps_BR: torch.Tensor,
    weights_BX: torch.Tensor,
    advantages_BR: torch.Tensor,
    *,
    epsilon: float,
    epsilon_high: float,
    delta: float | None = None,
    cispo: bool = False,
) -> GroupTerms:
    """GRPO's surrogate, negated, token by token.

    -min(w A, clip(w, 1 - epsilon, 1 + epsilon_high) A): arXiv 2402.03300 eq. 3, with DAPO's higher upper bound
    (arXiv 2503.14476). `delta` bounds w in the first term, which nothing else bounds where A is below 0
    (two-sided clipping; INTELLECT-2, arXiv 2505.07291). "cispo" clips the weight itself and lets every
    token learn: -stop_gradient(min(w, epsilon_high)) A log pi (MiniMax-M1, arXiv 2506.13585).

    Args:
        logps_BR: log-probs under the policy that is trained.
        weights_BX: of `importance_weights`.
        advantages_BR: of one sign at every token of a row, but for tokens that do not count and have 0.
    """
    advantages_BX = advantages_BR[:, : weights_BX.shape[1]]
    if cispo:
        with torch.no_grad():
            high_BX = (weights_BX > epsilon_high) & (advantages_BX > 0)
        terms_BR = -weights_BX.clamp(max=epsilon_high).detach() * advantages_BR * logps_BR
        return GroupTerms(terms_BR, torch.zeros_like(high_BX), high_BX)
    near_BX = weights_BX.clamp(1 - epsilon, 1 + epsilon_high)
    bounded_BX = weights_BX if delta is None else weights_BX.clamp(max=delta)
    terms_BR = -torch.minimum(bounded_BX * advantages_BR, near_BX * advantages_BR)
    with torch.no_grad():
        low_BX = (bounded_BX < 1 - epsilon) & (advantages_BX < 0)
        high_BX = (bounded_BX > 1 + epsilon_high) & (advantages_BX > 0)
    return GroupTerms(terms_BR, low_BX, high_BX)


def row_factors(
    mask_BR: torch.Tensor,
    loss_type: str,
    *,
    rows: float,
    tokens: float,
    rollout_tokens: float,
    steps: int,
    longest: int,
) -> torch.Tensor:
    """What a row's terms are multiplied by before all of them are summed [B, 1]: the loss types' normalisers.

    "grpo": the mean over rows of each row's mean over tokens. "bnpo": the mean over the tokens of the optimiser step.
    "dr_grpo": a constant, the longest reply's tokens (arXiv 2503.20783). "dapo" and "cispo": the mean over the tokens
    of the whole rollout, a pass over which is `steps` optimiser steps (arXiv 2503.14476).

    Args:
        mask_BR: tokens that count.
        rows, tokens: of the optimiser step, over all processes; every row, and those of its tokens that count.
        rollout_tokens: tokens that count in the rollout, over all processes.
        longest: the most tokens that a reply may have.
    """
    if loss_type == "grpo":
        return 1.0 / (rows * mask_BR.sum(1, keepdim=True).clamp(min=1))
    if loss_type == "bnpo":
        factor = 1.0 / max(tokens, 1.0)
    elif loss_type == "dr_grpo":
        factor = 1.0 / (rows * longest)
    else:
        factor = steps / max(rollout_tokens, 1.0)
    return torch.full_like(mask_BR[:, :1], factor, dtype=torch.float32)


def group_kl(
    logps_BR: torch.Tensor,
    ref_logps_BR: torch.Tensor,
    mask_BR: torch.Tensor,
    weights_BX: torch.Tensor | None = None,
) -> torch.Tensor:
    """k3, the estimate of KL(pi || ref) in GRPO's loss [B, R] (arXiv 2402.03300 eq. 4); its bias is named in `kl_loss`.

    Args:
        weights_BX: pi / pi_old, by which each term is multiplied where the tokens are no longer pi's own
            (`use_bias_correction_kl`; DeepSeek-V3.2, arXiv 2512.02556); None: not.
    """
    kl_BR = kl_estimate(torch.where(mask_BR, logps_BR - ref_logps_BR, 0.0), "k3")
    return kl_BR if weights_BX is None else kl_BR * weights_BX


class SequenceLoss(NamedTuple):
    """`loss` carries gradients; `low` and `high` say which rows the clip decided [B]."""

    loss: torch.Tensor
    low_B: torch.Tensor
    high_B: torch.Tensor


def sequence_policy_loss(
    log_ratio_BR: torch.Tensor,
    advantages_B: torch.Tensor,
    *,
    epsilon: float,
    epsilon_high: float,
    rows: float,
) -> SequenceLoss:
    """RLOO's loss: the clipped surrogate with a whole reply as one action, so one ratio a row (arXiv 2402.14740).

    Args:
        log_ratio_BR: log pi - log pi_old, zero at tokens that do not count.
        advantages_B: one a row.
        rows: of the optimiser step, over all processes.
    """
    ratio_B = log_ratio_BR.sum(1).exp()
    near_B = ratio_B.clamp(1 - epsilon, 1 + epsilon_high)
    loss = -torch.minimum(ratio_B * advantages_B, near_B * advantages_B).sum() / rows
    low_B, high_B = ratio_B < 1 - epsilon, ratio_B > 1 + epsilon_high
    return SequenceLoss(loss, low_B & (advantages_B < 0), high_B & (advantages_B > 0))


class RatioSums(NamedTuple):
    """Sums over valid tokens, detached: of pi / pi_old, of KL(old || new)'s estimate, of |log ratio|."""

    ratio: torch.Tensor
    approx_kl: torch.Tensor
    gap: torch.Tensor


def ratio_sums(log_ratio_BR: torch.Tensor, mask_BR: torch.Tensor) -> RatioSums:
    """How far the policy has gone from the one that sampled, token by token, whatever the loss makes of it."""
    log_ratio_BR = log_ratio_BR.detach()
    ratio_BR = log_ratio_BR.exp()
    return RatioSums(
        masked_sum(ratio_BR, mask_BR),
        masked_sum(ratio_BR - 1 - log_ratio_BR, mask_BR),
        masked_sum(log_ratio_BR.abs(), mask_BR),
    )
