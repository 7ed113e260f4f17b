"""Reward arithmetic and function rewards, by hand."""

import pytest
import torch

from preftune.errors import UserError
from preftune.models.generate import Generation
from preftune.models.masked import masked_moments
from preftune.stages.ppo.rewards import (
    Responses,
    RewardSource,
    RunningScale,
    apply_eos_rule,
    combine,
    text_source,
)
from preftune.stages.ppo.rollout import make_episodes


def test_weighted_sum_and_ensemble_by_hand() -> None:
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


def responses(prompts: list, texts: list[str], **columns: list) -> Responses:
    generation = Generation([[1, 2]] * len(texts), [[0.0, 0.0]] * len(texts), [True] * len(texts))
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


@pytest.mark.parametrize(
    ("result", "problem"), [([1.0], "1 scores for 2 completions"), ([1.0, float("nan")], "returned nan")]
)
def test_what_a_function_returns_is_checked(result: list[float], problem: str) -> None:
    scorer = text_source(RewardSource("function", lambda completions: result))
    with pytest.raises(UserError, match=problem):
        scorer(responses(["p", "q"], ["a", "b"]))


def test_a_source_that_does_not_apply_is_left_out_as_in_trl() -> None:
    nan = float("nan")
    scores_SB = torch.tensor([[1.0, 2.0, nan], [3.0, nan, nan]])
    weights_S = torch.tensor([2.0, 0.5])
    assert combine(scores_SB, weights_S).tolist() == [3.5, 4.0, 0.0]
    # an ensemble of what is there: mean 2 less std 1; 2 less 0; nothing
    assert combine(scores_SB, weights_S, how="ensemble").tolist() == [1.0, 2.0, 0.0]


def test_a_reward_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of 'stage', 'model', 'function'"):
        RewardSource("judge", "x")  # pyright: ignore[reportArgumentType]: what is tested
