"""The one masked reduction: every mean, sum and variance over tokens goes through here.

Legend of shape suffixes: B rows, T positions. `mask` is 1 (or True) where a token counts.
"""

import torch


def masked_sum(x: torch.Tensor, mask: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Sum of `x` where `mask` is true; whatever stands outside, NaN and infinities included, counts as zero.

    Args:
        x: [...] values.
        mask: boolean or 0/1, broadcastable to `x`.
        dim: the dimension to reduce; None reduces all.

    Returns:
        A scalar, or `x`'s shape without `dim`.
    """
    kept = torch.where(mask.bool(), x, torch.zeros((), dtype=x.dtype, device=x.device))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: torch.Tensor, mask: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Mean of `x` over the true positions of `mask`; 0 where none is true.

    Args and shapes as in `masked_sum`.
    """
    count = mask.bool().expand_as(x).to(torch.float32)
    count = count.sum() if dim is None else count.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1.0)


def masked_moments(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Count, sum and sum of squares over the mask, as one fp64 vector [3], so that processes can add theirs up."""
    wide = x.double()
    return torch.stack([mask.bool().expand_as(x).sum().double(), masked_sum(wide, mask), masked_sum(wide * wide, mask)])


def mean_and_variance(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and (population) variance from the [3] moments of `masked_moments`; zeros when nothing was counted."""
    count, total, squares = moments.unbind()
    count = count.clamp(min=1.0)
    mean = total / count
    return mean, (squares / count - mean * mean).clamp(min=0.0)
