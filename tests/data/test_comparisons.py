"""Comparisons as public tools write them, as a stage's data: pairs with the preferred reply as the chosen one."""

import json
from typing import Any

import pytest

from preftune.data.compared import NO_PREFERENCE, NO_REPLIES, NO_VERDICT
from preftune.data.formats import normalise
from preftune.data.rows import Unusable
from preftune.data.spec import RowKind


def pair(raw: dict[str, Any], kind: RowKind = "pair") -> tuple:
    (row,) = normalise(raw, kind, "f.jsonl:1")
    sides = [None if side is None else side[0]["content"] for side in (row.chosen, row.rejected, row.completion)]
    return [turn["content"] for turn in row.prompt], *sides


def talk(*said: object) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[place % 2], "content": each} for place, each in enumerate(said)]


def alpaca(preference: object, **changes: Any) -> dict[str, Any]:
    given = {"instruction": "Name a tree.", "output_1": "Oak.", "output_2": "Human: an ash."}
    return given | {"generator_1": "x", "generator_2": "y", "preference": preference} | changes


def arena(winner: object, first: object, second: object, **changes: Any) -> dict[str, Any]:
    return {
        "model_a": "x",
        "model_b": "y",
        "winner": winner,
        "conversation_a": first,
        "conversation_b": second,
    } | changes


def test_alpaca_evals_annotations_are_pairs():
    assert pair(alpaca(1.9)) == (["Name a tree."], "Human: an ash.", "Oak.", None)
    assert pair(alpaca(1)) == (["Name a tree."], "Oak.", "Human: an ash.", None)
    assert pair(alpaca(2), "demo") == (["Name a tree."], None, None, "Human: an ash.")
    assert pair(alpaca(None), "prompt") == (["Name a tree."], None, None, None)
    labelled = normalise(alpaca(1), "label", "f.jsonl:1")
    assert [(row.completion and row.completion[0]["content"], row.label) for row in labelled] == [
        ("Oak.", True),
        ("Human: an ash.", False),
    ]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (alpaca(None), NO_VERDICT),
        (alpaca(0), NO_PREFERENCE),
        (alpaca(1.5), NO_PREFERENCE),
        (alpaca(2, output_2=None), NO_REPLIES),
        (arena("tie (bothbad)", talk("Hi", "Yes."), talk("Hi", "No.")), NO_PREFERENCE),
        (arena(None, talk("Hi", "Yes."), talk("Hi", "No.")), NO_VERDICT),
        (arena("model_a", talk("Hi", [{"type": "image", "image": {}}]), talk("Hi", "No.")), NO_REPLIES),
        ({"question_id": 1, "model": "x", "games": [{"score": "A>B"}, {"score": "B>A"}]}, NO_REPLIES),
        ({"question_id": 1, "model_1": "x", "model_2": "y", "g1_winner": "tie", "g2_winner": "tie"}, NO_REPLIES),
    ],
)
def test_what_is_no_pair_is_left_out_and_says_why(raw, reason):
    with pytest.raises(Unusable, match=reason):
        pair(raw)


@pytest.mark.parametrize("written", [lambda turns: turns, json.dumps, repr])
def test_arena_conversations_may_be_text_and_contents_lists(written):
    parts = [{"type": "text", "text": "Yes", "image": None}, {"type": "text", "text": ".", "image": None}]
    raw = arena("model_b", written(talk("Hi", parts)), written(talk("Hi", "No.")))
    assert pair(raw) == (["Hi"], "No.", "Yes.", None)


def test_arena_talks_end_with_the_turn_that_was_judged():
    raw = arena("model_a", talk("Hi", "Yes.", "Why?", "So."), talk("Hi", "No.", "Why?", "Thus."), turn=1)
    assert pair(raw) == (["Hi"], "Yes.", "No.", None)
    with pytest.raises(Unusable, match="differ in more than one turn"):
        pair(raw | {"turn": 2})


def test_arena_responses_are_lists_in_texts_or_plain():
    lists = {"prompt": '["Hi"]', "response_a": '["Yes."]', "response_b": '["No."]', "winner_model_a": "0"}
    assert pair(lists | {"winner_model_b": "1", "winner_tie": "0"}) == (["Hi"], "No.", "Yes.", None)
    plain = {"prompt": "[Hi]", "response_a": "Yes.", "response_b": "No.", "winner": "model_a"}
    assert pair(plain) == (["[Hi]"], "Yes.", "No.", None)
