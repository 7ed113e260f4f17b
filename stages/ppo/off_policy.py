"""Replies that another engine drew are not quite the policy's: what is made up for, and what is logged of it.

A token's weight multiplies its advantage. Every loss here has one factor of the advantage in each of its terms, and
weights are never below 0, so that is the same as weighing the terms of the loss: for a method of a user's own as well.
The KL in a loss and the value are not weighed, as in TRL.

Of replies that are drawn ahead, by an older policy, the same weight makes up for the updates since as well: it is the
policy of this iteration's start over who drew, and the loss's own ratio goes on from that policy (Hilton et al. 2022,
"Batch size-invariance for policy optimization", arXiv 2110.00641: proximal and behaviour policy apart).

Legend of shape suffixes: B episodes of this process, R response positions, X response positions or 1.
"""

from dataclasses import replace

import torch

from ..losses import sampling_weights
from ..serving.settings import SampledSettings
from .rollout import Reduce, Rollout

STALENESS = "rollout/staleness"
"""Logged of replies that are drawn ahead: the optimiser's steps since who drew them was the policy."""


def corrected(rollout: Rollout, settings: SampledSettings, reduce: Reduce) -> tuple[Rollout, dict[str, float]]:
    """The rollout of a server with its advantages weighed, and what is logged: over all processes, by TRL's names.

    Args:
        rollout: with the log-probs of the policy of the iteration's start, by the training forward; those of who drew
            are the sampler's.
    """
    if not settings.importance_sampling_correction:
        return rollout, {}
    episodes, mask_BR = rollout.episodes, rollout.episodes.mask_BR
    log_ratio_BR = torch.where(mask_BR, rollout.logps_BR - episodes.sampler_logps_BR, 0.0)
    weights_BX = sampling_weights(
        log_ratio_BR,
        mask_BR,
        mode=settings.importance_sampling_mode,
        clip_min=settings.importance_sampling_clip_min,
        clip_max=settings.importance_sampling_clip_max,
    )
    counted_BX = mask_BR if weights_BX.shape == mask_BR.shape else torch.ones_like(weights_BX, dtype=torch.bool)
    counted_N = weights_BX[counted_BX].double()
    total, count, left_out = reduce(
        torch.stack([counted_N.sum(), counted_N.new_tensor(len(counted_N)), (counted_N == 0).double().sum()]), "sum"
    ).tolist()
    gap_BR = log_ratio_BR.abs()
    apart, tokens = reduce(torch.stack([gap_BR.double().sum(), mask_BR.double().sum()]), "sum").tolist()
    metrics = {
        "sampling/sampling_logp_difference/mean": apart / tokens,
        "sampling/sampling_logp_difference/max": float(reduce(gap_BR.max(), "max")),
        "sampling/importance_sampling_ratio/min": -float(reduce(-counted_N.min(), "max")),
        "sampling/importance_sampling_ratio/mean": total / count,
        "sampling/importance_sampling_ratio/max": float(reduce(counted_N.max(), "max")),
        "sampling/masked": left_out / count,
    }
    return replace(rollout, advantages_BR=rollout.advantages_BR * weights_BX), metrics
