"""Statistics of replies: numbers worked out by hand."""

import math

import pytest

from preftune.eval.replies import repeated_share, reply_statistics


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0.0),
        ([7, 7, 7], 0.0),  # no 4-gram
        ([7, 7, 7, 7], 0.0),  # one, and nothing before it
        ([7] * 8, 4 / 5),  # five times the same
        ([1, 2, 3, 4, 5, 6, 7], 0.0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # 1234 2341 3412 4123 1234
        ([1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2, 3, 4], 6 / 11),  # five different ones in eleven
    ],
)
def test_repeated_4_grams(tokens, share):
    assert repeated_share(tokens) == pytest.approx(share, abs=1e-12)


def test_shorter_grams():
    assert repeated_share([1, 2, 1, 2, 1], 2) == pytest.approx(0.5)


def test_means_and_their_errors():
    found = reply_statistics([[7] * 8, [1, 2, 3, 4], [5, 6, 2]], [False, True, True])
    # lengths 8, 4, 3: mean 5, deviations 3, -1, -2, so a variance of 14 / 2 = 7
    assert (found.length, found.length_se) == (5.0, pytest.approx(math.sqrt(7 / 3)))
    # 0, 1, 1: variance (4 + 1 + 1) / 9 / 2 = 1 / 3
    assert (found.eos_rate, found.eos_rate_se) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    # 0.8, 0, 0: deviations 1.6 / 3, -0.8 / 3 twice, variance 3.84 / 9 / 2
    assert found.repetition == pytest.approx(0.8 / 3)
    assert found.repetition_se == pytest.approx(math.sqrt(3.84 / 18 / 3))


def test_one_reply_has_no_error():
    found = reply_statistics([[1, 2]], [True])
    assert (found.length, found.eos_rate, found.repetition) == (2.0, 1.0, 0.0)
    assert math.isnan(found.length_se) and math.isnan(found.eos_rate_se) and math.isnan(found.repetition_se)


def test_replies_and_their_ends_must_match():
    with pytest.raises(ValueError, match="2 replies and 1 ends"):
        reply_statistics([[1], [2]], [True])
