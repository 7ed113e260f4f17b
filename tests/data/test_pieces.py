"""Texts cut into words: the ids are those of the tokenizer, whatever the text."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from preftune.data import pieces
from preftune.data.pieces import pieces_of, words_of

TEXT = (
    "It's what the people said: the order, of 1234 parts, didn't come in time. We'll send 56 more; they're new. "
    "x    y     z   1  2 \n \n x \n y  \n\n z, , w . . \n  \n "
    "Was w\u00e4re das f\u00fcr ein Gl\u00fcck?  Two  blanks, and\n\nlines.\nA\u00a0b \u3053\u3093\u306b\u3061\u306f"
)
LLAMA = next(each for each in pieces._PATTERNS if "{1,3}" in each)
QWEN = next(each for each in pieces._PATTERNS if "{1,3}" not in each)


def trained(pre: Any, normalizer: Any = None) -> Any:
    """A byte-level tokenizer with merges of its own, and two special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre
    if normalizer is not None:
        core.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|im_start|>", "<|im_end|>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")


def by_split(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


TOKENIZERS = {
    "gpt2": trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": trained(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ),
    "digits": trained(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ),
    "llama": trained(by_split(LLAMA)),
    "qwen": trained(by_split(QWEN)),
}
SPLIT = st.text(
    st.sampled_from(" \n\t\r\u00a0\u2028'abcdefstlrvmIT01234.,!?-_<|>\u00e9\u0301\u3042\u2019\U0001f600\x00\x1f\u0085"),
    max_size=60,
)
WHOLE = st.lists(
    st.sampled_from(
        ["It's ", " the", "12 34", "  ", "\n", " \n ", "we'll", " 's", ". ", "<|im_end|>", "\u00e9 ", " \u0301"]
    )
)


@pytest.mark.checklist("B7")
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(SPLIT | WHOLE.map("".join))
def test_b07_ids_by_words_are_the_tokenizers(name, text) -> None:
    tokenizer = TOKENIZERS[name]
    made = pieces_of(tokenizer)
    assert made is not None and made._firsts is not None
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert made.ids([text]) == [expected] and made.ids([text, "the " + text])[0] == expected


@given(SPLIT)
def test_words_joined_are_the_piece(text) -> None:
    assert " ".join(words_of(text)) == text


@pytest.mark.parametrize(
    "pre",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        by_split(r"\s*\w+"),
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    ],
)
def test_what_is_not_known_to_end_words_is_tokenised_whole(pre) -> None:
    made = pieces_of(trained(pre))
    assert made is not None and made._firsts is None


def test_a_token_that_may_stand_anywhere_is_looked_for_in_the_whole() -> None:
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_tokens(["people said"])
    made = pieces_of(tokenizer)
    assert made is not None and made._firsts is None
    assert made.ids([TEXT]) == [tokenizer(TEXT, add_special_tokens=False)["input_ids"]]


def test_words_are_forgotten_before_they_fill_the_memory(monkeypatch) -> None:
    monkeypatch.setattr(pieces, "_KEPT", 10)
    tokenizer = TOKENIZERS["gpt2"]
    made = pieces_of(tokenizer)
    assert made is not None
    texts = [" ".join(f"w{n}" for n in range(start, start + 8)) + " " + "x" * 40 for start in range(0, 80, 8)]
    for text in texts * 2:
        assert made.ids([text]) == [tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert len(made._others) <= 10 + 9 and max(map(len, made._others)) <= 32
