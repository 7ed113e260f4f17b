"""Every kind of check, on both sides of its bound, and every way to write one wrongly."""

import pytest

from preftune.errors import UserError
from preftune.stages.scorers.rubric import count_sentences, parse_rubric

CASES = [
    ({"kind": "max_words", "value": 3}, "one two three", "one two three four"),
    ({"kind": "min_words", "value": 3}, "one two three", "one two"),
    ({"kind": "contains_any", "values": ["sorry", "apolog"]}, "We APOLOGISE.", "No."),
    ({"kind": "contains_all", "values": ["order", "refund"]}, "Refund for your order", "Refund for you"),
    ({"kind": "excludes_any", "values": ["as an AI", "cannot"]}, "We can.", "I CANNOT."),
    ({"kind": "regex", "pattern": r"#\d{4}\b"}, "order #1234", "order #12"),
    ({"kind": "ends_with", "values": ["?", "Thanks."]}, "Is it on? \n", "Is it on"),
    ({"kind": "sentence_count", "min": 2, "max": 3}, "One. Two!", "One."),
    ({"kind": "sentence_count", "max": 1}, "One.", "One. Two."),
]


@pytest.mark.parametrize(("check", "good", "bad"), CASES)
def test_each_kind_passes_and_fails(check, good, bad):
    rubric = parse_rubric([check], "eval.judges[0]")
    assert rubric.score(good) == 1.0
    assert rubric.score(bad) == 0.0


@pytest.mark.checklist("W6")
def test_w06_score_is_the_share_of_checks():
    rubric = parse_rubric([{"name": str(place), **check} for place, (check, _, _) in enumerate(CASES[:4])], "judge")
    text = "We apologise"
    assert rubric.results(text) == {"0": True, "1": False, "2": True, "3": False}
    assert rubric.score(text) == 0.5


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("...", 0), ("Hi", 1), ("It is 3.5 km. Yes!", 2), ('He said "go." Then left', 2), ("a\nb\n\nc", 3)],
)
def test_sentences(text, count):
    assert count_sentences(text) == count


@pytest.mark.parametrize(
    ("check", "said"),
    [
        ({"kind": "max_word", "value": 3}, "max_words"),
        ({"kind": "max_words"}, "value"),
        ({"kind": "max_words", "values": 3}, "value"),
        ({"kind": "max_words", "value": "3"}, "whole number"),
        ({"kind": "max_words", "value": True}, "whole number"),
        ({"kind": "contains_any", "values": "sorry"}, "list of strings"),
        ({"kind": "contains_any", "values": []}, "list of strings"),
        ({"kind": "regex", "pattern": "("}, "regular expression"),
        ({"kind": "sentence_count", "min": 4, "max": 2}, "above max"),
        ({"kind": "sentence_count"}, "min or max"),
        ("short", "mapping"),
    ],
)
def test_a_malformed_check_is_named(check, said):
    with pytest.raises(UserError, match=said) as error:
        parse_rubric([{"kind": "min_words", "value": 1}, check], "eval.judges[2]")
    assert error.value.where.startswith("eval.judges[2].checks[1]")


def test_two_checks_of_one_name_are_refused():
    check = {"name": "short", "kind": "max_words", "value": 3}
    with pytest.raises(UserError, match="'short'"):
        parse_rubric([check, check], "judge")


def test_no_checks_are_refused():
    with pytest.raises(UserError, match="at least one"):
        parse_rubric([], "judge")
