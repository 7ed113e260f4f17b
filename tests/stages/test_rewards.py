"""Reward arithmetic and function rewards, by hand."""

import math
from typing import Any

import pytest
import torch

from preftune.errors import UserError
from preftune.models.generate import Generation
from preftune.models.masked import masked_moments
from preftune.stages.ppo.reply_scores import ScoreRules
from preftune.stages.ppo.rewards import (
    FiniteScorer,
    Responses,
    RewardSource,
    RunningScale,
    Scoring,
    apply_eos_rule,
    combine,
    text_source,
)
from preftune.stages.ppo.rollout import make_episodes


@pytest.mark.checklist("W10")
def test_w10_weighted_sum_and_ensemble_by_hand() -> None:
    scores, weights = torch.tensor([[1.0, 2.0], [3.0, -2.0]]), torch.tensor([1.0, 0.5])
    assert combine(scores, weights).tolist() == [2.5, 1.0]
    # means 2 and 0, population standard deviations 1 and 2
    assert combine(scores, weights, how="ensemble", penalty=0.5).tolist() == [1.5, -1.0]


@pytest.mark.checklist("P9")
def test_p09_missing_eos_penalty_and_replacement_are_not_the_same() -> None:
    scores, finished = torch.tensor([2.0, 3.0, -1.0]), torch.tensor([True, False, False])
    assert apply_eos_rule(scores, finished, penalty=1.5, replacement=None).tolist() == [2.0, 1.5, -2.5]
    assert apply_eos_rule(scores, finished, penalty=None, replacement=-4.0).tolist() == [2.0, -4.0, -4.0]
    assert apply_eos_rule(scores, finished, penalty=None, replacement=None) is scores
    with pytest.raises(ValueError, match="expected one of them"):
        apply_eos_rule(scores, finished, penalty=1.0, replacement=-1.0)


@pytest.mark.checklist("P22")
def test_p22_running_scale_is_the_deviation_of_everything_seen() -> None:
    x, running = torch.tensor([1.0, 3.0, 5.0, 7.0, 100.0]), RunningScale()
    assert running.std == 1.0
    for part in (x[:2], x[2:4]):
        running.update(masked_moments(part, torch.ones_like(part)))
    assert running.std == pytest.approx(5**0.5, rel=1e-12)
    again = RunningScale(*running.state())
    again.update(masked_moments(x[4:], torch.ones(1)))
    assert again.std == pytest.approx(float(x.double().std(correction=0)), rel=1e-12)


def responses(
    prompts: list, texts: list[str], finished: list[bool] | None = None, **columns: list[object]
) -> Responses:
    ended = [True] * len(texts) if finished is None else finished
    generation = Generation([[1, 2]] * len(texts), [[0.0, 0.0]] * len(texts), ended)
    episodes = make_episodes([[5]] * len(texts), generation, 0, torch.device("cpu"))
    return Responses(episodes, prompts, texts, columns)


def test_functions_get_texts_columns_and_conversations() -> None:
    seen: dict = {}

    def reward(prompts, completions, answer, **columns) -> list[float | None]:
        seen.update(prompts=prompts, completions=completions, answer=answer, **columns)
        return [1.5, None]

    chat = [[{"role": "user", "content": "q"}]] * 2
    scores = text_source(RewardSource("function", reward))(responses(chat, ["a", "b"], answer=[4, 5]))
    assert scores[0] == 1.5 and scores[1].isnan()
    assert seen["answer"] == [4, 5] and seen["completion_ids"] == [[1, 2], [1, 2]]
    assert seen["completions"] == [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]]
    plain = text_source(RewardSource("function", lambda completions: [float(len(t)) for t in completions]))
    assert plain(responses(["p", "q"], ["a", "bcd"], unused=[0, 0])).tolist() == [1.0, 3.0]


@pytest.mark.checklist("W9")
@pytest.mark.parametrize(
    ("result", "problem"),
    [
        ([1.0], "1 scores for 2 completions"),
        ([1.0, 2.0, 3.0], "3 scores for 2 completions"),
        ([1.0, float("nan")], "returned nan"),
    ],
)
def test_w09_what_a_function_returns_is_checked(result: list[float], problem: str) -> None:
    scorer = text_source(RewardSource("function", lambda completions: result))
    with pytest.raises(UserError, match=problem):
        scorer(responses(["p", "q"], ["a", "b"]))


@pytest.mark.checklist("W10")
def test_w10_a_source_that_does_not_apply_is_left_out_as_in_trl() -> None:
    nan = float("nan")
    scores_SB = torch.tensor([[1.0, 2.0, nan], [3.0, nan, nan]])
    weights_S = torch.tensor([2.0, 0.5])
    assert combine(scores_SB, weights_S).tolist() == [3.5, 4.0, 0.0]
    # an ensemble of what is there: mean 2 less std 1; 2 less 0; nothing
    assert combine(scores_SB, weights_S, how="ensemble").tolist() == [1.0, 2.0, 0.0]


def test_a_reward_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of 'stage', 'model', 'function'"):
        RewardSource("judge", "x")  # pyright: ignore[reportArgumentType]: what is tested


class Fixed:
    """A scorer that has made up its mind; `normal` as a reward stage's."""

    name = "fixed"

    def __init__(self, scores: list[float], normal: tuple[float, float] | None = None) -> None:
        self.scores_B, self.normal = torch.tensor(scores), normal

    def __call__(self, responses: Responses) -> torch.Tensor:
        return self.scores_B


def scoring(rules: ScoreRules) -> Scoring:
    """Two sources of weights 2 and 0.5, the first with the mean 1 and the deviation 2 on reference responses."""
    sources = [RewardSource("stage", "rm", 2.0), RewardSource("rubric", "style", 0.5)]
    scorers = [Fixed([5.0, 1.0, 3.0], (1.0, 2.0)), Fixed([4.0, 2.0, 10.0])]
    return Scoring(rules, sources, scorers, lambda sums, how: sums)


@pytest.mark.checklist("W11")
def test_w11_centred_weighted_summed_then_clipped_and_the_missing_end_last() -> None:
    asked = responses(["p"] * 3, ["a", "b", "c"], [True, True, False])
    # (4, 0, 2) and (4, 2, 10), weighted: 8 + 2, 0 + 1, 4 + 5
    assert scoring(ScoreRules())(asked).tolist() == [10.0, 1.0, 9.0]
    assert scoring(ScoreRules(normalize_rewards=False))(asked).tolist() == [12.0, 3.0, 11.0]
    # by the deviation of the stage alone: 4 + 2, 0 + 1, 2 + 5; clipped to 3; the last one was cut
    rules = ScoreRules(reward_scale="std", reward_clip=3.0, missing_eos_penalty=1.0)
    assert scoring(rules)(asked).tolist() == [3.0, 1.0, 2.0]
    assert scoring(rules).scores(asked).parts_SB.tolist() == [[2.0, 0.0, 1.0], [4.0, 2.0, 10.0]]


@pytest.mark.checklist("W11")
def test_w11_a_running_scale_divides_the_sum_before_the_clip() -> None:
    asked = responses(["p"] * 3, ["a", "b", "c"], [True, True, False])
    # 10, 1 and 9 lie around 20 / 3
    deviation = ((100 + 1 + 81) / 3 - (20 / 3) ** 2) ** 0.5
    rules = ScoreRules(reward_scale="running", reward_clip=2.3, missing_eos_score=-7.0)
    assert scoring(rules)(asked).tolist() == pytest.approx([2.3, 1 / deviation, -7.0])
    # what is only looked at is neither scaled nor learnt from
    looked = scoring(rules)
    assert looked(asked, training=False).tolist() == [10.0, 1.0, -7.0] and looked.running.state() == [0, 0, 0]


@pytest.mark.checklist("W7")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_w07_one_score_of_a_model_that_is_not_finite_is_that_replys_failure(bad: float) -> None:
    asked = responses(["p", "q", "r"], ["a", "b", "c"])

    def scores(rule: Any) -> list[float]:
        made: Any = Fixed([1.0, bad, -2.0])
        return FiniteScorer(made, RewardSource("model", "judge", on_failure=rule))(asked).tolist()

    with pytest.raises(UserError, match=r"reward judge: prompt \('q'\), reply 'b': the score is -?(nan|inf), expected"):
        scores("stop")
    assert scores(-0.5) == [1.0, -0.5, -2.0]
    first, skipped, last = scores("skip")
    assert (first, last) == (1.0, -2.0) and math.isnan(skipped)
