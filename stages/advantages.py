"""Advantages, from a value or from the other replies of a group, and whitening: pure functions of tensors.

Legend of shape suffixes: B rows, R response positions, S sources of scores, N rows of a group (the replies to one
prompt, which stand together), P groups. `mask_BR` is true on valid response tokens, a prefix of each row.

A score that is NaN is none: no source applied to that reply. It takes no part in its group's statistics, and the
reply's advantage is 0.
"""

from typing import NamedTuple

import torch


class Advantages(NamedTuple):
    """Both zero outside the mask."""

    advantages_BR: torch.Tensor
    returns_BR: torch.Tensor


def gae(
    rewards_BR: torch.Tensor, values_BR: torch.Tensor, mask_BR: torch.Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> Advantages:
    """Generalised advantage estimation (arXiv 1506.02438 eq. 16), one backward sweep.

    A response ends at its last valid token: there is no value after it, whether it stopped or was cut off. Rewards and
    values outside the mask are zeroed first, so nothing after the end reaches an advantage.

    Args:
        rewards_BR: reward of each token.
        values_BR: V(s_t), s_t = everything before token t.
        mask_BR: valid tokens.
        gamma, lam: discount and lambda.

    Returns:
        Advantages, and returns = advantages + values.
    """
    rewards_BR = torch.where(mask_BR, rewards_BR, 0.0)
    values_BR = torch.where(mask_BR, values_BR, 0.0)
    advantages_BR = torch.zeros_like(values_BR)
    running_B = torch.zeros_like(values_BR[:, 0])
    next_value_B = torch.zeros_like(running_B)
    for t in range(rewards_BR.shape[1] - 1, -1, -1):
        surprise_B = rewards_BR[:, t] + gamma * next_value_B - values_BR[:, t]
        # outside the mask everything is zero, so the sweep arrives at the last valid token with nothing carried
        running_B = surprise_B + gamma * lam * running_B
        advantages_BR[:, t] = running_B
        next_value_B = values_BR[:, t]
    advantages_BR = torch.where(mask_BR, advantages_BR, 0.0)
    return Advantages(advantages_BR, advantages_BR + values_BR)


def whiten(
    x_BR: torch.Tensor,
    mask_BR: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    *,
    keep_mean: bool = False,
    epsilon: float = 1e-8,
) -> torch.Tensor:
    """(x - mean) / std, with the mean and variance of the GLOBAL batch, given by the caller; zero outside the mask.

    Args:
        keep_mean: only rescale and leave the mean where it was: for rewards, whose level has a meaning.
    """
    mean, variance = mean.to(x_BR.dtype), variance.to(x_BR.dtype)
    scaled_BR = (x_BR - mean) * torch.rsqrt(variance + epsilon)
    return torch.where(mask_BR, scaled_BR + mean if keep_mean else scaled_BR, 0.0)


GROUP_EPSILON = 1e-4
"""Added to a standard deviation that scores are divided by, as in TRL's GRPO and RLOO."""


class GroupMoments(NamedTuple):
    """Of each row's group; NaN where the group has too few scores."""

    mean_B: torch.Tensor
    std_B: torch.Tensor
    """the sample's: squares are divided by one less than there are scores"""


def group_moments(scores_B: torch.Tensor, group: int) -> GroupMoments:
    """Mean and sample standard deviation of the scores in each group of `group` rows."""
    scores_PN = scores_B.view(-1, group)
    mean_P1 = scores_PN.nanmean(1, keepdim=True)
    count_P1 = (~scores_PN.isnan()).sum(1, keepdim=True)
    std_P1 = ((scores_PN - mean_P1).square().nansum(1, keepdim=True) / (count_P1 - 1)).sqrt()
    return GroupMoments(*(x_P1.expand_as(scores_PN).reshape(-1) for x_P1 in (mean_P1, std_P1)))


def sample_std(moments: torch.Tensor) -> torch.Tensor:
    """Sample standard deviation from [count, sum, sum of squares]; NaN of fewer than two."""
    count, total, squares = moments.unbind()
    return ((squares - total * total / count).clamp(min=0.0) / (count - 1)).sqrt().where(count > 1, torch.nan)


def group_advantages(scores_B: torch.Tensor, group: int, std_B: torch.Tensor | None) -> torch.Tensor:
    """A score less the mean of its group (GRPO; arXiv 2402.03300, section 4.1.2), one number a row [B].

    Args:
        scores_B: one a row, NaN for none.
        group: rows of a group.
        std_B: what the difference is divided by, `GROUP_EPSILON` added: the group's standard deviation, or that of the
            whole batch (arXiv 2508.08221); None: not at all (Dr. GRPO; arXiv 2503.20783).
    """
    centred_B = scores_B - group_moments(scores_B, group).mean_B
    return (centred_B if std_B is None else centred_B / (std_B + GROUP_EPSILON)).nan_to_num(0.0)


def decoupled_scores(parts_SB: torch.Tensor, weights_S: torch.Tensor, group: int) -> torch.Tensor:
    """Each source normalised within the groups by itself, then the weighted sum (GDPO; arXiv 2601.05242).

    Args:
        parts_SB: scores of each source, NaN where it does not apply.

    Returns:
        One number a row [B], NaN where no source applies; still to be normalised over the batch (`standardised`).
    """
    normal_SB = torch.stack(
        [(x_B - mean_B) / (std_B + GROUP_EPSILON) for x_B in parts_SB for mean_B, std_B in [group_moments(x_B, group)]]
    )
    sum_B = (weights_S[:, None] * normal_SB).nansum(0)
    return sum_B.where(~parts_SB.isnan().all(0), torch.nan)


def standardised(x_B: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """(x - mean) / (sample std + `GROUP_EPSILON`) of the GLOBAL batch, given as its moments; 0 where x is NaN."""
    mean, std = (moments[1] / moments[0]).to(x_B.dtype), sample_std(moments).to(x_B.dtype)
    return ((x_B - mean) / (std + GROUP_EPSILON)).nan_to_num(0.0)


def leave_one_out(scores_B: torch.Tensor, group: int) -> torch.Tensor:
    """A score less the mean score of the group's OTHER rows (RLOO; arXiv 2402.14740) [B].

    NaN where a row has no score, or is the only one of its group that has.
    """
    scores_PN = scores_B.view(-1, group)
    others_P1 = (~scores_PN.isnan()).sum(1, keepdim=True) - 1
    baseline_PN = (scores_PN.nansum(1, keepdim=True) - scores_PN) / others_P1
    return (scores_PN - baseline_PN).view(-1)
