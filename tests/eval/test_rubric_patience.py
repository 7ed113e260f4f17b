"""A pattern that would never end, and words of judges that are no words, are said in one line."""

import pytest

from preftune.errors import UserError
from preftune.eval.judges import rubric
from preftune.eval.judges.registry import plan_judges


def test_a_pattern_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rubric, "_PATIENCE", 0.05)
    made = rubric.parse_rubric([{"name": "a", "kind": "regex", "pattern": r"^(a|aa)+$"}], "here")
    with pytest.raises(UserError, match=r"here\.checks\[0\]\.pattern: .* takes more than 0\.05 s on one reply"):
        made.score("a" * 60 + "b")
    good = rubric.parse_rubric([{"name": "a", "kind": "regex", "pattern": r"[.!?]\s*$"}], "here")
    assert (good.score("Yes."), good.score("no")) == (1.0, 0.0)


@pytest.mark.parametrize(
    "judge",
    [
        {"kind": "reward", "stage": "reward", "name": 5},
        {"kind": "reward", "adapter": 5},
        {"kind": "rubric", "name": ["a"], "checks": [{"name": "a", "kind": "max_words", "value": 3}]},
    ],
)
def test_a_name_is_text(judge: dict):
    with pytest.raises(UserError, match=r"eval\.judges\[0\]\.\w+: is .*, expected text"):
        plan_judges([judge], None)
