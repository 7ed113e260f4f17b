"""Win-rates: ties, both orders, verdicts that nobody can parse, intervals over prompts."""

import math

import numpy as np
import pytest

from preftune.eval.statistics.winrate import against_itself, order_outcomes, score_outcomes, win_rate


@pytest.mark.checklist("E1")
def test_e01_ties_count_one_half():
    outcomes = score_outcomes([1.0, 0.2, 0.5, 0.5], [0.0, 0.9, 0.5, 0.5])
    assert outcomes.tolist() == [1.0, 0.0, 0.5, 0.5]
    rate = win_rate(outcomes)
    assert (rate.win_rate, rate.wins, rate.losses, rate.ties, rate.n) == (0.5, 1, 1, 2, 4)


@pytest.mark.checklist("E1")
def test_e01_a_judge_that_always_prefers_the_first_reply_gives_one_half():
    assert order_outcomes([1, 1, 1], [1, 1, 1]).tolist() == [0.5, 0.5, 0.5]


@pytest.mark.checklist("E1")
def test_e01_half_the_sum_of_both_orders():
    # policy first: win, win, tie; reference first: the first reply (the reference) loses, wins, loses
    assert order_outcomes([1, 1, 0.5], [0, 1, 0]).tolist() == [1.0, 0.5, 0.75]


@pytest.mark.checklist("E1")
def test_e01_an_unparsable_verdict_is_reported_and_never_counted():
    outcomes = order_outcomes([1, None, 1, None], [0, 0, None, None])
    assert np.isnan(outcomes).tolist() == [False, True, True, True]
    rate = win_rate(outcomes)
    assert (rate.n, rate.unparsable, rate.win_rate) == (1, 3, 1.0)
    nothing = win_rate([math.nan, math.nan])
    assert (nothing.n, nothing.unparsable) == (0, 2)
    assert math.isnan(nothing.win_rate)


def test_a_missing_score_is_a_missing_verdict():
    assert np.isnan(score_outcomes([math.nan, 1.0], [0.0, math.nan])).all()
    assert score_outcomes([-math.inf], [-math.inf]).tolist() == [0.5]


def test_policy_and_reference_add_up_to_one():
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 4, 200).tolist(), rng.integers(0, 4, 200).tolist()
    forward, backward = win_rate(score_outcomes(ours, theirs)), win_rate(score_outcomes(theirs, ours))
    assert forward.win_rate + backward.win_rate == pytest.approx(1.0)
    assert (forward.wins, forward.ties) == (backward.losses, backward.ties)


def judged_once(rng: np.random.Generator):
    """Wins, ties and losses, one a prompt; a win-rate of 0.6 + 0.2 / 2."""
    return rng.choice([1.0, 0.5, 0.0], size=200, p=[0.6, 0.2, 0.2]), None, 0.7


def judged_close_to_certain(rng: np.random.Generator):
    return (rng.random(300) < 0.9).astype(float), None, 0.9


def judged_thrice_in_both_orders(rng: np.random.Generator):
    """Three samples a prompt, whose win probability belongs to the prompt, read in both orders by a judge that takes
    whatever stands first in three of ten cases."""
    chance = np.repeat(rng.beta(2, 2, size=150), 3)
    wins = (rng.random((2, 450)) < chance).astype(float)
    biased = rng.random((2, 450)) < 0.3
    first, second = np.where(biased, 1.0, [wins[0], 1 - wins[1]])
    return order_outcomes(first.tolist(), second.tolist()), np.repeat(np.arange(150), 3).tolist(), 0.5


@pytest.mark.checklist("E2")
@pytest.mark.parametrize("judge", [judged_once, judged_close_to_certain, judged_thrice_in_both_orders])
def test_e02_interval_covers_the_truth_as_often_as_it_says(judge):
    rng = np.random.default_rng(0)
    covered = 0
    for run in range(1000):
        outcomes, prompts, truth = judge(rng)
        rate = win_rate(outcomes, prompts, draws=1000, seed=run)
        covered += rate.ci_low <= truth <= rate.ci_high
    assert 930 <= covered <= 970


@pytest.mark.checklist("E2")
def test_e02_outcomes_of_one_prompt_stay_together():
    rng = np.random.default_rng(1)
    per_prompt = rng.integers(0, 2, 50).astype(float)
    alone = win_rate(per_prompt)
    repeated = win_rate(np.repeat(per_prompt, 8), np.repeat(np.arange(50), 8).tolist())
    assert repeated.n == 50
    assert (repeated.ci_low, repeated.ci_high) == pytest.approx((alone.ci_low, alone.ci_high))
    as_if_independent = win_rate(np.repeat(per_prompt, 8))
    assert as_if_independent.ci_high - as_if_independent.ci_low < 0.5 * (alone.ci_high - alone.ci_low)


@pytest.mark.checklist("E2")
def test_e02_three_hundred_prompts_give_about_six_points():
    rate = win_rate(np.repeat([1.0, 0.0], 150), draws=4000)
    assert (rate.ci_high - rate.ci_low) / 2 == pytest.approx(0.057, abs=0.004)
    assert rate.n == 300


def test_twenty_wins_of_twenty_are_not_certainty():
    rate = win_rate([1.0] * 20)
    assert rate.win_rate == rate.ci_high == 1.0
    assert 0.8 < rate.ci_low < 0.9


def test_the_reference_against_itself():
    itself = against_itself(7)
    assert (itself.win_rate, itself.ci_low, itself.ci_high, itself.ties) == (0.5, 0.5, 0.5, 7)


def test_outcomes_beyond_their_range_are_refused():
    with pytest.raises(ValueError, match="within 0 and 1"):
        win_rate([2.0, 0.0])
