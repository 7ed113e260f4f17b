"""What the stages logged: identities that hold at step 0, trends of PPO, rows that were lost."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import linregress, t

from ...stages.ppo.update import FULL_TOLERANCE
from ..statistics.intervals import wilson_interval
from .finding import Finding, judge
from .policy_checks import KL_BROKEN, KL_LOOK, KL_NEGATIVE

PPO_START_LOW = 0.01
"""Nats per token in 16 bits: equal weights on the same rows give the same bits there too; only another kernel for
another shape rounds otherwise. A base in the reference's place is some tenths of a nat away."""
TREND_ITERATIONS = 4
"""Fewer are no trend."""
ENTROPY_LOOK, ENTROPY_BROKEN = 0.3, 0.1
"""Of the entropy at the start. A policy that sharpens keeps half or more of it."""
ENTROPY_FLOOR = 0.05
"""Nats per token: at this entropy 99 tokens of 100 are certain. A policy above it still explores."""
ROWS_LOOK, ROWS_BROKEN = 0.05, 0.5
"""Share of rows dropped or truncated: a truncated reply trains no EOS, a dropped one nothing."""


def first_step_tolerance(logp: float, *, low_precision: bool) -> float:
    """Nats that rounding may put between two sums of log-probs of that size; as the trainers' own check has it."""
    eps = 2**-7 if low_precision else 2**-23
    return max(1e-3, eps * math.sqrt(abs(logp)))


def check_first_step(stage: str, gap: float, tolerance: float, *, start: str) -> Finding:
    """|log pi - log pi_ref| of the first logged step of DPO, IPO or KTO, in nats: 0 where the reference is the start
    (D1), and with it margins 0 and, for DPO, loss ln 2."""
    return _start(stage, gap, tolerance, "nats", start)


def check_ppo_start(stage: str, kl: float, length: float, *, start: str, low_precision: bool) -> Finding:
    """objective/kl of the first iteration, drawn before any update: 0 where the reference is the start."""
    tolerance = PPO_START_LOW if low_precision else FULL_TOLERANCE
    gap = abs(kl) / max(length, 1.0)
    return _start(stage, gap, tolerance, "nats per token", start)


def _start(stage: str, gap: float, tolerance: float, unit: str, start: str) -> Finding:
    return judge(
        stage,
        "first step",
        gap,
        unit=f"{unit} between policy and reference before the first update",
        threshold=f"broken: above {tolerance:.2g}; the reference must be {start}, which the policy starts from",
        broken=not gap <= tolerance,
        remedy=f"make the reference a frozen copy of {start} (not the base with adapters off) and run the stage again",
    )


def check_sampler(stage: str, means: Sequence[float], kls: Sequence[float], tolerance: float) -> Finding:
    """Whether PPO's replies were drawn from the policy that trained on them.

    Args:
        means, kls: [iterations] rollout/logprob_mismatch_mean and rollout/sampler_kl, nats per token.
        tolerance: of the run (`mismatch_tolerance`, or its precision's).
    """
    worst = max((*means, *kls), key=lambda x: math.inf if math.isnan(x) else x)
    return judge(
        stage,
        "ppo sampler",
        worst,
        unit=f"nats per token between sampler and training forward, at most, in {len(means)} iterations",
        threshold=f"look: above {tolerance / 2:.2g}; broken: above {tolerance:.2g}",
        broken=not worst <= tolerance,
        look=worst > tolerance / 2,
        remedy="the replies were drawn from another policy than the one that trained: train in float32, or report the "
        "base",
    )


def check_kl_trend(stage: str, kls: Sequence[float], lengths: Sequence[float]) -> Finding:
    """Where PPO's KL ends, per token.

    Args:
        kls, lengths: [iterations] objective/kl in nats per reply, rollout/length in tokens.
    """
    last = _last(len(kls))
    end = float(np.sum(kls[-last:]) / np.sum(lengths[-last:]))
    mean = float(np.sum(kls) / np.sum(lengths))
    return judge(
        stage,
        "ppo kl",
        mean if mean < KL_NEGATIVE else end,
        unit=f"nats per token in the {'mean' if mean < KL_NEGATIVE else f'last {last}'} of {len(kls)} iterations",
        threshold=f"look: above {KL_LOOK}; broken: above {KL_BROKEN}, or below {KL_NEGATIVE} in the mean",
        broken=not end <= KL_BROKEN or mean < KL_NEGATIVE,
        look=end > KL_LOOK,
        remedy="raise kl.coef or set kl.target (GRPO, RLOO: raise beta), lower the learning rate; a negative KL means "
        "that sampling and training do not see the same policy",
    )


def check_entropy_trend(stage: str, entropies: Sequence[float]) -> Finding:
    """What is left of the entropy per token that PPO began with.

    Args:
        entropies: [iterations] rollout/entropy_per_token, nats.
    """
    last = _last(len(entropies))
    start, end = float(np.mean(entropies[:last])), float(np.mean(entropies[-last:]))
    left = end / start if start > 0 else 1.0
    return judge(
        stage,
        "ppo entropy",
        left,
        unit=f"of the entropy is left ({start:.3g} nats per token, then {end:.3g})",
        threshold=f"look: below {ENTROPY_LOOK}; broken: below {ENTROPY_BROKEN} and {ENTROPY_FLOOR} nats per token",
        broken=not left >= ENTROPY_BROKEN and end < ENTROPY_FLOOR,
        look=left < ENTROPY_LOOK,
        remedy="the policy says one thing only: raise kl.coef or entropy_coef (GRPO, RLOO: beta), lower the learning "
        "rate, stop earlier",
    )


def check_divergence(stage: str, losses: Sequence[float]) -> Finding:
    """By how much a student's divergence from its teacher changed over the iterations, on a straight line through them.

    Args:
        losses: [iterations], at least `TREND_ITERATIONS`, in nats per token.
    """
    found = score_gain(losses)
    assert found is not None
    change, low, high = found
    return judge(
        stage,
        "divergence",
        change,
        unit=f"nats per token further from the teacher at the end ({losses[-1]:.3g} in the last iteration)",
        threshold="look: above 0 with its interval",
        look=low > 0,
        interval=(low, high),
        remedy="the student leaves its teacher: lower the learning rate, or take more replies a step",
    )


def score_gain(scores: Sequence[float]) -> tuple[float, float, float] | None:
    """By how much the mean score rose from the first to the last iteration on a straight line through all of them, with
    its 95% interval; None with too few iterations for a trend."""
    n = len(scores)
    if n < TREND_ITERATIONS:
        return None
    fit: Any = linregress(np.arange(n), np.asarray(scores))
    half = float(t.ppf(0.975, n - 2)) * float(fit.stderr)
    gain, spread = float(fit.slope) * (n - 1), half * (n - 1)
    return gain, gain - spread, gain + spread


def check_rows(stage: str, read: int, lost: int) -> Finding:
    """Share of the rows that were read and then dropped or truncated."""
    share, interval = lost / read, wilson_interval(lost, read)
    return judge(
        stage,
        "rows lost",
        share,
        interval=interval,
        unit=f"of {read} rows dropped or truncated",
        threshold=f"look: above {ROWS_LOOK}; broken: above {ROWS_BROKEN}",
        broken=share > ROWS_BROKEN,
        look=share > ROWS_LOOK,
        remedy="raise max_length or max_prompt_length of the data entry; preftune validate says which rows and why",
    )


def _last(iterations: int) -> int:
    """Iterations averaged at either end: a third of them, three at most."""
    return max(1, min(3, iterations // 3))
