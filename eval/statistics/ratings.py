"""Bradley-Terry ratings of policies from all pairs of them, with intervals from a bootstrap over prompts (E2).

P(i beats j) = 1 / (1 + exp(s_j - s_i)) (Bradley and Terry 1952), a tie being half a win to each. The ratings s are
log-odds and their mean is 0: a policy that stands 1 above another is expected to win 73% of its comparisons with it.
(Elo points are 400 / ln 10 = 173.7 times that.) Half a win is added to either side of every pair that was compared,
which keeps the ratings finite where one side always won and removes the first-order bias of log-odds (Haldane 1956).

Shape suffixes: N prompts, P pairs, K policies, D bootstrap draws.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from .intervals import DRAWS

PSEUDO_WINS = 0.5


@dataclass(frozen=True)
class Rating:
    """One policy's rating in log-odds with its interval; all nan where the policies were not compared."""

    log_odds: float
    low: float
    high: float


def bradley_terry(wins_DP: np.ndarray, counts_DP: np.ndarray, pairs: Sequence[tuple[int, int]], k: int) -> np.ndarray:
    """[D, K] ratings of mean 0, each row fitted to its own counts by maximum likelihood.

    Args:
        wins_DP: of the pair's first policy, ties one half; may be fractional.
        counts_DP: comparisons of the pair.
        pairs: [P] the two policies of each pair, whole numbers below `k`. They must join all policies.
    """
    first_P, second_P = np.array([i for i, _ in pairs]), np.array([j for _, j in pairs])
    # Adding up over pairs what each gives to its first and takes from its second policy.
    ends_PK = np.eye(k)[first_P] - np.eye(k)[second_P]
    total = counts_DP.sum()

    # One convex problem whose rows do not touch each other, so that one call solves all draws.
    def loss(vector: np.ndarray) -> tuple[float, np.ndarray]:
        gap_DP = vector.reshape(-1, k) @ ends_PK.T
        value = (counts_DP * np.logaddexp(0.0, gap_DP) - wins_DP * gap_DP).sum()
        gradient_DK = (counts_DP * expit(gap_DP) - wins_DP) @ ends_PK
        return value / total, gradient_DK.ravel() / total

    start = np.zeros(len(wins_DP) * k)
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 0.0, "gtol": 1e-8 / len(wins_DP)}
    ratings_DK = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x.reshape(-1, k)
    return ratings_DK - ratings_DK.mean(axis=1, keepdims=True)


def rate_policies(
    policies: Sequence[str],
    outcomes: Mapping[tuple[str, str], np.ndarray],
    *,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Rating]:
    """Ratings of all policies from the outcomes of their pairs.

    Args:
        outcomes: (policy, other) -> [N] outcomes of the policy on the same prompts, nan where there is no verdict; one
            order of each pair is enough.
        level: of the percentile intervals; a prompt is drawn with all its comparisons.

    Returns:
        One rating per policy. All nan where comparisons do not join all policies: nothing can be said across the gap.
    """
    named = [pair for pair in combinations(policies, 2) if pair in outcomes and not np.isnan(outcomes[pair]).all()]
    place = {policy: index for index, policy in enumerate(policies)}
    pairs = [(place[ours], place[theirs]) for ours, theirs in named]
    if not _joined(pairs, len(policies)):
        return dict.fromkeys(policies, Rating(math.nan, math.nan, math.nan))
    outcome_NP = np.stack([outcomes[pair] for pair in named], axis=1)
    # in an order of their own: the draws are of places, and an interval must not depend on how the prompts came
    ordered = sorted(named, key=sorted)
    columns = [outcomes[pair] if pair[0] < pair[1] else 1 - outcomes[pair] for pair in ordered]
    outcome_NP = outcome_NP[np.lexsort(columns)]
    usable_NP = ~np.isnan(outcome_NP)
    wins_NP = np.where(usable_NP, outcome_NP, 0.0)
    n = len(outcome_NP)
    # The first row is everything once; the others are the draws.
    resampled_DN = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    weights_DN = np.concatenate([np.ones((1, n)), resampled_DN])
    wins_DP = weights_DN @ wins_NP + PSEUDO_WINS
    counts_DP = weights_DN @ usable_NP + 2 * PSEUDO_WINS
    ratings_DK = bradley_terry(wins_DP, counts_DP, pairs, len(policies))
    low_K, high_K = np.quantile(ratings_DK[1:], [0.5 - level / 2, 0.5 + level / 2], axis=0)
    numbers = zip(ratings_DK[0].tolist(), low_K.tolist(), high_K.tolist(), strict=True)
    return {policy: Rating(*each) for policy, each in zip(policies, numbers, strict=True)}


def _joined(pairs: Sequence[tuple[int, int]], k: int) -> bool:
    """Whether a chain of pairs leads from every policy to every other."""
    if not pairs:
        return False
    rows, columns = zip(*pairs, strict=True)
    count, _ = connected_components(coo_array((np.ones(len(pairs)), (rows, columns)), shape=(k, k)), directed=False)
    return count == 1
