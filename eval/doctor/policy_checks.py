"""Does a policy end its replies, did it move, and how far?"""

import math

from ..statistics.intervals import Z95, wilson_interval
from .finding import Finding, judge

EOS_JUDGED_FROM = 0.2
"""Where fewer of the demonstrations end within the budget of new tokens, a low rate of the policy says nothing."""
EOS_BROKEN, EOS_LOOK = 0.25, 0.75
"""Shares of the demonstrations' rate. A policy that never learned EOS ends by accident, in a few replies of a hundred;
one that learned it a little late is worth a look."""
KL_LOOK, KL_BROKEN = 0.5, 1.0
"""Nats per token. A language model's own uncertainty is 1 to 2 nats per token: a KL of that size means text that the
reference practically never writes. Runs that end well stay within some 0.2."""
LEARNED_LOOK = 0.01
"""Nats per token. A policy this near to its start says the same in practice: runs that gain anything are at 0.05 and
more, and one of 192 episodes at a tenth of the right rate ended at 0.006."""
KL_NEGATIVE = -0.1
"""Nats per token. The expectation cannot be negative; a mean over all iterations below this is no noise."""
PARENT_BROKEN, PARENT_LOOK = 0.25, 0.75
"""Part of the parent's weights found in the child. A child that began as its parent is at 1 plus what it unlearned;
one that began from the base is at about 0."""
# The arithmetic of an adapter beside its layer and of one merged into it differs by rounding: KL is quadratic in it.
MERGE_FULL = (1e-6, 1e-3)
MERGE_LOW = (0.02, 0.1)
"""(look, broken) in nats per token, for fp32 bases and for 16-bit ones, where about 0.001 to 0.01 is seen."""


def check_eos(stage: str, finished: int, n: int, *, expected: float | None, budget: int) -> Finding:
    """Share of fresh replies that end by themselves.

    Args:
        expected: share of the demonstrations' replies that fit into `budget` tokens; None: there are none to compare.
    """
    rate, interval = finished / n, wilson_interval(finished, n)
    said = "no demonstrations to compare with: look below half"
    if expected is not None:
        said = (
            f"{expected:.3g} of the demonstrations end so early: look below {EOS_LOOK * expected:.3g}; "
            f"broken: the whole interval below {EOS_BROKEN * expected:.3g}"
        )
    return judge(
        stage,
        "eos rate",
        rate,
        interval=interval,
        unit=f"of {n} replies end within {budget} tokens",
        threshold=said,
        broken=expected is not None and interval[1] < EOS_BROKEN * expected,
        look=rate < (0.5 if expected is None else EOS_LOOK * expected),
        remedy="see that EOS is trained (labels, truncated replies), that the template ends a turn with the "
        "tokenizer's EOS, and that PAD is another token",
    )


def check_drift(stage: str, kl: float, se: float, *, reference: str, n: int) -> Finding:
    """KL(policy || what it started from) on fresh samples, in nats per token, with its standard error."""
    return judge(
        stage,
        "kl to reference",
        kl,
        interval=(kl - Z95 * se, kl + Z95 * se),
        unit=f"nats per token from {reference}, {n} replies",
        threshold=f"look: above {KL_LOOK}; broken: above {KL_BROKEN}",
        broken=not kl <= KL_BROKEN,
        look=kl > KL_LOOK,
        remedy="raise the KL coefficient (or beta), lower the learning rate, or stop earlier",
    )


def check_learned(
    stage: str, kl: float, se: float, *, reference: str, gain: tuple[float, float, float] | None, rate: float
) -> Finding:
    """Whether the policy is another one than its start: its distance from it, or a gain in reward that is no chance.

    Args:
        kl, se: KL(policy || start) in nats per token on fresh samples, with its standard error.
        gain: of the mean score over an on-policy stage's iterations, with its 95% interval; None: none is logged.
        rate: the learning rate it was trained with.
    """
    gained = gain is not None and gain[1] > 0
    reward = "" if gain is None else f", score {gain[0]:+.3g} ({gain[1]:+.3g} to {gain[2]:+.3g}) from first to last"
    still = kl + Z95 * (0.0 if math.isnan(se) else se) < LEARNED_LOOK and not gained
    longer = "more episodes, " if gain is not None else "more steps, "
    weaker = "a lower KL coefficient" if gain is not None else "a lower beta"
    return judge(
        stage,
        "learned",
        kl,
        unit=f"nats per token from {reference}{reward}",
        threshold=f"look: below {LEARNED_LOOK:g}"
        + (" without a gain in reward that is more than chance" if gain is not None else ""),
        look=still,
        remedy=f"it did not learn: a higher learning rate (it was {rate:g}; for LoRA about ten times that of full "
        f"fine-tuning), {longer}or {weaker}",
    )


def check_merged(stage: str, gap: float, *, low_precision: bool) -> Finding:
    """KL per token between the adapter beside the base and merged into it, on the policy's own replies (P2)."""
    look, broken = MERGE_LOW if low_precision else MERGE_FULL
    return judge(
        stage,
        "adapter against merged",
        gap,
        unit="nats per token",
        threshold=f"look: above {look:g}; broken: above {broken:g}",
        broken=not gap <= broken,
        look=gap > look,
        remedy="serve the adapter unmerged, or merge in fp32: preftune merge ADAPTER OUT --dtype float32",
    )


def check_trained(stage: str, change: float, *, start: str) -> Finding:
    """How far the LoRA weights B moved from where the stage started, in that start's norm (from the base: plainly)."""
    return judge(
        stage,
        "trained",
        change,
        unit=f"change of the adapter against {start}" if math.isfinite(change) else "a weight is not finite",
        threshold="broken: 0 or not finite",
        broken=not 0 < change < math.inf,
        remedy="see that the learning rate is above 0 and that there are steps; run the stage again",
    )


def check_parent_kept(stage: str, share: float, *, parent: str) -> Finding:
    """Projection of the child's B on its parent's: whether it started as an exact copy of it, or afresh."""
    return judge(
        stage,
        "starts from parent",
        share,
        unit=f"of {parent}'s weights are in it",
        threshold=f"look: below {PARENT_LOOK}; broken: below {PARENT_BROKEN}",
        broken=not share >= PARENT_BROKEN,
        look=share < PARENT_LOOK,
        remedy=f"it did not start as a copy of {parent}, or forgot it: check `from`, lower the learning rate",
    )
