"""From a judge's verdicts on all pairs to the columns of results.json."""

import math

import numpy as np
import pytest
from scipy.special import expit

from preftune.eval.judges.verdicts import COLUMNS, LENGTH_CONTROL_PROMPTS, Verdicts, verdict_columns
from preftune.eval.samples import EncodedPrompt, Sample
from preftune.eval.statistics.winrate import score_outcomes, win_rate


def replies(policy: str, lengths) -> list[Sample]:
    prompt = EncodedPrompt([], [1])
    return [Sample(policy, place, prompt, "x" * n, [3] * n, True) for place, n in enumerate(lengths)]


class CountingJudge:
    name = "longest"

    def score(self, samples):
        return [float(len(sample.tokens)) for sample in samples]


class PairwiseJudge:
    """Knows the outcomes beforehand."""

    name = "pairwise"

    def __init__(self, outcomes):
        self.outcomes = outcomes

    def compare(self, policy, other):
        return self.outcomes[policy[0].policy, other[0].policy]


class RoundingJudge:
    """Scores that no two calls agree on in their last digits."""

    name = "rounding"
    calls = 0

    def score(self, samples):
        self.calls += 1
        return [len(sample.tokens) + 1e-3 * self.calls for sample in samples]


def test_what_two_policies_both_say_is_a_tie():
    lengths = {"sft": [5, 6, 7], "dpo": [5, 2, 7], "ppo": [9, 2, 7]}
    verdicts = Verdicts.of(RoundingJudge(), {policy: replies(policy, each) for policy, each in lengths.items()})
    assert verdicts.outcomes["dpo", "sft"].tolist() == [0.5, 0.0, 0.5]
    assert verdicts.outcomes["ppo", "dpo"].tolist() == [1.0, 0.5, 0.5]
    assert verdicts.scores["ppo"] == pytest.approx([9.003, 2.002, 7.001])
    # at another prompt the same words are another reply
    both = Verdicts.of(RoundingJudge(), {"sft": replies("sft", [5, 6]), "dpo": replies("dpo", [6, 5])})
    assert both.scores["dpo"] == pytest.approx([6.002, 5.002])


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    lengths = {policy: rng.integers(1, 30, size=60).tolist() for policy in ("sft", "dpo", "ppo")}
    samples = {policy: replies(policy, each) for policy, each in lengths.items()}
    return Verdicts.of(CountingJudge(), samples), lengths


def test_the_matrix_holds_every_pair_in_both_directions(scored):
    verdicts, lengths = scored
    columns = verdict_columns(verdicts, lengths, "sft", seed=3)
    assert [list(each) for each in columns.values()] == [list(COLUMNS)] * 3
    for policy, said in columns.items():
        assert list(said["against"]) == [other for other in lengths if other != policy]
        for other, cell in said["against"].items():
            direct = win_rate(score_outcomes(lengths[policy], lengths[other]), seed=3)
            assert cell == {"win_rate": direct.win_rate, "ci_low": direct.ci_low, "ci_high": direct.ci_high, "n": 60}
            assert cell["win_rate"] + columns[other]["against"][policy]["win_rate"] == pytest.approx(1.0, abs=1e-12)
        if policy != "sft":
            assert {key: said[key] for key in ("win_rate", "ci_low", "ci_high", "n")} == said["against"]["sft"]
        assert said["mean_score"] == pytest.approx(np.mean(lengths[policy]))
    reference = columns["sft"]
    assert (reference["win_rate"], reference["length_controlled_win_rate"], reference["ties"]) == (0.5, 0.5, 60)


def test_ratings_stand_in_the_order_of_the_win_rates(scored):
    verdicts, lengths = scored
    columns = verdict_columns(verdicts, lengths, "sft", seed=0)
    assert sum(said["rating_log_odds"] for said in columns.values()) == pytest.approx(0.0, abs=1e-9)
    total = {policy: sum(cell["win_rate"] for cell in said["against"].values()) for policy, said in columns.items()}
    assert sorted(columns, key=lambda p: columns[p]["rating_log_odds"]) == sorted(columns, key=lambda p: total[p])
    assert all(said["rating_low"] < said["rating_log_odds"] < said["rating_high"] for said in columns.values())


@pytest.mark.checklist("E3")
def test_e03_length_control_against_the_reference():
    rng = np.random.default_rng(1)
    lengths = {"sft": rng.integers(10, 30, size=400).tolist(), "dpo": rng.integers(20, 45, size=400).tolist()}
    difference = np.subtract(lengths["dpo"], lengths["sft"])
    # Nothing but length speaks for dpo.
    wins = expit(2.0 * np.tanh(difference / difference.std()))
    judge = PairwiseJudge({("dpo", "sft"): wins.tolist(), ("sft", "dpo"): (1 - wins).tolist()})
    verdicts = Verdicts.of(judge, {policy: replies(policy, each) for policy, each in lengths.items()})
    said = verdict_columns(verdicts, lengths, "sft", seed=0)["dpo"]
    assert said["win_rate"] > 0.7
    assert said["length_controlled_win_rate"] == pytest.approx(0.5, abs=0.002)
    assert math.isnan(said["mean_score"])


@pytest.mark.checklist("E3")
def test_e03_few_judged_prompts_have_no_length_controlled_rate():
    n = LENGTH_CONTROL_PROMPTS
    lengths = {"sft": [5] * n, "dpo": list(range(1, n + 1)), "ppo": list(range(1, n + 1))}
    tie = [0.5] * n
    outcomes = dict.fromkeys([(a, b) for a in lengths for b in lengths if a != b], tie)
    outcomes["ppo", "sft"] = [math.nan, *tie[1:]]
    verdicts = Verdicts.of(PairwiseJudge(outcomes), {policy: replies(policy, each) for policy, each in lengths.items()})
    columns = verdict_columns(verdicts, lengths, "sft", seed=0)
    assert columns["dpo"]["length_controlled_win_rate"] == pytest.approx(0.5, abs=1e-9)
    assert math.isnan(columns["ppo"]["length_controlled_win_rate"])
    assert (columns["ppo"]["n"], columns["ppo"]["unparsable"]) == (n - 1, 1)


def test_the_reference_alone_has_nobody_to_be_compared_with():
    said = verdict_columns(
        Verdicts.of(CountingJudge(), {"sft": replies("sft", [1, 2])}), {"sft": [1, 2]}, "sft", seed=0
    )
    assert said["sft"]["against"] == {}
    assert math.isnan(said["sft"]["rating_log_odds"])
