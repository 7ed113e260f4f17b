"""Bradley-Terry ratings: by hand, against sums that they must meet, and by simulation."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest
from scipy.special import expit

from preftune.eval.statistics.ratings import bradley_terry, rate_policies

POLICIES = ["base", "sft", "dpo", "ppo"]


def simulated(rng: np.random.Generator, log_odds, n: int, ties: float = 0.0) -> dict:
    outcomes = {}
    for (i, ours), (j, theirs) in combinations(list(enumerate(POLICIES)), 2):
        wins = (rng.random(n) < expit(log_odds[i] - log_odds[j])).astype(float)
        outcomes[ours, theirs] = np.where(rng.random(n) < ties, 0.5, wins)
    return outcomes


def test_two_policies_by_hand():
    outcomes = {("a", "b"): np.array([1.0] * 7 + [0.0] * 2 + [0.5])}
    rated = rate_policies(["a", "b"], outcomes)
    # 7.5 wins and 2.5 losses, half a win added to each
    assert rated["a"].log_odds == pytest.approx(0.5 * math.log(8 / 3), abs=1e-7)
    assert rated["b"].log_odds == pytest.approx(-rated["a"].log_odds, abs=1e-12)
    assert rated["a"].low < rated["a"].log_odds < rated["a"].high
    assert (rated["b"].low, rated["b"].high) == pytest.approx((-rated["a"].high, -rated["a"].low), abs=1e-12)


def test_expected_wins_are_the_wins_in_every_row():
    rng, pairs = np.random.default_rng(0), list(combinations(range(4), 2))
    counts = rng.integers(5, 40, size=(20, 6)).astype(float)
    wins = counts * rng.uniform(0.1, 0.9, size=(20, 6))
    ratings = bradley_terry(wins, counts, pairs, 4)
    assert ratings.sum(axis=1) == pytest.approx(np.zeros(20), abs=1e-12)
    for row in range(20):
        for policy in range(4):
            actual = expected = 0.0
            for (i, j), won, met in zip(pairs, wins[row], counts[row], strict=True):
                if policy in (i, j):
                    mine, other = (i, j) if policy == i else (j, i)
                    actual += won if policy == i else met - won
                    expected += met * expit(ratings[row, mine] - ratings[row, other])
            assert expected == pytest.approx(actual, abs=1e-4)


def test_the_order_of_the_policies_does_not_matter():
    outcomes = simulated(np.random.default_rng(1), (-1.0, 0.0, 0.5, 0.5), 80, ties=0.2)
    both = outcomes | {(theirs, ours): 1 - each for (ours, theirs), each in outcomes.items()}
    first = rate_policies(POLICIES, both, draws=200)
    for order in list(permutations(POLICIES))[:5]:
        again = rate_policies(order, both, draws=200)
        for policy in POLICIES:
            for field in ("log_odds", "low", "high"):
                assert getattr(again[policy], field) == pytest.approx(getattr(first[policy], field), abs=1e-6)


def test_one_that_always_wins_is_rated_finitely():
    rated = rate_policies(["a", "b"], {("a", "b"): np.ones(30)})
    assert rated["a"].log_odds == pytest.approx(0.5 * math.log(61), abs=1e-6)


def test_a_policy_without_comparisons_leaves_nothing_to_say():
    outcomes = {("a", "b"): np.ones(5), ("a", "c"): np.full(5, np.nan)}
    assert all(math.isnan(rating.log_odds) for rating in rate_policies(["a", "b", "c"], outcomes).values())
    assert math.isnan(rate_policies(["a"], {})["a"].log_odds)


def test_missing_verdicts_count_for_nothing():
    outcomes = simulated(np.random.default_rng(2), (-1.0, 0.0, 0.5, 0.5), 40)
    padded = {pair: np.concatenate([each, np.full(9, np.nan)]) for pair, each in outcomes.items()}
    ours, theirs = rate_policies(POLICIES, outcomes, draws=10), rate_policies(POLICIES, padded, draws=10)
    assert [each.log_odds for each in ours.values()] == pytest.approx(
        [each.log_odds for each in theirs.values()], abs=1e-6
    )


@pytest.mark.checklist("E2")
def test_e02_intervals_of_ratings_cover_the_truth_as_often_as_they_say():
    truth, rng, covered = (-1.0, -0.2, 0.4, 0.8), np.random.default_rng(3), 0
    for run in range(300):
        rated = rate_policies(POLICIES, simulated(rng, truth, 150), draws=500, seed=run)
        covered += sum(
            rated[policy].low <= value <= rated[policy].high for policy, value in zip(POLICIES, truth, strict=True)
        )
    # Four policies share their comparisons, so that 1,200 intervals tell about as much as 900.
    assert 0.93 <= covered / 1200 <= 0.97


def test_a_prompts_comparisons_are_drawn_together():
    """What comes out alike on a prompt counts once: its interval is wider than that of three independent pairs."""
    rng = np.random.default_rng(4)
    shared = (rng.random(100) < 0.6).astype(float)
    apart = {pair: (rng.random(100) < 0.6).astype(float) for pair in (("a", "b"), ("a", "c"), ("a", "d"))}
    together = dict.fromkeys(apart, shared)
    wide, narrow = (rate_policies(["a", "b", "c", "d"], each)["a"] for each in (together, apart))
    assert (wide.high - wide.low) > 1.4 * (narrow.high - narrow.low)
