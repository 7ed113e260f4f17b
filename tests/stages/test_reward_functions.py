"""A Python reward function is called as TRL calls it, and what it returns is checked."""

import inspect
import math

import numpy as np
import pytest
import torch

from preftune.errors import UserError
from preftune.stages.reward_functions import call_reward_function, import_function

GIVEN = {
    "where": "here",
    "prompts": ["a", "b"],
    "completions": ["one", [{"role": "assistant", "content": "two"}]],
    "completion_ids": [[1], [2, 3]],
    "columns": {"topic": ["x", "y"]},
}


def test_it_gets_the_arguments_that_it_takes():
    seen = {}

    def narrow(completion_ids, topic):
        seen.update(completion_ids=completion_ids, topic=topic)
        return [1, None]

    scores = call_reward_function(narrow, **GIVEN)
    assert seen == {"completion_ids": [[1], [2, 3]], "topic": ["x", "y"]}
    assert scores[0] == 1.0 and math.isnan(scores[1])
    wide = call_reward_function(lambda **given: [float(len(given)), 0.0], **GIVEN)
    assert wide == [4.0, 0.0]


@pytest.mark.checklist("W7")
@pytest.mark.parametrize(
    ("returned", "said"),
    [([1.0], "1 scores for 2"), ([1.0, math.nan], "nan for completion 'two'"), ([math.inf, 0], "inf for .* 'one'")],
)
def test_w07_what_is_no_score_is_refused(returned, said):
    with pytest.raises(UserError, match=said) as error:
        call_reward_function(lambda completions: returned, **GIVEN)
    assert error.value.where == "here"


async def later(completions):
    return [1.0, 2.0]


@pytest.mark.parametrize(
    "function",
    [
        later,
        lambda completions: np.array([1.0, 2.0], dtype=np.float32),
        lambda completions: torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        lambda completions: (float(number) for number in (1, 2)),
        lambda completions: (np.float32(1), torch.tensor(2.0)),
        lambda completions: [True, np.int64(2)],
    ],
)
def test_scores_in_any_common_form_are_read(function):
    assert call_reward_function(function, **GIVEN) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (0.5, "scorer returned a float, expected a list of 2 scores"),
        (None, "scorer returned None"),
        ("ab", "scorer returned a str"),
        ({"one": 1.0, "two": 2.0}, "scorer returned a dict"),
        (torch.tensor(1.0), "scorer returned a float|scorer returned a Tensor"),
        (torch.zeros(2, 1), r"scorer returned \[0.0\] for completion 'one'"),
        (["0.5", "1"], "scorer returned '0.5' for completion 'one'"),
        ([later(None), later(None)], "scorer returned a coroutine|for completion 'one'"),
        ([1j, 2], "scorer returned 1j"),
        (torch.tensor([1.0, math.nan]), "scorer returned nan for completion 'two'"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused_by_the_functions_name(returned, said):
    def scorer(completions):
        return returned

    with pytest.raises(UserError, match=said):
        call_reward_function(scorer, **GIVEN)
    for each in returned if isinstance(returned, list) else ():
        if inspect.iscoroutine(each):
            each.close()


def test_a_parameter_that_nothing_fills_is_refused():
    with pytest.raises(UserError, match="it needs 'answer', which is no column"):
        call_reward_function(lambda completions, answer: [0, 0], **GIVEN)
    assert call_reward_function(lambda completions, answer=None, *rest: [0, 0], **GIVEN) == [0, 0]


@pytest.mark.parametrize("spec", ["math", "math:none", "no_such_module:f", "math:pi"])
def test_what_is_no_function_is_refused(spec):
    with pytest.raises(UserError):
        import_function(spec)
    assert import_function("math:sqrt") is math.sqrt
