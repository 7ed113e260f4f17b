"""Intervals and standard errors against scipy, hand-computed numbers and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from preftune.eval.statistics.intervals import bootstrap_interval, mean_se, ratio_se, unit_totals, wilson_interval


@pytest.mark.parametrize(("k", "n"), [(0, 20), (20, 20), (7, 20), (150, 300)])
def test_wilson_is_scipys(k: int, n: int):
    theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson_interval(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_without_trials_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_units_keep_their_values_together():
    sums, counts = unit_totals([1, 0, 1, 1], ["b", "a", "b", "c"])
    assert sums.tolist() == [2, 0, 1]
    assert counts.tolist() == [2, 1, 1]


def test_bootstrap_is_seeded():
    values = np.random.default_rng(0).random(50).tolist()
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_bootstrap_width_is_that_of_the_normal_interval():
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval(values.tolist(), draws=4000)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.06)


def test_repeating_every_value_within_its_unit_changes_nothing():
    values = np.random.default_rng(2).random(40).tolist()
    thrice = [value for value in values for _ in range(3)]
    units = [place for place in range(40) for _ in range(3)]
    assert bootstrap_interval(thrice, units) == pytest.approx(bootstrap_interval(values), abs=1e-12)


def test_one_unit_has_no_interval():
    assert all(math.isnan(bound) for bound in bootstrap_interval([1.0, 0.0], ["a", "a"]))


def test_mean_se_by_hand():
    assert mean_se([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, math.sqrt(14 / 3) / 2))
    assert math.isnan(mean_se([1.0])[1])


def test_ratio_of_equal_sizes_is_the_mean():
    totals = [2.0, 4.0, 9.0]
    ratio, se = ratio_se(totals, [2, 2, 2])
    mean, mean_error = mean_se([1.0, 2.0, 4.5])
    assert (ratio, se) == pytest.approx((mean, mean_error))


def test_ratio_that_never_varies_has_no_error():
    assert ratio_se([1.0, 2.0, 5.0], [2, 4, 10]) == pytest.approx((0.5, 0.0))
