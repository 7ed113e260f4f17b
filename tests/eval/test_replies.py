"""Metrics of replies: numbers worked out by hand, and a new one that is declared once."""

import dataclasses
import math

import pytest

from preftune.eval import replies as room
from preftune.eval.replies import ReplyMetric, mean_over_replies, measure_replies, repeated_share
from preftune.eval.report.page import render
from preftune.eval.report.read import read_run
from preftune.eval.samples import EncodedPrompt, Sample

from .fake_run import build_run


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


def made(*replies: tuple[list[int], bool]) -> list[Sample]:
    prompt = EncodedPrompt([], [1])
    return [Sample("p", place, prompt, "", tokens, finished) for place, (tokens, finished) in enumerate(replies)]


def test_means_and_their_errors():
    found = measure_replies(made(([7] * 8, False), ([1, 2, 3, 4], True), ([5, 6, 2], True)))
    # lengths 8, 4, 3: mean 5, deviations 3, -1, -2, so a variance of 14 / 2 = 7
    assert (found["length"], found["length_se"]) == (5.0, pytest.approx(math.sqrt(7 / 3)))
    # 0, 1, 1: variance (4 + 1 + 1) / 9 / 2 = 1 / 3
    assert (found["eos_rate"], found["eos_rate_se"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    # 0.8, 0, 0: deviations 1.6 / 3, -0.8 / 3 twice, variance 3.84 / 9 / 2
    assert found["repetition"] == pytest.approx(0.8 / 3)
    assert found["repetition_se"] == pytest.approx(math.sqrt(3.84 / 18 / 3))


def test_one_reply_has_no_error():
    found = measure_replies(made(([1, 2], True)))
    assert (found["length"], found["eos_rate"], found["repetition"]) == (2.0, 1.0, 0.0)
    assert all(math.isnan(found[name]) for name in ("length_se", "eos_rate_se", "repetition_se"))


def test_a_metric_is_declared_once(monkeypatch, tmp_path):
    first = ReplyMetric("starts", mean_over_replies(lambda reply: reply.tokens[0]), "first token", note="So it begins.")
    monkeypatch.setattr(room, "REPLY_METRICS", (*room.REPLY_METRICS, first))
    assert measure_replies(made(([4, 2], True), ([6], True)))["starts"] == 5.0
    run = read_run(build_run(tmp_path / "run"))
    page = render(run)
    # results that were written before the metric was there have no column of it
    assert "first token" not in page and "So it begins." not in page
    results = tuple({**row, "starts": 5.25, "starts_se": 0.5} for row in run.results)
    page = render(dataclasses.replace(run, results=results))
    assert ">first token</th>" in page and "<td>5.2 <small>± 0.5</small></td>" in page and "So it begins." in page
