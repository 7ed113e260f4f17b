"""Judges: built from a recipe, scoring samples, refusing nonsense before anything is loaded."""

import math
import sys
import types
from typing import Any

import pytest
import torch

from preftune.errors import UserError
from preftune.eval.judges.registry import plan_judges
from preftune.eval.judges.reward_judge import RewardJudge
from preftune.eval.reward_scores import reward_scores
from preftune.eval.samples import EncodedPrompt, Sample


def made(completion: str, tokens=(4, 2), **columns) -> Sample:
    return Sample(
        "p", 0, EncodedPrompt([{"role": "user", "content": "hi"}], [1, 3], columns), completion, list(tokens), True
    )


@pytest.fixture
def functions(monkeypatch):
    module = types.ModuleType("judging")
    seen = {}

    def lengths(prompts, completions, topic, **others):
        seen.update(prompts=prompts, completions=completions, topic=topic, others=others)
        return [None if each[0]["content"] == "" else len(each[0]["content"]) for each in completions]

    module.__dict__.update(
        lengths=lengths,
        narrow=lambda completions: [1.0] * len(completions),
        short=lambda prompts, completions: [1.0],
    )
    monkeypatch.setitem(sys.modules, "judging", module)
    return seen


def open_one(raw) -> Any:
    (plan,) = plan_judges([raw], None)
    return plan.open(None, None)  # pyright: ignore[reportArgumentType]: these judges read neither


def test_rubric_judge():
    judge = open_one({"kind": "rubric", "name": "brief", "checks": [{"kind": "max_words", "value": 2}]})
    assert judge.name == "brief"
    assert judge.score([made("one two"), made("one two three")]) == [1.0, 0.0]


def test_function_judge_is_called_as_trl_calls_it(functions):
    judge = open_one({"kind": "function", "function": "judging:lengths"})
    scores = judge.score([made("abc", topic="x", only=1), made("", topic="y")])
    assert judge.name == "lengths"
    assert scores[0] == 3.0
    assert math.isnan(scores[1])
    assert functions["topic"] == ["x", "y"]
    assert functions["completions"][0] == [{"role": "assistant", "content": "abc"}]
    assert functions["prompts"][0] == [{"role": "user", "content": "hi"}]
    assert "only" not in functions["others"]
    assert open_one({"kind": "function", "function": "judging:narrow"}).score([made("a")]) == [1.0]


def test_a_function_with_too_few_scores_is_named(functions):
    judge = open_one({"kind": "function", "function": "judging:short"})
    with pytest.raises(UserError, match="1 scores for 2"):
        judge.score([made("a"), made("b")])


def test_reward_is_read_at_the_last_token_whatever_the_padding(five_tokens):
    head = five_tokens.add_head("other", bias=False)
    rows = [[1, 3, 4, 2], [1, 2], [1, 4, 4, 3, 3, 4, 2]]
    together = reward_scores(five_tokens, "other", rows, 0)
    for row, score in zip(rows, together, strict=True):
        with torch.no_grad(), five_tokens.using("other"):
            hidden = five_tokens.backbone(input_ids=torch.tensor([row])).last_hidden_state
            assert score == pytest.approx(head(hidden)[0, -1].item(), abs=1e-6)
    judge = RewardJudge("reward", five_tokens, "other", 0)
    assert judge.score([made("", tokens=(4, 2))]) == pytest.approx(
        [reward_scores(five_tokens, "other", rows[:1], 0)[0]]
    )


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"kind": "oracle"}, "rubric, verifier, reward, function"),
        ({"kind": "rubric", "check": []}, "takes no 'check'"),
        ({"kind": "reward"}, "a stage or an adapter"),
        ({"kind": "reward", "stage": "reward"}, "without a run folder"),
        ({"kind": "function", "function": "judging"}, "cannot be imported"),
        ({"kind": "function", "function": "no_such_module:f"}, "cannot be imported"),
    ],
)
def test_malformed_judges_are_refused(functions, raw, said):
    with pytest.raises(UserError, match=said) as error:
        plan_judges([raw], None)
    assert error.value.where.startswith("eval.judges[0]")


def test_two_judges_of_one_name_are_refused():
    rubric = {"kind": "rubric", "checks": [{"kind": "max_words", "value": 2}]}
    with pytest.raises(UserError, match="'rubric'"):
        plan_judges([rubric, rubric], None)


def test_a_reward_judge_without_its_stage_says_so(five_tokens, tmp_path):
    (plan,) = plan_judges([{"kind": "reward", "stage": "rm"}], tmp_path)
    assert plan.name == "rm"
    with pytest.raises(UserError, match="holds no adapter"):
        plan.open(five_tokens, None)  # pyright: ignore[reportArgumentType]: it fails before it needs one
