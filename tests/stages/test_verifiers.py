"""Every verifier on both sides of its bound, against columns of the data, and every way to write one wrongly."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.errors import UserError
from preftune.stages.scorers.replies import Replies
from preftune.stages.scorers.verifiers import Unusable, VerifierScorer, parse_verifier

HERE = "stages.ppo.reward.0"
THOUGHT = "<think>\\boxed{3} #### 3</think>"


def right(entry: dict[str, Any], text: str, row: Any = None, tokens: int = 0) -> bool:
    return parse_verifier(entry, HERE).verdict(text, row or {}, tokens)


ANSWER = {"check": "numeric", "column": "answer"}
NUMERIC: list[tuple[dict[str, Any], str, object, bool]] = [
    ({}, "It is 12.", 12, True),
    ({}, "It is 12.", "12", True),
    ({}, "It is 12.", 12.0, True),
    ({}, "It is 1,200.", "1200", True),
    ({}, "It is 12.", "48 + 24 = 72 clips\n#### 72", False),
    ({}, "It is 72.", "It sold 48/2 = 24 clips\n#### 72", True),
    ({}, "#### 72\n", "72", True),
    ({}, "so \\boxed{\\frac{1}{2}}", "0.5", True),
    ({}, "so \\boxed{0.5}", "\\boxed{\\frac{1}{2}}", True),
    ({}, "\\boxed{13} or 12", "12", False),
    ({}, "\\boxed{twelve} or 12", "12", False),
    ({}, "<answer>12</answer> of 100", 12, True),
    ({}, f"{THOUGHT} so 12", 12, True),
    ({}, f"{THOUGHT} so 12", 3, False),
    ({}, "<think> 12", 12, False),
    ({}, "none", 12, False),
    ({}, "", 12, False),
    ({}, "It is 12.", [13, "12"], True),
    ({}, "It is 12.", [13, 14], False),
    ({}, "0.1 + 0.2 = 0.3", 0.3, True),
    ({}, "It is 0.30000000000000004.", 0.3, False),
    ({"tolerance": 0.01}, "It is 3.15", 3.14, True),
    ({"tolerance": 0.01}, "It is 3.151", 3.14, False),
    ({"relative_tolerance": 0.1}, "It is 110", 100, True),
    ({"relative_tolerance": 0.1}, "It is -90", -100, True),
    ({"relative_tolerance": 0.1}, "It is 111", 100, False),
    ({"percent": True}, "It is 12%", 0.12, True),
    ({"percent": True}, "It is 12", 0.12, False),
    ({}, "It is 12%", 12, True),
    ({}, "It is 12%", 0.12, False),
    ({"decimal": ","}, "Es sind 1.234,5", "1234,5", True),
    ({"extract": "last_line"}, "12\n13", 13, True),
    ({"extract": ["hash"]}, "13", 13, False),
]


@pytest.mark.checklist("W2")
@pytest.mark.parametrize(("more", "text", "answer", "good"), NUMERIC)
def test_w02_numeric_answers(more: dict[str, Any], text: str, answer: object, good: bool):
    assert right({**ANSWER, **more}, text, {"answer": answer}) is good


@pytest.mark.checklist("W1")
def test_w01_without_extract_a_box_comes_first_then_hash_then_tags_then_the_last_number():
    said = ["1", "<answer>2</answer> 1", "<answer>2</answer> 1\n#### 3", "\\boxed{4} <answer>2</answer> 1\n#### 3"]
    for place, answer in enumerate((1, 2, 3, 4)):
        assert [right(ANSWER, text, {"answer": answer}) for text in said] == [each == place for each in range(4)]
    # what stands there and is no number is no reason to look further
    assert not right(ANSWER, "\\boxed{x} 1", {"answer": 1})
    exact = {"check": "exact", "column": "answer"}
    assert [right(exact, text, {"answer": "1"}) for text in said] == [True, False, False, False]


@given(st.fractions(max_denominator=500), st.fractions(max_denominator=500))
def test_a_number_is_right_exactly_where_it_is_equal(one, two):
    row = {"answer": f"{two.numerator}/{two.denominator}"}
    assert right(ANSWER, f"Thus \\boxed{{{one.numerator}/{one.denominator}}}.", row) is (one == two)


CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"check": "exact", "value": "Paris"}, " Paris\n", "paris"),
    ({"check": "exact", "value": "Paris"}, "<answer>Paris</answer> it is", "It is Paris"),
    ({"check": "exact", "value": "New York"}, "New  York", "New York."),
    ({"check": "exact", "value": "paris.", "ignore_case": True, "ignore_punctuation": True}, "PARIS!", "Pari"),
    ({"check": "exact", "value": ["Paris", "Lutetia"]}, "\\boxed{Lutetia}", "Rome"),
    ({"check": "exact", "value": 12}, "12", "12.0"),
    ({"check": "numeric", "value": 12}, "12.0", "13"),
    ({"check": "regex", "pattern": r"#\d{4}\b"}, "order #1234", "order #12"),
    ({"check": "regex", "pattern": r"\d+", "full": True}, "12", "12 "),
    ({"check": "json"}, '{"a": 1}', "{'a': 1}"),
    ({"check": "json"}, '```json\n{"a": 1}\n```', 'Here: {"a": 1}'),
    ({"check": "json", "fenced": False}, '{"a": 1}', '```json\n{"a": 1}\n```'),
    ({"check": "json", "schema": {"required": ["a"]}}, '{"a": 1}', '{"b": 1}'),
    ({"check": "json"}, "1", "NaN"),
    ({"check": "length", "min": 2, "max": 3}, "a b", "a"),
    ({"check": "length", "max": 3}, "a b c", "a b c d"),
    ({"check": "length", "unit": "characters", "max": 3}, "a b", "a bc"),
    ({"check": "starts_with", "values": ["Dear", "Hello"]}, " Hello you", "hello"),
    ({"check": "starts_with", "values": ["dear"], "ignore_case": True}, "DEAR", "Oh dear"),
    ({"check": "ends_with", "values": ["Thanks.", "?"]}, "Is it? \n", "Is it"),
    ({"check": "contains", "values": ["order", "refund"]}, "refund the order", "refund"),
    ({"check": "contains", "values": ["order"], "ignore_case": True}, "ORDER", "odor"),
    ({"check": "excludes", "values": ["sorry", "cannot"]}, "Sorry", "we cannot"),
    ({"check": "no_code"}, "use `x`", "so:\n  ```python\nx\n```"),
    ({"check": "no_code"}, "a ~ b ~~~", "~~~\nx\n~~~"),
    ({"check": "tags"}, "<think>a</think>\n<answer>b</answer>\n", "<answer>b</answer><think>a</think>"),
    ({"check": "tags"}, "<think></think><answer></answer>", "<think>a</think><answer>b</answer> so"),
    ({"check": "tags"}, "<think>a</think><answer>b</answer>", "<think>a<answer>b</answer></think>"),
    ({"check": "tags"}, "<think>a</think><answer>b</answer>", "<think>a</think><think>a</think><answer>b</answer>"),
    ({"check": "tags", "tags": ["sum"]}, "<sum>1</sum>", "<sum>1"),
]


@pytest.mark.checklist("W4")
@pytest.mark.parametrize(("entry", "good", "bad"), CASES)
def test_w04_each_check_passes_and_fails(entry: dict[str, Any], good: str, bad: str):
    assert right(entry, good)
    assert not right(entry, bad)


EXACT: list[tuple[dict[str, Any], str, object, bool]] = [
    # white space is one space, and none at the ends; all else counts
    ({}, "\n New \t York ", "New York", True),
    ({}, "NewYork", "New York", False),
    ({}, "new york", "New York", False),
    ({}, "New York.", "New York", False),
    ({"ignore_case": True}, "NEW york", "New York", True),
    ({"ignore_case": True}, "STRASSE", "Straße", True),
    ({"ignore_case": True}, "New York.", "New York", False),
    ({"ignore_punctuation": True}, '"New York!"', "New York", True),
    ({"ignore_punctuation": True}, "new york", "New York", False),
    ({"ignore_punctuation": True}, "New-York", "New York", False),
    # numbers are texts here
    ({}, "12.0", 12, False),
    ({}, "12", 12, True),
    ({}, "It is 12", 12, False),
    ({}, "It is \\boxed{12}", 12, True),
    ({}, "12", "6 + 6\n#### 12", True),
    ({}, "Rome", ["Paris", "Rome"], True),
    ({}, "Paris, Rome", ["Paris", "Rome"], False),
    ({}, "", "Rome", False),
]


@pytest.mark.checklist("W3")
@pytest.mark.parametrize(("more", "text", "answer", "good"), EXACT)
def test_w03_a_text_is_right_where_it_is_that_text(more: dict[str, Any], text: str, answer: object, good: bool):
    assert right({"check": "exact", "column": "answer", **more}, text, {"answer": answer}) is good


@pytest.mark.checklist("W4")
def test_w04_tokens_are_those_of_the_reply():
    entry = {"check": "length", "unit": "tokens", "min": 2, "max": 3}
    assert [right(entry, "any text", tokens=each) for each in (1, 2, 3, 4)] == [False, True, True, False]


@pytest.mark.checklist("W4")
def test_w04_a_patterns_first_group_is_compared_with_a_column():
    entry = {"check": "regex", "pattern": r"Answer: (\w)", "column": "letter"}
    assert right(entry, "Answer: B", {"letter": "B"})
    assert right(entry, "Answer: B", {"letter": ["A", "B"]})
    assert not right(entry, "Answer: B", {"letter": "A"})
    assert not right(entry, "B", {"letter": "B"})


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "check: is missing, expected one of exact, numeric"),
    ({"check": "numerical"}, "did you mean 'numeric'?"),
    ({"check": 3}, "is 3, expected one of"),
    ({"check": "numeric"}, "nothing is named that replies are compared with"),
    ({"check": "numeric", "column": "a", "value": 1}, "side by side"),
    ({"check": "numeric", "value": "twelve"}, ".value: the answer to compare with is 'twelve', expected a number"),
    ({"check": "numeric", "value": True}, "expected text or a number"),
    ({"check": "numeric", "value": []}, "the list of answers is empty"),
    ({"check": "numeric", "column": ""}, "expected a column's name"),
    ({"check": "numeric", "value": 1, "tolerance": -1}, ".tolerance: is -1, expected a number from 0"),
    ({"check": "numeric", "value": 1, "tolerance": float("nan")}, "expected a number from 0"),
    ({"check": "numeric", "value": 1, "decimal": ";"}, "expected '.' or ','"),
    ({"check": "numeric", "value": 1, "extract": "box"}, "did you mean 'boxed'?"),
    ({"check": "numeric", "value": 1, "extract": []}, "expected some of"),
    ({"check": "numeric", "value": 1, "extract": 3}, "expected some of"),
    ({"check": "exact", "value": 1, "tolerance": 1}, ".tolerance: check: exact takes none"),
    ({"check": "exact", "value": "a", "ignore_case": "yes"}, "expected true or false"),
    ({"check": "regex"}, "is no regular expression"),
    ({"check": "regex", "pattern": "("}, "is no regular expression"),
    ({"check": "regex", "pattern": "a", "column": "b"}, "has no group"),
    ({"check": "json", "schema": "x.json"}, ".schema: is 'x.json', expected a JSON schema"),
    ({"check": "length"}, "without min or max"),
    ({"check": "length", "min": 3, "max": 2}, "min 3 is above max 2"),
    ({"check": "length", "min": True}, "expected a whole number from 0"),
    ({"check": "length", "min": 1, "unit": "word"}, "did you mean 'words'?"),
    ({"check": "contains", "values": "a"}, "expected a list of texts"),
    ({"check": "contains", "values": [""]}, "expected a list of texts"),
    ({"check": "no_code", "values": ["a"]}, "takes none; leave it out"),
    ({"check": "tags", "tags": "think"}, "expected a list of names"),
    ({"check": "tags", "tags": ["<a>"]}, "expected a list of names"),
    ({"check": "tags", "tags": ["a", "a"]}, "each stands once"),
]


@pytest.mark.parametrize(("entry", "said"), WRONG)
def test_a_wrong_entry_is_refused_in_words(entry: dict[str, Any], said: str):
    with pytest.raises(UserError) as error:
        parse_verifier(entry, HERE)
    assert said in str(error.value) and str(error.value).startswith(HERE)
    assert "\n" not in str(error.value)


@pytest.mark.checklist("W5")
@pytest.mark.parametrize("row", [{}, {"answer": None}, {"answer": "twelve"}, {"answer": []}, {"answer": {"a": 1}}])
def test_w05_a_row_that_does_not_say_the_answer_is_no_wrong_reply(row: dict[str, object]):
    verifier = parse_verifier(ANSWER, HERE)
    with pytest.raises(Unusable):
        verifier.verdict("12", row, 1)
    with pytest.raises(Unusable):
        verifier.check_row(row)
    verifier.check_row({"answer": "12 apples"})


REPLIES = Replies(["a?", "b?", "c?"], ["1", "2", "3"], {"answer": [1, None, 4]}, rows=[7, 8, 9])


@pytest.mark.checklist("W5")
def test_w05_a_row_without_an_answer_is_named_and_stops():
    scorer = VerifierScorer.of(parse_verifier(ANSWER, HERE), "reward numeric", "stop")
    with pytest.raises(UserError, match=r"reward numeric: prompt 9 \('b\?'\), reply '2': its row has no 'answer'; .*"):
        scorer(REPLIES)


@pytest.mark.checklist("W5")
def test_w05_or_counts_as_the_recipe_says(caplog):
    rules: list[tuple[Any, Any]] = [(0.25, 0.25), ("skip", None)]
    for rule, filled in rules:
        scores = VerifierScorer.of(parse_verifier(ANSWER, HERE), "reward numeric", rule)(REPLIES)
        assert [scores[0], scores[2]] == [1.0, 0.0]
        assert scores[1] == filled if filled is not None else scores[1] != scores[1]
    assert "1 of 3 replies failed and count as 0.25" in caplog.text


@pytest.mark.checklist("W8")
def test_w08_a_source_that_scores_nothing_stops_whatever_the_recipe_says():
    scorer = VerifierScorer.of(parse_verifier(ANSWER, HERE), "reward numeric", 0.0)
    with pytest.raises(UserError, match="none of 1 replies has a score; prompt 9"):
        scorer(REPLIES.take([1]))


def test_a_pattern_that_takes_forever_is_found_by_trying(monkeypatch):
    monkeypatch.setattr("preftune.stages.scorers.rubric._PATIENCE", 0.05)
    with pytest.raises(UserError, match="takes more than"):
        parse_verifier({"check": "regex", "pattern": "(a+)+$"}, HERE).try_out()
