"""Length control on judges whose favour for length is known, because it was planted."""

import math
import time

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from preftune.eval.statistics.length_control import (
    Fit,
    Judgements,
    Penalty,
    choose_penalty,
    control_length,
    fit,
    length_feature,
    log_losses,
)

QUALITIES = (-2.0, -1.0, 0.0, 0.0, 1.0)
# Mean length difference of each model's replies in their standard deviation: only that parts the third and fourth.
LONGER = (-1.0, 1.0, -1.5, 1.5, 0.0)


def planted(prompts: int, *, effect: float, difficulty: float, seed: int = 0):
    """Probabilities that five models win, their length differences, and what they would win at equal length."""
    rng = np.random.default_rng(seed)
    difference_MX = 400 * (rng.normal(size=(5, prompts)) + np.array(LONGER)[:, None])
    difficulty_X = difficulty * rng.normal(size=prompts)
    equal_MX = np.array(QUALITIES)[:, None] + difficulty_X
    judged_MX = equal_MX + effect * np.tanh(difference_MX / difference_MX.std())
    return expit(judged_MX), difference_MX, expit(equal_MX).mean(axis=1)


def controlled(outcome_MX, difference_MX) -> np.ndarray:
    prompts = [range(outcome_MX.shape[1])] * len(outcome_MX)
    return np.array(control_length(list(outcome_MX), list(difference_MX), prompts))


@pytest.mark.checklist("E3")
def test_e03_the_feature_is_tanh_of_the_standardised_difference():
    feature = length_feature(np.array([-300.0, 0.0, 300.0]))
    assert feature == pytest.approx([math.tanh(-math.sqrt(1.5)), 0.0, math.tanh(math.sqrt(1.5))], abs=1e-15)
    assert feature[1] == 0.0
    assert length_feature(np.array([7.0, 7.0])).tolist() == [0.0, 0.0]


@pytest.mark.checklist("E3")
def test_e03_a_planted_favour_for_length_is_removed():
    wins, differences, truth = planted(400, effect=1.5, difficulty=1.0)
    raw, after = wins.mean(axis=1), controlled(wins, differences)
    assert abs(raw - truth).max() > 0.15
    assert abs(after - truth).max() < 1e-3
    # Two models of one quality, one of them verbose: length alone set them apart.
    assert raw[3] - raw[2] > 0.3
    assert after[3] == pytest.approx(after[2], abs=1e-3)


@pytest.mark.checklist("E3")
def test_e03_a_favour_for_brevity_is_removed_as_well():
    wins, differences, truth = planted(400, effect=-1.5, difficulty=1.0)
    assert abs(wins.mean(axis=1) - truth).max() > 0.15
    assert abs(controlled(wins, differences) - truth).max() < 1e-3


@pytest.mark.checklist("E3")
def test_e03_verdicts_of_all_or_nothing_give_it_within_their_noise():
    wins, differences, truth = planted(800, effect=1.5, difficulty=1.0, seed=1)
    verdicts = (np.random.default_rng(2).random(wins.shape) < wins).astype(float)
    assert abs(verdicts.mean(axis=1) - truth).max() > 0.15
    # 2.5 standard errors of a proportion of 800
    assert abs(controlled(verdicts, differences) - truth).max() < 2.5 * 0.5 / math.sqrt(800)


@pytest.mark.checklist("E3")
def test_e03_without_a_favour_for_length_nothing_changes():
    wins, differences, truth = planted(400, effect=0.0, difficulty=1.0)
    assert controlled(wins, differences) == pytest.approx(truth, abs=5e-4)


@pytest.mark.checklist("E3")
def test_e03_a_model_as_long_as_the_baseline_keeps_its_win_rate():
    wins, differences, _ = planted(300, effect=1.5, difficulty=1.0)
    differences[2] = 0.0
    verdicts = (np.random.default_rng(3).random(wins.shape) < wins).astype(float)
    raw, after = verdicts.mean(axis=1), controlled(verdicts, differences)
    assert after[2] == pytest.approx(raw[2], abs=1e-7)
    assert abs(after - raw)[[0, 1, 3]].min() > 0.01


@pytest.mark.checklist("E3")
def test_e03_one_model_alone():
    rng = np.random.default_rng(4)
    difference = 300 * rng.normal(size=500) + 400
    wins = expit(-0.5 + 1.2 * np.tanh(difference / difference.std()))
    (after,) = control_length([wins], [difference], [range(500)])
    assert wins.mean() > expit(-0.5) + 0.15
    assert after == pytest.approx(expit(-0.5), abs=1e-3)
    (same,) = control_length([wins], [np.zeros(500)], [range(500)])
    assert same == pytest.approx(wins.mean(), abs=1e-6)


@pytest.mark.checklist("E3")
def test_e03_swapping_model_and_baseline_swaps_the_rate():
    wins, differences, _ = planted(200, effect=1.0, difficulty=1.0)
    assert controlled(1 - wins, -differences) == pytest.approx(1 - controlled(wins, differences), abs=1e-7)


def test_one_model_is_an_ordinary_logistic_regression():
    rng = np.random.default_rng(5)
    feature, wins = rng.uniform(-1, 1, 200), rng.integers(0, 2, 200).astype(float)
    alone = Judgements(wins, feature, np.zeros(200, dtype=int), np.arange(200), 1, 200)
    ours = fit(alone, Penalty(length=0.25))
    theirs = LogisticRegression(C=4.0, tol=1e-10, max_iter=1000).fit(feature[:, None], wins)
    assert ours.quality_M[0] == pytest.approx(theirs.intercept_[0], abs=1e-5)
    assert ours.length == pytest.approx(theirs.coef_[0, 0], abs=1e-5)


def judgements(prompts: int, seed: int, difficulty: float) -> Judgements:
    wins, differences, _ = planted(prompts, effect=1.0, difficulty=difficulty, seed=seed)
    verdicts = (np.random.default_rng(seed).random(wins.shape) < wins).astype(float)
    models, places = np.repeat(np.arange(5), prompts), np.tile(np.arange(prompts), 5)
    return Judgements(verdicts.ravel(), length_feature(differences.ravel()), models, places, 5, prompts)


def test_the_fit_is_a_minimum_in_every_direction():
    data, penalty = judgements(60, 6, 1.0), Penalty(0.5, 5.0, 0.01)
    best = fit(data, penalty)

    def objective(found: Fit) -> float:
        squares = penalty.difficulty * (found.difficulty_X**2).sum() + penalty.slope * ((found.slope_M - 1) ** 2).sum()
        return log_losses(found.logits(data), data.outcome_N).sum() + 0.5 * (squares + penalty.length * found.length**2)

    rng, least = np.random.default_rng(0), objective(best)
    for _ in range(50):
        moved = Fit(
            best.quality_M + 0.01 * rng.normal(size=5),
            best.length + 0.01 * rng.normal(),
            best.slope_M + 0.01 * rng.normal(size=5),
            best.difficulty_X + 0.01 * rng.normal(size=60),
        )
        assert objective(moved) > least


def test_difficulties_are_shrunk_where_there_are_none():
    varied, alike = choose_penalty(judgements(150, 7, 2.0)), choose_penalty(judgements(150, 7, 0.0))
    assert varied.difficulty < alike.difficulty


def test_a_missing_verdict_counts_for_nothing():
    wins, differences, _ = planted(100, effect=1.0, difficulty=1.0)
    holes = wins.copy()
    holes[0, 50:] = np.nan
    prompts = [range(50), *4 * [range(100)]]
    shorter = control_length([wins[0, :50], *wins[1:]], [differences[0, :50], *differences[1:]], prompts)
    assert controlled(holes, differences) == pytest.approx(shorter, abs=1e-12)
    assert all(math.isnan(rate) for rate in controlled(np.full((2, 3), np.nan), np.zeros((2, 3))))
    one_unjudged = controlled(np.stack([np.full(100, np.nan), wins[1]]), differences[:2])
    assert math.isnan(one_unjudged[0]) and 0 < one_unjudged[1] < 1


def test_length_that_tells_winners_from_losers_without_fail_stays_finite():
    difference = np.linspace(-1, 1, 40)
    (after,) = control_length([(difference > 0).astype(float)], [difference], [range(40)])
    assert after == pytest.approx(0.5, abs=1e-4)


def test_thousands_of_judgements_take_seconds():
    data = judgements(800, 8, 1.0)
    started = time.process_time()
    choose_penalty(data)
    assert time.process_time() - started < 30
