"""Reward-model metrics: hand-computed numbers and the traps they guard against."""

import math

import numpy as np
import pytest

from preftune.eval.statistics.pair_ordering import calibration_bins, calibration_error, log_loss, pair_metrics


@pytest.mark.checklist("R5")
def test_r05_an_all_equal_model_has_accuracy_one_half():
    metrics = pair_metrics([0.3] * 40, [0.3] * 40, [5] * 40, [9] * 40)
    assert metrics["accuracy"] == 0.5
    assert metrics["ties"] == 40
    assert metrics["log_loss"] == pytest.approx(math.log(2))
    assert metrics["calibration_error"] == pytest.approx(0.0)


@pytest.mark.checklist("R6")
def test_r06_everything_is_reported_beside_the_length_baselines():
    metrics = pair_metrics([2.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0], [9, 4, 4, 7], [5, 5, 5, 7])
    assert metrics["accuracy"] == pytest.approx(2.5 / 4)
    assert metrics["ci_low"] < metrics["accuracy"] < metrics["ci_high"]
    assert metrics["longer_wins"] == pytest.approx(1.5 / 4)
    assert metrics["shorter_wins"] == pytest.approx(2.5 / 4)
    assert metrics["margin_mean"] == pytest.approx(0.5)


def test_log_loss_of_a_sure_model():
    assert log_loss([50.0, 50.0]) == pytest.approx(0.0, abs=1e-12)
    assert log_loss([-1000.0]) == pytest.approx(1000.0)


def test_calibration_of_draws_from_its_own_probabilities():
    rng = np.random.default_rng(0)
    margins = np.abs(rng.normal(size=20000)) * 2
    agrees = rng.random(20000) < 1 / (1 + np.exp(-margins))
    assert calibration_error(np.where(agrees, margins, -margins)) < 0.02
    # Sure of itself and right half the time: off by one half.
    assert calibration_error(np.tile([30.0, -30.0], 50)) == pytest.approx(0.5)


def test_pairs_of_one_prompt_stay_together():
    rng = np.random.default_rng(1)
    good = rng.integers(0, 2, 30).astype(float)
    chosen, zeros, lengths = np.repeat(good, 6).tolist(), [0.5] * 180, [1] * 180
    together = pair_metrics(chosen, zeros, lengths, lengths, prompts=np.repeat(np.arange(30), 6).tolist())
    apart = pair_metrics(chosen, zeros, lengths, lengths)
    assert together["ci_high"] - together["ci_low"] > 1.8 * (apart["ci_high"] - apart["ci_low"])


def margin(probability: float) -> float:
    """The margin at which the favoured side has this probability."""
    return math.log(probability / (1 - probability))


def test_calibration_bins_by_hand():
    # sure by 0.52 and 0.54 (one right, one wrong), by 0.97 three times (two right), and one tie
    margins = [margin(0.52), -margin(0.54), margin(0.97), margin(0.97), -margin(0.97), 0.0]
    first, last = calibration_bins(margins)
    assert (first["low"], first["high"], first["n"]) == (0.5, pytest.approx(0.55), 3)
    assert first["confidence"] == pytest.approx((0.52 + 0.54 + 0.5) / 3)
    assert first["accuracy"] == pytest.approx(1.5 / 3)
    assert (last["low"], last["high"], last["n"]) == (pytest.approx(0.95), 1.0, 3)
    assert (last["confidence"], last["accuracy"]) == (pytest.approx(0.97), pytest.approx(2 / 3))
    # Wilson's interval of 2 in 3
    assert (last["ci_low"], last["ci_high"]) == (pytest.approx(0.20765, abs=1e-5), pytest.approx(0.93851, abs=1e-5))
    assert calibration_error(margins) == pytest.approx((3 * 0.02 + 3 * (0.97 - 2 / 3)) / 6)
    # one bin for all: what is too sure in one place makes up for what is too timid in another
    (only,) = calibration_bins(margins, 1)
    assert (only["low"], only["high"], only["n"]) == (0.5, 1.0, 6)
    assert calibration_error(margins, 1) == pytest.approx((0.52 + 0.54 + 3 * 0.97 + 0.5) / 6 - 3.5 / 6)


def test_bins_take_in_every_pair_once_and_metrics_agree_with_them():
    margins = np.random.default_rng(2).normal(scale=3, size=200)
    zeros, lengths = [0.0] * 200, [1] * 200
    metrics = pair_metrics(margins.tolist(), zeros, lengths, lengths)
    bins = metrics["calibration"]
    assert sum(each["n"] for each in bins) == 200
    assert all(each["low"] <= each["confidence"] <= each["high"] for each in bins)
    assert sum(each["n"] * each["accuracy"] for each in bins) / 200 == pytest.approx(metrics["accuracy"])
    assert metrics["calibration_error"] == pytest.approx(calibration_error(margins))
    # a margin so large that its probability rounds to 1 has its place in the last bin
    assert calibration_bins([800.0])[0]["high"] == 1.0
