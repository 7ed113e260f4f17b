"""Generalised advantage estimation and whitening: pure functions of tensors.

Legend of shape suffixes: B rows, R response positions. `mask_BR` is true on valid response tokens,
a prefix of each row.
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
