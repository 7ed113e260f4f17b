"""A Python reward function is called as TRL calls it, and what it returns is checked."""

import math

import pytest

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


@pytest.mark.parametrize(
    ("returned", "said"),
    [([1.0], "1 scores for 2"), ([1.0, math.nan], "nan for completion 'two'"), ([math.inf, 0], "inf for .* 'one'")],
)
def test_what_is_no_score_is_refused(returned, said):
    with pytest.raises(UserError, match=said) as error:
        call_reward_function(lambda completions: returned, **GIVEN)
    assert error.value.where == "here"


@pytest.mark.parametrize("spec", ["math", "math:none", "no_such_module:f", "math:pi"])
def test_what_is_no_function_is_refused(spec):
    with pytest.raises(UserError):
        import_function(spec)
    assert import_function("math:sqrt") is math.sqrt
