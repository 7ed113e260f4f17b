"""A pattern that would never end, and words of judges that are no words, are said in one line."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from preftune.errors import UserError
from preftune.eval.judges.registry import plan_judges
from preftune.stages.scorers import rubric


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


@pytest.mark.parametrize(
    "text", ["!" * 200_000 + "x", "." * 100_000 + "'" * 100_000 + "x", "a.)" * 60_000, "\n" * 200_000]
)
def test_counting_sentences_takes_no_longer_than_reading_them(text: str):
    began = time.process_time()
    rubric.count_sentences(text)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "text",
    [
        *("One. Two! Three?", 'He said "No." Then?!', "a.b.c", "Wait... what", "e.g.) this", "x!!y. z"),
        *("(So.) And\n\nso", "", ". .", "!?'x' y."),
    ],
)
def test_sentences_are_counted_as_before(text: str):
    plain = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|\n+")
    assert rubric.count_sentences(text) == sum(1 for piece in plain.split(text) if re.search(r"\w", piece))


def test_a_pattern_is_given_up_in_any_thread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rubric, "_PATIENCE", 0.05)
    made = rubric.parse_rubric([{"name": "a", "kind": "regex", "pattern": r"^(a|aa)+$"}], "here")
    with ThreadPoolExecutor(1) as pool, pytest.raises(UserError, match="takes more than"):
        pool.submit(made.score, "a" * 60 + "b").result(timeout=20)


@pytest.mark.parametrize(
    "pattern", ["(" * 5000 + ")" * 5000, "(?:a{1,999}){1,999}", "a{99999999999}", "((a{1,300}){1,300}){1,300}"]
)
def test_a_pattern_that_cannot_be_compiled_ends_in_one_line(pattern: str):
    began = time.process_time()
    try:
        rubric.parse_rubric([{"name": "a", "kind": "regex", "pattern": pattern}], "here")
    except UserError as error:
        assert str(error).startswith("here.checks[0].pattern: ")
    assert time.process_time() - began < 10
