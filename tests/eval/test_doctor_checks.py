"""`preftune doctor`: the thresholds of the checks that measure a model or compare identities."""

import json
import math

import pytest

from preftune.eval.doctor.finding import Finding, first_broken, judge
from preftune.eval.doctor.identity_checks import check_bos, check_parent, check_tokenizer
from preftune.eval.doctor.log_checks import score_gain
from preftune.eval.doctor.policy_checks import (
    check_drift,
    check_eos,
    check_learned,
    check_merged,
    check_parent_kept,
    check_trained,
)
from preftune.eval.doctor.reward_model_checks import (
    check_accuracy,
    check_length,
    check_reload,
    check_reload_mean,
    check_score_head,
    check_sft_reward,
)


def level(finding: Finding) -> str:
    return finding.level


@pytest.mark.parametrize(
    ("accuracy", "interval", "longer", "expected"),
    [
        (0.8, (0.75, 0.85), 0.55, "OK"),
        (0.6, (0.52, 0.68), 0.55, "look"),  # cannot be told from "longer wins"
        (0.6, (0.52, 0.68), 0.3, "look"),  # nor from "shorter wins"
        (0.52, (0.45, 0.59), 0.5, "look"),
        (0.3, (0.24, 0.37), 0.5, "broken"),  # surely worse than a coin
        (0.6, (0.53, 0.67), 0.9, "broken"),  # surely worse than counting tokens
    ],
)
def test_accuracy(accuracy, interval, longer, expected):
    assert level(check_accuracy("r", accuracy, interval, 200, longer_wins=longer, held_out=True)) == expected


def test_few_pairs_cannot_damn_a_reward_model():
    found = check_accuracy("r", 2 / 7, (0.082, 0.641), 7, longer_wins=1 / 7, held_out=False)
    assert found.level == "look" and "TRAINING" in found.unit


@pytest.mark.parametrize(
    ("kl", "gain", "expected"),
    [
        (0.006, (0.0, -0.1, 0.1), "look"),  # neither moved nor gained
        (0.006, (0.3, 0.1, 0.5), "OK"),  # a small step in the right direction
        (0.006, None, "look"),
        (0.0, None, "look"),
        (0.05, (0.0, -0.1, 0.1), "OK"),
    ],
)
def test_a_policy_that_did_not_learn_is_named_with_what_to_do(kl, gain, expected):
    found = check_learned("ppo", kl, 0.001, reference="sft", gain=gain, rate=2e-5)
    assert found.level == expected
    if expected == "look":
        assert all(word in found.remedy for word in ("2e-05", "KL coefficient" if gain else "beta"))


def test_a_gain_in_score_is_told_from_noise():
    rising = score_gain([0.1 * i for i in range(6)])
    assert rising == pytest.approx((0.5, 0.5, 0.5))
    gain, low, high = score_gain([0.0, 0.2, -0.1, 0.1, 0.0, 0.1]) or (0.0, 0.0, 0.0)
    assert low < 0 < high and low < gain < high
    assert score_gain([0.0, 1.0]) is None


@pytest.mark.parametrize(
    ("correlation", "interval", "expected"),
    [
        (0.3, (0.1, 0.5), "OK"),
        (-0.6, (-0.8, -0.4), "look"),
        (0.92, (0.85, 0.97), "look"),
        (-0.95, (-0.99, -0.91), "broken"),
        (0.0, (-0.95, 0.95), "OK"),
    ],
)
def test_length(correlation, interval, expected):
    assert level(check_length("r", correlation, interval, 100)) == expected


@pytest.mark.parametrize(
    ("interval", "expected"), [((-1.0, 0.5), "OK"), ((-3.0, -1.9), "OK"), ((-3.0, -2.1), "look"), ((1.1, 2.0), "look")]
)
def test_sft_reward_is_for_a_person_to_judge(interval, expected):
    assert level(check_sft_reward("r", sum(interval) / 2, interval, 50, policy="sft")) == expected


@pytest.mark.parametrize(
    ("norm", "moved", "expected"),
    [
        (1.0, 0.5, "OK"),
        (None, math.nan, "broken"),
        (0.0, 1.0, "broken"),
        (math.nan, math.nan, "broken"),
        (1, 0, "broken"),
    ],
)
def test_score_head(norm, moved, expected):
    found = check_score_head("r", norm, moved)
    assert found.level == expected
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["stage"] == "r"


@pytest.mark.parametrize(
    ("measured", "n", "all_", "expected"),
    [
        (0.9, 100, True, "OK"),
        (0.89, 100, True, "OK"),
        (0.86, 100, True, "look"),
        (0.7, 100, True, "broken"),
        (0.7, 10, True, "look"),
        (0.87, 100, False, "OK"),
        (0.6, 100, False, "look"),
    ],
)
def test_reload(measured, n, all_, expected):
    interval = (measured - 0.05, measured + 0.05)
    assert level(check_reload("r", 0.9, measured, interval, n=n, all_=all_)) == expected


@pytest.mark.parametrize(("mean", "expected"), [(1.02, "OK"), (1.2, "look"), (0.4, "broken"), (math.nan, "broken")])
def test_reload_mean(mean, expected):
    assert level(check_reload_mean("r", {"mean": 1.0, "std": 2.0}, mean, 128)) == expected


@pytest.mark.parametrize(
    ("finished", "expected_share", "expected"),
    [(60, 0.9, "OK"), (40, 0.9, "look"), (5, 0.9, "broken"), (5, 0.3, "look"), (20, None, "look"), (0, None, "look")],
)
def test_eos(finished, expected_share, expected):
    assert level(check_eos("p", finished, 64, expected=expected_share, budget=64)) == expected


def test_few_silent_replies_are_no_proof():
    assert level(check_eos("p", 0, 8, expected=1.0, budget=64)) == "look"


@pytest.mark.parametrize(("kl", "expected"), [(0.1, "OK"), (0.6, "look"), (1.2, "broken"), (math.nan, "broken")])
def test_drift(kl, expected):
    assert level(check_drift("p", kl, 0.01, reference="sft", n=64)) == expected


@pytest.mark.parametrize(
    ("gap", "low", "expected"),
    [(1e-8, False, "OK"), (1e-4, False, "look"), (2e-3, False, "broken"), (1e-2, True, "OK"), (0.2, True, "broken")],
)
def test_merged(gap, low, expected):
    assert level(check_merged("p", gap, low_precision=low)) == expected


def test_what_did_not_move_or_forgot_its_parent():
    assert [level(check_trained("p", change, start="sft")) for change in (0.1, 0.0, math.nan)] == [
        "OK", "broken", "broken"
    ]  # fmt: skip
    assert [level(check_parent_kept("p", share, parent="sft")) for share in (1.1, 0.5, 0.0)] == ["OK", "look", "broken"]


def test_tokenizers_that_differ():
    ours = {"sha256": "1", "chat_template_sha256": "2", "pad_token": "<pad>", "eos_token": "</s>"}
    same = [each.level for each in check_tokenizer("d", ours, {"sft": dict(ours)})]
    assert same == ["OK"] * 3
    template, tokenizer, pads = check_tokenizer("d", ours, {"sft": ours | {"chat_template_sha256": "3"}, "base": ours})
    assert (template.level, template.measured, tokenizer.level, pads.level) == ("broken", 1, "OK", "OK")
    assert "sft" in template.unit and "base" not in template.unit
    alike = ours | {"pad_token": "</s>"}
    assert [each.level for each in check_tokenizer("d", alike, {"sft": alike})] == ["OK", "OK", "broken"]


def test_bos_and_parents():
    assert level(check_bos("d", 1, token="<s>", base_token="<s>")) == "OK"
    assert level(check_bos("d", 2, token="<s>", base_token="<s>")) == "broken"
    assert level(check_bos("d", 0, token=None, base_token="<s>")) == "broken"
    assert [level(check_parent("d", "sft", "a", other)) for other in ("a", "b")] == ["OK", "broken"]


def test_the_first_broken_stage_is_the_verdict():
    levels = [("sft", "look"), ("reward", "broken"), ("ppo", "broken")]
    findings = [
        judge(stage, "x", 0.0, unit="", threshold="t", remedy="r", look=word == "look", broken=word == "broken")
        for stage, word in levels
    ]
    worst = first_broken(findings)
    assert worst is not None and worst.stage == "reward"
    assert first_broken(findings[:1]) is None
