"""The mathematics of over-optimisation (Gao, Schulman and Hilton, arXiv 2210.10760): best of n, and fits against KL.

d = sqrt(KL), gain R = mean score less that of the policy where optimisation starts:

    best of n   R(d) = d (alpha - beta d)
    RL          R(d) = d (alpha - beta log d)

Shape suffixes: P prompts, N replies to one prompt, M points of a curve.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

BEST_OF_N, RL = "d (alpha - beta d)", "d (alpha - beta log d)"
Form = Literal["d (alpha - beta d)", "d (alpha - beta log d)"]
LEAST_POINTS = 3


@dataclass(frozen=True)
class Fit:
    """One judge's gain as a function of d, in the judge's units.

    Attributes:
        alpha, beta: of the form.
        alpha_se, beta_se: their standard errors over prompts; the error of the KL is not in them.
        peak: the d of the highest gain where it lies within the measured range, else None.
        points: how many were fitted.
    """

    alpha: float
    alpha_se: float
    beta: float
    beta_se: float
    peak: float | None
    points: int


def best_of_weights(total: int, n: int) -> np.ndarray:
    """[N] chance that the i-th smallest of `total` replies is the best of n drawn from them without replacement.

    C(i - 1, n - 1) / C(N, n) for i = 1..N (Nakano et al., arXiv 2112.09332, section 3.2 and appendix).
    """
    if not 1 <= n <= total:
        raise ValueError(f"n is {n}, expected 1 to {total}, the number of replies")
    return np.array([math.comb(i, n - 1) / math.comb(total, n) for i in range(total)])


def best_of(proxy_PN: np.ndarray, value_PN: np.ndarray, n: int) -> np.ndarray:
    """[P] mean value of the reply that the proxy picks from n, over all subsets of n of a prompt's N replies.

    Among replies with the same proxy score each is picked equally often.
    """
    weights_N = best_of_weights(proxy_PN.shape[1], n)
    return np.array([_picked(*row, weights_N) for row in zip(proxy_PN, value_PN, strict=True)])


def _picked(proxy_N: np.ndarray, value_N: np.ndarray, weights_N: np.ndarray) -> float:
    """Of one prompt: scores in the order of the proxy, groups of equal scores sharing their weights."""
    _, group_N, size_G = np.unique(proxy_N, return_inverse=True, return_counts=True)
    starts_G = np.cumsum(size_G) - size_G
    share_G = np.add.reduceat(weights_N, starts_G) / size_G
    return float(share_G[group_N] @ value_N)


def best_of_kl(n: int) -> float:
    """log n - (n - 1) / n, in nats per reply: an upper bound on the KL of best of n (Beirami et al., 2401.01879)."""
    return math.log(n) - (n - 1) / n


def counts(best_of: int) -> list[int]:
    """1, 2, 4, ... and `best_of` itself."""
    powers = [2**power for power in range(best_of.bit_length()) if 2**power < best_of]
    return [*powers, best_of]


def fit_gain(form: Form, d_M: Sequence[float], gain_M: Sequence[float], covariance_MM: Any) -> Fit | None:
    """Least squares of the form, weighted by 1 / SE^2 of the gains.

    Points of one run share prompts (best of n even replies), so the standard errors follow from the whole covariance
    of the gains and not from their variances alone.

    Args:
        d_M: sqrt(KL); points at 0 are left out, where both forms are 0.
        covariance_MM: of the gains' means; a point without an error of its own has the smallest of the others'.

    Returns:
        None with fewer than `LEAST_POINTS` points at different places off zero.
    """
    d, gain, covariance = (np.asarray(each, dtype=np.float64) for each in (d_M, gain_M, covariance_MM))
    off = d > 0
    d, gain, covariance = d[off], gain[off], covariance[np.ix_(off, off)]
    if len(np.unique(d)) < LEAST_POINTS:
        return None
    design = np.stack([d, -d * (np.log(d) if form == RL else d)], axis=1)
    sigma = _sigmas(covariance)
    # theta = pinv(X / sigma) (y / sigma), so cov(theta) follows from cov(y) without another assumption
    inverse = np.linalg.pinv(design / sigma[:, None]) / sigma
    alpha, beta = (inverse @ gain).tolist()
    errors = np.sqrt(np.clip(np.diag(inverse @ np.nan_to_num(covariance) @ inverse.T), 0.0, None)).tolist()
    top = peak(form, alpha, beta)
    return Fit(alpha, errors[0], beta, errors[1], top if top is not None and top <= d.max() else None, len(d))


def _sigmas(covariance: np.ndarray) -> np.ndarray:
    """[M] standard errors, all above 0; all 1 where there are none."""
    sigma = np.sqrt(np.clip(np.nan_to_num(np.diag(covariance)), 0.0, None))
    known = sigma > 0
    return np.where(known, sigma, sigma[known].min() if known.any() else 1.0)


def gain(form: Form, alpha: float, beta: float, d: np.ndarray | float) -> Any:
    """The form's gain at d > 0, in the judge's units."""
    return d * (alpha - beta * (d if form == BEST_OF_N else np.log(d)))


def peak(form: Form, alpha: float, beta: float) -> float | None:
    """The d of the highest gain; None where it rises without end, or falls from the start."""
    if beta <= 0 or (form == BEST_OF_N and alpha <= 0):
        return None
    # the logarithm is held first: exp could overflow
    return alpha / (2 * beta) if form == BEST_OF_N else math.exp(min(alpha / beta - 1, 700.0))
