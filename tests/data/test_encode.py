"""Encoding: what is trained, what is cut, and that it is counted."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.data import encode
from preftune.data.encode import IGNORED, encode_demos, encode_labels, encode_pairs, encode_prompts
from preftune.data.rows import Row
from preftune.errors import UserError

words = st.text(st.characters(codec="utf-8", exclude_categories=["C"], exclude_characters="<>|"), min_size=1)


def trained(row) -> list[list[int]]:
    """The runs of labels that are not ignored."""
    runs: list[list[int]] = [[]]
    for label in row["labels"]:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


@pytest.mark.checklist("D5")
@settings(max_examples=50)
@given(st.lists(words, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0))
def test_d05_every_reply_trains_with_its_eos_and_nothing_else(kit, chatml, turns) -> None:
    messages = [(kit.assistant if i % 2 else kit.user)(text) for i, text in enumerate(turns)]
    dataset, report = encode_demos([Row(messages[:1], messages[1:])], chatml, kit.spec(max_length=None))
    row = dataset[0]
    assert [chatml.decode(run) for run in trained(row)] == [text + "<|im_end|>" for text in turns[1::2]]
    assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    assert row["input_ids"][-1] == row["labels"][-1] == chatml.eos_token_id
    whole = chatml.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert row["input_ids"] == whole[:-1]
    assert report.notes == {}


@pytest.mark.checklist("D5")
def test_d05_eos_trains_under_the_default_template(kit) -> None:
    tokenizer = kit.tokenizer(None)
    row = encode_demos([kit.demo()], tokenizer, kit.spec())[0][0]
    assert [tokenizer.decode(run) for run in trained(row)] == [" Hello.<|im_end|>"]


def test_tool_turns_inside_the_completion_are_not_trained(kit, chatml) -> None:
    tool = {"role": "tool", "content": "secret"}
    row = Row([kit.user("Hi?")], [kit.assistant("Look."), tool, kit.assistant("Done.")])
    encoded = encode_demos([row], chatml, kit.spec())[0][0]
    assert [chatml.decode(run) for run in trained(encoded)] == ["Look.<|im_end|>", "Done.<|im_end|>"]


def test_turns_that_the_template_rewrites_are_found_in_the_whole(kit) -> None:
    tokenizer = kit.tokenizer(kit.THINKING)
    one = kit.demo()
    two = Row(one.prompt, [*(one.completion or []), kit.user("More?"), kit.assistant("Yes.")], origin="here:2")
    dataset, report = encode_demos([one, two], tokenizer, kit.spec())
    assert [tokenizer.decode(run) for run in trained(dataset[0])] == ["<think></think>Hello.<|im_end|>"]
    assert [tokenizer.decode(run) for run in trained(dataset[1])] == [
        "Hello.<|im_end|>",
        "<think></think>Yes.<|im_end|>",
    ]
    assert report.notes == {}


def test_labels_and_margins(kit, chatml) -> None:
    dataset, _ = encode_labels([kit.demo(label=True), kit.demo(label=False)], chatml, kit.spec())
    assert dataset["label"][:] == [True, False]
    assert encode_pairs([kit.pair(margin=0.5)], chatml, kit.spec())[0][0]["margin"] == 0.5
    some, _ = encode_pairs([kit.pair(margin=0.5), kit.pair()], chatml, kit.spec())
    assert some.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]


def test_prompts_keep_messages_and_columns(kit, chatml) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1]}}}]}
    rows = [kit.demo(columns={"answer": 4}), Row([kit.user("x"), call, kit.user("y")], columns={"tags": ["a"]})]
    dataset, _ = encode_prompts(rows, kit.tokenizer(None), kit.spec())
    assert dataset[0]["prompt"] == rows[0].prompt
    assert dataset[1]["prompt"] == rows[1].prompt
    assert [json.loads(text) for text in dataset["columns"]] == [{"answer": 4}, {"tags": ["a"]}]


def test_too_long_is_dropped_and_counted(kit, chatml) -> None:
    rows = [kit.pair(), kit.pair(chosen="x" * 200), kit.pair(question="y" * 200)]
    dataset, report = encode_pairs(rows, chatml, kit.spec(max_length=200, max_prompt_length=100))
    assert len(dataset) == report.used == 1
    assert report.count(encode.TOO_LONG) == 1
    assert report.count(encode.PROMPT_TOO_LONG) == 1
    assert report.read == 3


def test_too_long_is_an_error_with_its_place(kit, chatml) -> None:
    with pytest.raises(UserError, match=r"here:1: \d+ tokens, longer than max_length = 20"):
        encode_demos([kit.demo()], chatml, kit.spec(max_length=20, overflow="error"))


def test_prompts_are_cut_from_the_left_and_replies_from_the_right(kit, chatml) -> None:
    full = encode_labels([kit.demo(label=True, answer="Hello there.")], chatml, kit.spec())[0][0]
    limits = kit.spec(max_prompt_length=15, max_length=20, overflow="truncate")
    dataset, report = encode_labels([kit.demo(label=True, answer="Hello there.")], chatml, limits)
    row = dataset[0]
    assert row["prompt_ids"] == full["prompt_ids"][-15:]
    assert row["completion_ids"] == full["completion_ids"][:5]
    # A reply that was cut did not end: no EOS is invented for it.
    assert chatml.eos_token_id not in row["completion_ids"]
    assert report.count(encode.TRUNCATED) == 1


def test_cut_prompt_keeps_its_bos(kit) -> None:
    tokenizer = kit.tokenizer("{{ bos_token }}" + kit.CHATML)
    full = encode_prompts([kit.demo()], tokenizer, kit.spec())[0][0]["prompt_ids"]
    cut = encode_prompts([kit.demo()], tokenizer, kit.spec(max_prompt_length=12, overflow="truncate"))[0][0]
    assert cut["prompt_ids"] == [tokenizer.bos_token_id, *full[-11:]]


def test_cut_demonstration_keeps_labels_beside_their_tokens(kit, chatml) -> None:
    row = Row([kit.user("Hi?" * 20)], [kit.assistant("Hello."), kit.user("More?"), kit.assistant("Yes.")])
    limits = kit.spec(max_prompt_length=15, max_length=50, overflow="truncate")
    encoded = encode_demos([row], chatml, limits)[0][0]
    assert len(encoded["input_ids"]) == len(encoded["labels"]) == 50
    assert all(label in (IGNORED, token) for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True))
    assert chatml.decode(trained(encoded)[0]) == "Hello.<|im_end|>"


@settings(max_examples=50)
@given(
    st.tuples(st.sampled_from(["drop", "truncate"]), st.integers(1, 60), st.one_of(st.none(), st.integers(1, 60))),
    st.lists(st.tuples(words, words, words), min_size=1, max_size=5),
)
def test_no_limit_is_ever_passed_and_every_row_is_accounted_for(kit, chatml, limits, texts) -> None:
    overflow, limit, prompt = limits
    rows = [kit.pair(a, b + "!", question) for question, a, b in texts]
    try:
        dataset, report = encode_pairs(
            rows, chatml, kit.spec(overflow=overflow, max_length=limit, max_prompt_length=prompt)
        )
    except UserError as error:
        assert "no row is left" in error.problem
        return
    for row in dataset.to_list():
        assert len(row["prompt_ids"]) <= (prompt or limit)
        for reply in (row["chosen_ids"], row["rejected_ids"]):
            assert reply and len(row["prompt_ids"]) + len(reply) <= limit
        assert row["chosen_ids"] != row["rejected_ids"]
    assert report.read == len(rows) == len(dataset) + report.dropped_rows


def test_sides_that_truncation_makes_equal_are_dropped(kit, chatml) -> None:
    same = kit.pair("x" * 50 + "a", "x" * 50 + "b")
    limits = kit.spec(max_length=60, overflow="truncate")
    dataset, report = encode_pairs([kit.pair(), same], chatml, limits)
    assert (len(dataset), report.count("chosen and rejected are the same")) == (1, 1)


def test_a_tool_call_that_the_template_leaves_out_is_not_trained_as_silence(kit, chatml) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    dataset, report = encode_demos([kit.demo(tools=[{"name": "f"}])], chatml, kit.spec())
    assert len(dataset) == 1
    assert report.count(encode.TOOLS_UNSEEN) == 1
    with pytest.raises(UserError, match=r"here:2: the chat template leaves out the call of 'f'"):
        encode_demos([Row([kit.user("Hi?")], [call], origin="here:2")], chatml, kit.spec())


def test_no_row_left_is_an_error_that_says_why(kit, chatml) -> None:
    with pytest.raises(UserError, match="longer than max_length: 1"):
        encode_demos([kit.demo()], chatml, kit.spec(max_length=3))


def test_rows_of_another_kind_are_refused(kit, chatml) -> None:
    with pytest.raises(UserError, match="no chosen"):
        encode_pairs([kit.demo()], chatml, kit.spec())


def test_many_rows_keep_their_order(kit, chatml, monkeypatch) -> None:
    monkeypatch.setattr(encode, "CHUNK", 3)
    rows = [kit.demo(answer=str(i)) for i in range(8)]
    dataset, _ = encode_demos(rows, chatml, kit.spec())
    assert [chatml.decode(trained(row)[0]) for row in dataset] == [f"{i}<|im_end|>" for i in range(8)]


def test_labels_of_one_class_are_said(kit, chatml) -> None:
    _, report = encode_labels([kit.demo(label=True)] * 2, chatml, kit.spec())
    assert report.notes[encode.ONE_CLASS.format("true")].count == 2
    assert encode_labels([kit.demo(label=True), kit.demo(label=False)], chatml, kit.spec())[1].notes == {}


def test_origins_stand_beside_the_rows_that_are_left(kit, chatml) -> None:
    rows = [Row([kit.user("Hi?")], [kit.assistant("x" * n)], origin=f"here:{n}") for n in (1, 90, 2)]
    dataset, report = encode_demos(rows, chatml, kit.spec(max_length=80))
    assert (len(dataset), report.origins) == (2, ["here:1", "here:2"])
