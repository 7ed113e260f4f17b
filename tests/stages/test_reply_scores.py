"""All sources together: in a trainer, outside of one, and what a failure in the middle of training leaves behind."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.errors import UserError
from preftune.stages.ppo.reply_scores import ReplyScorer, ScoreRules
from preftune.stages.ppo.rewards import RewardSource
from preftune.stages.scorers import posting
from preftune.stages.scorers.replies import Replies, filled_in, wrong_score

from ..eval.chat_server import ChatServer
from .tiny_ppo import PROMPTS, TOKENIZER, reward_folder, tiny, trainer

CHECKS = [{"kind": "max_words", "value": 2}, {"kind": "contains_any", "values": ["o"]}]
RUBRIC = RewardSource("rubric", "rubric", settings={"checks": CHECKS})
NUMERIC = RewardSource("verifier", "numeric", settings={"check": "numeric", "column": "answer"})


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def replies(**columns: list[Any]) -> Replies:
    texts = ["2", "two", "one and two"]
    ended = [[*ids(text), TOKENIZER.eos_token_id] for text in texts]
    return Replies(["1 + 1 is", "what?", "hm"], texts, columns, [ids("1 + 1 is"), ids("what?"), ids("hm")], ended)


def test_sources_score_replies_without_a_trainer(tmp_path: Path):
    folder = reward_folder(tmp_path, mean=0.0)
    stage = RewardSource("stage", str(folder), 0.5)
    length = RewardSource("function", lambda completions: [float(len(text)) for text in completions])
    score = ReplyScorer([NUMERIC, RUBRIC, length, stage], tiny(), TOKENIZER)
    asked = replies(answer=[2, 2, 3])
    parts_SB = score.scores(asked).parts_SB
    assert parts_SB[:3].tolist() == [[1.0, 0.0, 0.0], [0.5, 1.0, 0.5], [1.0, 3.0, 11.0]]
    assert len(set(parts_SB[3].tolist())) == 3
    assert score(asked).tolist() == pytest.approx((parts_SB[:3].sum(0) + 0.5 * parts_SB[3]).tolist(), abs=1e-6)


def test_a_reward_stages_score_is_the_trainers(tmp_path: Path):
    folder = reward_folder(tmp_path / "reward", mean=0.0)
    made = trainer(tmp_path / "ppo", rewards=[RewardSource("stage", str(folder))], reward=None)
    outside = ReplyScorer([RewardSource("stage", str(folder))], tiny(), TOKENIZER)
    asked = replies()
    within = made.scoring(outside._responses(asked, None), training=False)
    assert torch.allclose(within, outside(asked), atol=1e-5)


@pytest.mark.checklist("W11")
def test_w11_the_rules_of_a_stage_hold_outside_of_it():
    length = RewardSource("function", lambda completions: [float(len(text)) for text in completions])
    rules = ScoreRules(reward_combination="ensemble", ensemble_penalty=0.5, reward_clip=1.5, missing_eos_penalty=4.0)
    score = ReplyScorer([length, RUBRIC], tiny(), TOKENIZER, rules)
    # (mean - std / 2) of 1 and 0.5, of 3 and 1, of 11 and 0.5; clipped to 1.5; the last was cut
    assert score(replies(), [True, True, False]).tolist() == [0.625, 1.5, -2.5]


def test_no_source_is_refused():
    with pytest.raises(UserError, match="no source of scores"):
        ReplyScorer([], tiny(), TOKENIZER)


@pytest.mark.checklist("W8")
def test_w08_what_one_source_skips_counts_by_the_others():
    numeric = RewardSource("verifier", "numeric", 2.0, NUMERIC.settings, "skip")
    score = ReplyScorer([numeric, RUBRIC], tiny(), TOKENIZER)
    asked = replies(answer=[2, None, 3])
    assert math.isnan(score.scores(asked).parts_SB[0, 1])
    assert score(asked).tolist() == [2.5, 1.0, 0.5]


@pytest.mark.checklist("W8")
def test_w08_a_source_that_is_to_stop_names_the_reply():
    numeric = RewardSource("verifier", "numeric", settings=NUMERIC.settings)
    score = ReplyScorer([RUBRIC, numeric], tiny(), TOKENIZER)
    with pytest.raises(UserError, match=r"reward numeric: prompt \('what\?'\), reply 'two': its row has no 'answer'"):
        score(replies(answer=[2, None, 3]))


@pytest.mark.checklist("W8")
def test_w08_a_functions_bad_scores_count_as_the_recipe_says():
    def reward(completions):
        return [1.0, math.inf, None]

    rules: list[tuple[Any, Any]] = [("stop", None), (-1.0, -1.0), ("skip", 0.0)]
    for rule, filled in rules:
        score = ReplyScorer([RewardSource("function", reward, on_failure=rule)], tiny(), TOKENIZER)
        if filled is None:
            with pytest.raises(UserError, match="reward returned inf for completion 'two'"):
                score(replies())
        else:
            assert score(replies()).tolist() == [1.0, filled, 0.0]


@pytest.mark.checklist("W7")
@pytest.mark.parametrize("rule", ["stop", "skip", -1.0])
def test_w07_a_models_score_that_is_not_finite_is_no_zero(tmp_path: Path, rule: Any):
    folder = reward_folder(tmp_path)
    score = ReplyScorer([RewardSource("stage", str(folder), on_failure=rule)], tiny(), TOKENIZER)
    made: Any = score.scoring.scorers[0]
    with torch.no_grad():
        next(made.scorer.trunk.adapters.heads["reward"].parameters()).fill_(math.nan)
    with pytest.raises(UserError, match=r"prompt \('1 \+ 1 is'\), reply '2': the score is nan, expected a finite"):
        score(replies())


def test_a_reward_refuses_another_rule():
    for rule in ("ignore", math.nan, True, None):
        with pytest.raises(ValueError, match="on_failure is"):
            RewardSource("verifier", "numeric", settings={}, on_failure=rule)  # pyright: ignore[reportArgumentType]


@pytest.mark.checklist("W7")
@pytest.mark.parametrize("score", [None, "1", True, [1], math.nan, math.inf, -math.inf, 10**400, 1e39])
def test_w07_what_is_no_score(score: object):
    assert wrong_score(score) is not None


def test_what_is_one():
    assert wrong_score(1) is None and wrong_score(-3.0e38) is None


def test_only_columns_are_filled_in():
    assert filled_in("{a} {b} {} {a", {"a": "[[1]]"}, str.upper) == "[[1]] {b} {} {a"


def test_ppo_trains_on_them_and_a_server_that_dies_leaves_a_checkpoint_that_continues(tmp_path: Path, monkeypatch):
    """The run that was cut off by its reward ends as one that was not."""
    monkeypatch.setattr(posting, "pause", lambda seconds, stop: None)
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    dies = {"after": 10**9}

    def respond(body, n):
        if n > dies["after"]:
            return 500, {}, "no more"
        return 200, {}, {"scores": [len(text) % 5 for text in body["completions"]]}

    rows = [{**row, "answer": place} for place, row in enumerate(PROMPTS)]

    def run(folder: Path, url: str, resume: bool | None = None) -> torch.Tensor:
        settings = {"url": url, "retries": 1, "batch_size": 8}
        verifier = {"check": "length", "unit": "tokens", "max": 6}
        made = trainer(
            folder,
            reward=None,
            rewards=[RewardSource("http", "rm", settings=settings), RewardSource("verifier", "length", 0.5, verifier)],
            prompts=rows,
            total_episodes=32,
            save_strategy="steps",
            save_steps=1,
        )
        made.train(resume)
        return torch.cat([each.flatten() for each in made.adapters.parameters("default")])

    with ChatServer(respond) as server:
        whole = run(tmp_path / "whole", server.url)
        asked = len(server.bodies)
        dies["after"] = asked + asked // 2
        with pytest.raises(UserError, match=r"reward rm: prompt \d \(.* answered 500 \(no more\), after 1 retries"):
            run(tmp_path / "cut", server.url)
        dies["after"] = 10**9
        assert torch.equal(run(tmp_path / "cut", server.url, True), whole)
