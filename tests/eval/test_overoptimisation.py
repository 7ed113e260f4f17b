"""Best of n against every subset, and fits that must find what made their points."""

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from preftune.eval.statistics.overoptimisation import (
    BEST_OF_N,
    RL,
    Fit,
    best_of,
    best_of_kl,
    best_of_weights,
    counts,
    fit_gain,
)

D = [0.5, 0.9, 1.4, 2.0, 2.9, 4.1]
TRUE = {RL: lambda d, a, b: d * (a - b * math.log(d)), BEST_OF_N: lambda d, a, b: d * (a - b * d)}


def enumerated(proxy: list[float], value: list[float], n: int) -> float:
    """The mean over all subsets of n; a tie is decided by a fair draw."""
    means = []
    for subset in combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        means.append(np.mean([value[i] for i in subset if proxy[i] == best]))
    return float(np.mean(means))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_best_of_n_is_the_mean_over_all_subsets(n: int, levels: int):
    rng = np.random.default_rng(n * levels)
    proxy, value = rng.integers(0, levels, (4, 7)).astype(float), rng.normal(size=(4, 7))
    expected = [enumerated(p.tolist(), v.tolist(), n) for p, v in zip(proxy, value, strict=True)]
    assert best_of(proxy, value, n) == pytest.approx(expected, abs=1e-12)


def test_best_of_n_by_hand():
    proxy, value = np.array([[3.0, 1.0, 2.0]]), np.array([[10.0, 20.0, 60.0]])
    # of the pairs (3,1) (3,2) (1,2) the proxy takes 10, 10 and 60
    assert best_of(proxy, value, 2) == pytest.approx([80 / 3])
    assert best_of(proxy, value, 3) == pytest.approx([10.0])
    assert best_of_weights(3, 2) == pytest.approx([0, 1 / 3, 2 / 3])
    assert best_of_weights(2000, 700).sum() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="expected 1 to 3"):
        best_of(proxy, value, 4)


def test_places_of_best_of_n():
    assert (counts(2), counts(8), counts(12)) == ([1, 2], [1, 2, 4, 8], [1, 2, 4, 8, 12])
    assert best_of_kl(1) == 0
    assert best_of_kl(4) == pytest.approx(0.6362943611)


def fitted(*given: Any) -> Fit:
    fit = fit_gain(*given)
    assert fit is not None
    return fit


@pytest.mark.parametrize("form", [RL, BEST_OF_N])
def test_a_fit_finds_what_made_its_points(form):
    d, gain = [0.0, *D], [0.0, *(TRUE[form](d, 1.7, 0.6) for d in D)]
    for covariance in (np.zeros((7, 7)), np.diag([0, 1, 2, 3, 4, 5, 6.0])):
        fit = fitted(form, d, gain, covariance)
        assert (fit.alpha, fit.beta, fit.points) == (pytest.approx(1.7, abs=1e-12), pytest.approx(0.6, abs=1e-12), 6)
    assert fitted(form, d, gain, np.zeros((7, 7))).alpha_se == 0


@pytest.mark.parametrize("form", [RL, BEST_OF_N])
def test_a_fit_of_noisy_points_knows_its_error(form):
    """Over many draws: unbiased, and the stated standard error is the spread; also where points share their noise."""
    rng = np.random.default_rng(5)
    shape = np.array([0.02, 0.05, 0.03, 0.08, 0.06, 0.10])
    for covariance in (np.diag(shape**2), np.outer(shape, shape) * (0.3 * np.eye(6) + 0.7)):
        truth = np.array([TRUE[form](d, 1.7, 0.6) for d in D])
        fits = [fitted(form, D, y, covariance) for y in rng.multivariate_normal(truth, covariance, 400)]
        assert all(abs(fit.alpha - 1.7) < 4 * fit.alpha_se and abs(fit.beta - 0.6) < 4 * fit.beta_se for fit in fits)
        for name, true in (("alpha", 1.7), ("beta", 0.6)):
            found = np.array([getattr(fit, name) for fit in fits])
            stated = getattr(fits[0], f"{name}_se")
            assert abs(found.mean() - true) < 3 * stated / 20
            # the spread of 400 draws is known to a twenty-eighth
            assert found.std() == pytest.approx(stated, rel=0.12)


def test_a_precise_point_weighs_more():
    d, line = [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 14.0]
    fit = fitted(BEST_OF_N, d, line, np.diag([1e-8, 1e-8, 1e-8, 1e4]))
    assert (fit.alpha, fit.beta) == (pytest.approx(1.0, abs=1e-6), pytest.approx(0.0, abs=1e-6))
    assert abs(fitted(BEST_OF_N, d, line, np.eye(4)).beta) > 0.1


def test_peaks_only_where_something_was_measured():
    def peak(form, alpha, beta, furthest):
        d = np.linspace(0.1, furthest, 5)
        return fitted(form, d, [TRUE[form](x, alpha, beta) for x in d], np.eye(5)).peak

    assert peak(BEST_OF_N, 2.0, 0.5, 2.5) == pytest.approx(2.0)
    assert peak(BEST_OF_N, 2.0, 0.5, 1.9) is None
    assert peak(RL, 1.0, 0.5, 3.0) == pytest.approx(math.e)
    assert peak(RL, 1.0, 0.5, 2.7) is None
    assert peak(RL, 1.0, -0.5, 3.0) is None and peak(BEST_OF_N, -1.0, 0.5, 3.0) is None
    assert peak(RL, 1.0, 1e-9, 3.0) is None


def test_too_few_points_give_no_fit():
    assert fit_gain(RL, [0.0, 1.0, 2.0], [0.0, 1.0, 1.5], np.eye(3)) is None
    assert fit_gain(RL, [0.0, 1.0, 1.0, 2.0], [0.0, 1.0, 1.0, 1.5], np.eye(4)) is None
