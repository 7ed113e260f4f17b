"""HH-RLHF texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.hh import is_dialogue, parse_dialogue, split_pair
from preftune.data.rows import Unusable

said = st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=1).map(str.strip).filter(bool)


@given(st.lists(said, min_size=1, max_size=6))
def test_writing_and_parsing_are_inverse(turns) -> None:
    speakers = [("Human", "user"), ("Assistant", "assistant")]
    text = "".join(f"\n\n{speakers[i % 2][0]}: {turn}" for i, turn in enumerate(turns))
    assert parse_dialogue(text) == [{"role": speakers[i % 2][1], "content": turn} for i, turn in enumerate(turns)]


def test_prompt_ends_at_the_last_assistant() -> None:
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    prompt, chosen, rejected = split_pair(start + " good", start + " bad")
    assert [m["content"] for m in prompt] == ["a", "b", "c"]
    assert (chosen, rejected) == ("good", "bad")


def test_sides_that_differ_before_it_are_no_pair() -> None:
    with pytest.raises(Unusable, match="differ"):
        split_pair("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d")


def test_a_speaker_twice_is_one_turn() -> None:
    assert parse_dialogue("\n\nHuman: a\n\nHuman: b\n\nAssistant:") == [{"role": "user", "content": "a\n\nb"}]


def test_a_reply_ends_where_the_human_speaks() -> None:
    _, chosen, _ = split_pair("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "\n\nHuman: a\n\nAssistant: d")
    assert chosen == "b"


@pytest.mark.parametrize("text", ["Hello", "Human: only a question", "\n\nAssistant: only a reply", 3, None])
def test_what_is_no_dialogue(text) -> None:
    assert not is_dialogue(text)
