"""Every common format is recognised without a mapping, and what is missing is named."""

import json

import pytest

from preftune.data import formats
from preftune.data.formats import Format, normalise
from preftune.data.messages import to_messages
from preftune.data.rows import Unusable
from preftune.errors import UserError

U, A = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
U2, A2 = {"role": "user", "content": "More?"}, {"role": "assistant", "content": "Yes."}
B = {"role": "assistant", "content": "Go away."}
S = {"role": "system", "content": "Be kind."}
HH = "\n\nHuman: Hi?\n\nAssistant:"


def one(raw, kind, columns=None):
    [row] = normalise(raw, kind, "rows.jsonl:7", columns)
    return row


@pytest.mark.parametrize("name", ["completion", "response", "output", "answer"])
@pytest.mark.parametrize("prompt", ["prompt", "instruction", "question", "query", "input"])
def test_prompt_and_completion_under_their_common_names(prompt, name) -> None:
    row = one({prompt: "Hi?", name: "Hello.", "id": 3}, "demo")
    assert (row.prompt, row.completion, row.columns, row.origin) == ([U], [A], {"id": 3}, "rows.jsonl:7")


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "Hi?", "completion": "Hello."},
        {"prompt": [U], "completion": [A]},
        {"messages": [U, A]},
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
        {"instruction": "Hi?", "input": "", "output": "Hello."},
        {"prompt": HH, "completion": "Hello."},
        {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go away."},
        {"chosen": HH + " Hello.", "rejected": HH + " Go away."},
    ],
)
def test_demonstrations(raw) -> None:
    row = one(raw, "demo")
    assert (row.prompt, row.completion) == ([U], [A])


def test_alpaca_input_system_and_history() -> None:
    raw = {"instruction": "Add.", "input": "1+1", "output": "2", "system": "Be kind.", "history": [["Hi?", "Hello."]]}
    row = one(raw, "demo")
    assert row.prompt == [S, U, A, {"role": "user", "content": "Add.\n\n1+1"}]
    assert row.columns == {}


@pytest.mark.parametrize("kind", ["demo", "pair", "label", "prompt"])
def test_an_instruction_with_its_input_is_the_prompt_of_every_kind(kind) -> None:
    raw = {"instruction": "Add.", "context": "1+1", "chosen": "2", "rejected": "3", "history": [], "id": 1}
    for row in normalise(raw, kind, "x"):
        assert row.prompt == [{"role": "user", "content": "Add.\n\n1+1"}]
        assert row.columns.keys() - {"chosen", "rejected"} == {"history", "id"}


def test_an_instruction_beside_a_conversation_is_a_column() -> None:
    row = one({"messages": [U, A], "instruction": "Add.", "input": "1+1"}, "demo")
    assert (row.prompt, row.columns) == ([U], {"instruction": "Add.", "input": "1+1"})


def test_another_format_is_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_ours(raw, kind, origin):
        best, *_, worst = sorted(raw["answers"], key=lambda answer: answer["rank"])
        rest = {name: value for name, value in raw.items() if name != "answers"}
        return rest | {"chosen": best["text"], "rejected": worst["text"]}

    ranked = Format("ranked", lambda raw, kind: "answers" in raw, as_ours)
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, ranked))
    answers = [{"text": "Go away.", "rank": 9}, {"text": "Hello.", "rank": 1}, {"text": "Hm.", "rank": 2}]
    raw = {"prompt": "Hi?", "answers": answers}
    assert (one(raw, "pair").chosen, one(raw, "pair").rejected) == ([A], [B])
    assert one(raw, "demo").completion == [A] and one(raw, "prompt").prompt == [U]
    assert [row.label for row in normalise(raw, "label", "x")] == [True, False]


def test_multi_turn_demonstration_starts_at_the_first_reply() -> None:
    row = one({"messages": [S, U, A, U2, A2, U]}, "demo")
    assert (row.prompt, row.completion) == ([S, U], [A, U2, A2])


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go away."},
        {"prompt": [U], "chosen": [A], "rejected": [B]},
        {"chosen": [U, A], "rejected": [U, B]},
        {"prompt": "Hi?", "chosen": [U, A], "rejected": [U, B], "messages": [U, A]},
        {"chosen": HH + " Hello.", "rejected": HH + " Go away."},
        {"prompt": HH, "chosen": " Hello.", "rejected": " Go away."},
        {
            "conversations": [{"from": "human", "value": "Hi?"}],
            "chosen": {"from": "gpt", "value": "Hello."},
            "rejected": {"from": "gpt", "value": "Go away."},
        },
    ],
)
def test_pairs(raw) -> None:
    row = one(raw, "pair")
    assert row.prompt == [U]
    assert row.chosen is not None and row.rejected is not None
    assert [m["content"].strip() for m in row.chosen + row.rejected] == ["Hello.", "Go away."]


def test_pair_serves_the_other_kinds() -> None:
    raw = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go away."}
    assert [(r.completion, r.label) for r in normalise(raw, "label", "x")] == [([A], True), ([B], False)]
    assert one(raw, "prompt").prompt == [U]


@pytest.mark.parametrize(("value", "label"), [(True, True), (0, False), ("False", False), ("1", True)])
def test_unpaired_label(value, label) -> None:
    row = one({"messages": [U, A, U2, A2], "label": value}, "label")
    assert (row.prompt, row.completion, row.label) == ([U, A, U2], [A2], label)


def test_a_label_that_is_none() -> None:
    with pytest.raises(UserError, match="'maybe'"):
        one({"messages": [U, A], "label": "maybe"}, "label")


def test_unwanted_completions_are_no_demonstrations() -> None:
    assert one({"messages": [U, A], "label": True}, "demo").completion == [A]
    with pytest.raises(Unusable):
        one({"messages": [U, A], "label": False}, "demo")


def test_prompt_only_keeps_the_other_columns() -> None:
    row = one({"prompt": "Hi?", "answer": "Hello.", "level": 2}, "prompt")
    assert (row.prompt, row.columns) == ([U], {"answer": "Hello.", "level": 2})
    assert one({"messages": [U, A, U2, A2]}, "prompt").prompt == [U, A, U2]
    assert one({"messages": [U, A, U2]}, "prompt").prompt == [U, A, U2]


def test_sharegpt_tool_call() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    tools = [{"name": "add", "parameters": {"type": "object"}}]
    row = one(
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hi?"},
                {"from": "function_call", "value": json.dumps(call)},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "Hello."},
            ],
            "tools": json.dumps(tools),
        },
        "demo",
    )
    assert row.tools == tools
    assert row.prompt == [S, U]
    assert row.completion == [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "2"},
        A,
    ]


def test_nulls_that_arrow_filled_in_are_left_out() -> None:
    raw = {"messages": [{**U, "tool_calls": None, "name": None}, {**A, "tool_calls": []}], "tools": None}
    row = one(raw, "demo")
    assert (row.prompt, row.completion, row.tools) == ([U], [A], None)


def test_text_parts_are_joined_and_images_refused() -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i?"}]
    assert one({"messages": [{"role": "user", "content": parts}, A]}, "demo").prompt == [U]
    with pytest.raises(UserError, match=r"messages\[0\]"):
        one({"messages": [{"role": "user", "content": [{"type": "image"}]}, A]}, "demo")


def test_explicit_columns_win_over_recognition() -> None:
    raw = {"prompt": "wrong", "ask": "Hi?", "good": "Hello.", "bad": "Go away.", "gap": "1.5"}
    row = one(raw, "pair", {"prompt": "ask", "chosen": "good", "rejected": "bad", "margin": "gap"})
    assert (row.prompt, row.chosen, row.rejected, row.margin) == ([U], [A], [B], 1.5)


def test_mapping_to_an_absent_field() -> None:
    with pytest.raises(UserError, match="did you mean 'question'"):
        one({"question": "Hi?", "answer": "Hello."}, "demo", {"prompt": "questions"})


def test_missing_field_names_everything() -> None:
    with pytest.raises(UserError) as error:
        one({"prompt": "Hi?", "choosen": "Hello.", "rejected": "Go away."}, "pair")
    assert error.value.where == "rows.jsonl:7"
    assert "no chosen" in error.value.problem and "prompt, choosen, rejected" in error.value.problem
    assert error.value.remedy == "map it with columns: {chosen: choosen}"


@pytest.mark.parametrize("kind", ["demo", "pair", "label", "prompt"])
def test_nothing_recognised(kind) -> None:
    with pytest.raises(UserError, match="found foo"):
        one({"foo": "x", "bar": None}, kind)


def test_two_candidates_are_ambiguous() -> None:
    with pytest.raises(UserError, match="response and answer"):
        one({"prompt": "Hi?", "response": "a", "answer": "b"}, "demo")


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "Hi?", "chosen": 3, "rejected": "b"},
        {"prompt": "Hi?", "chosen": [{"text": "a"}], "rejected": "b"},
        {"prompt": "Hi?", "chosen": "a", "rejected": "b", "margin": "much"},
        {"messages": [{"from": "ghost", "value": "boo"}], "chosen": "a", "rejected": "b"},
        {"prompt": "Hi?", "chosen": "a", "rejected": "b", "tools": "{not json"},
    ],
)
def test_wrong_values_are_the_users_to_correct(raw) -> None:
    with pytest.raises(UserError) as error:
        one(raw, "pair")
    assert error.value.where == "rows.jsonl:7"


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "Hi?", "chosen": "same", "rejected": "same"},
        {"chosen": [U, A], "rejected": [U, A]},
        {"prompt": "Hi?", "chosen": " ", "rejected": "b"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
        {"chosen": [U, A, U2, A2], "rejected": [U, B, U2, A2]},
        {"chosen": HH + " Hello.", "rejected": "\n\nHuman: Ho?\n\nAssistant: Go away."},
        {"chosen": HH, "rejected": HH + " Go away."},
    ],
)
def test_pairs_that_cannot_serve(raw) -> None:
    with pytest.raises(Unusable):
        one(raw, "pair")


def vote(preference, prompt=(U,), a="Hello.", b="Go away.") -> dict:
    return {
        "prompt": list(prompt) if isinstance(prompt, tuple) else prompt, "policy_a": "sft", "policy_b": "dpo",
        "preference": preference, "completion_a": a, "completion_b": b,
    }  # fmt: skip


@pytest.mark.parametrize(("preference", "chosen", "rejected"), [(1, A, B), (1.25, A, B), (2, B, A), (1.75, B, A)])
def test_votes_are_pairs(preference, chosen, rejected) -> None:
    row = one(vote(preference, (S, U, A2, U2)), "pair")
    assert (row.prompt, row.chosen, row.rejected) == ([S, U, A2, U2], [chosen], [rejected])
    assert row.columns == {"policy_a": "sft", "policy_b": "dpo"}


def test_votes_serve_the_other_kinds() -> None:
    assert one(vote(2), "demo").completion == [B]
    assert [(row.completion, row.label) for row in normalise(vote(2), "label", "f:1")] == [([B], True), ([A], False)]
    assert one(vote(1), "prompt").prompt == [U]
    # a reply that is written like a dialogue is still one reply
    assert one(vote(1, a=HH + " Sure."), "pair").chosen == [{"role": "assistant", "content": HH + " Sure."}]


def test_votes_that_are_no_training_data() -> None:
    bad = vote(1.5) | {"both_bad": True}
    for raw, said in (
        (vote(1.5), "neither"),
        (bad, "both replies are bad"),
        (vote(1, 3), "evaluation's own samples"),
        (vote(1, b="Hello."), "same"),
    ):
        with pytest.raises(Unusable, match=said):
            normalise(raw, "pair", "f:1")
    for raw, said in (
        (vote(3), "preference is 3"),
        (vote(True), "preference is True"),
        (vote(1) | {"completion_a": None}, "is None"),
    ):
        with pytest.raises(UserError, match=f"f:1: .*{said}"):
            normalise(raw, "pair", "f:1")


@pytest.mark.parametrize("margin", [float("nan"), float("inf"), "much", "nan", [1]])
def test_a_margin_that_is_no_finite_number_names_its_row(margin) -> None:
    with pytest.raises(UserError, match=r"here:1: margin is .*, expected a finite number"):
        normalise({"prompt": "p", "chosen": "a", "rejected": "b", "margin": margin}, "pair", "here:1")


@pytest.mark.parametrize(
    ("speaker", "role"),
    [("human", "user"), ("prompter", "user"), ("gpt", "assistant"), ("Model", "assistant"), ("BOT", "assistant"),
     ("function", "tool"), ("observation", "tool"), ("ipython", "tool"), ("tool_response", "tool")],
)  # fmt: skip
def test_a_speaker_has_the_same_role_in_role_as_in_from(speaker, role) -> None:
    said = [to_messages([message], "user", "here:1", "m") for message in ({"role": speaker, "content": "x"},
                                                                         {"from": speaker, "value": "x"})]  # fmt: skip
    assert said == [[{"role": role, "content": "x"}]] * 2


def test_calls_are_read_however_they_are_written() -> None:
    wanted = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    text = '{"name": "f", "arguments": {"a": 1}}'
    for written in (
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "assistant", "content": "", "tool_calls": '[{"function": {"name": "f", "arguments": {"a": 1}}}]'},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "tool_call", "content": text},
        {"from": "function_call", "value": text},
    ):
        [message] = to_messages([written], "user", "here:1", "m")
        assert (message["role"], message["content"], message["tool_calls"]) == ("assistant", "", [wanted])
    # calls in turns of their own, one after the other, are made at once
    [both] = to_messages([{"role": "tool_call", "content": text}] * 2, "user", "here:1", "m")
    assert both["tool_calls"] == [wanted, wanted]
    with pytest.raises(UserError, match=r"here:1: m\[0\]\.tool_calls\.arguments is not JSON"):
        broken = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{a"}}]}
        to_messages([broken], "user", "here:1", "m")


def test_functions_are_tools_of_an_older_name() -> None:
    raw = {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]}
    [row] = normalise(raw | {"functions": [{"name": "f", "parameters": {}}]}, "demo", "here:1")
    assert (row.tools, row.columns) == ([{"type": "function", "function": {"name": "f", "parameters": {}}}], {})
    [row] = normalise(raw | {"functions": "sin, cos"}, "demo", "here:1")
    assert (row.tools, row.columns) == (None, {"functions": "sin, cos"})
    [row] = normalise(raw | {"tools": '[{"type": "function", "function": {"name": "f"}}]'}, "demo", "here:1")
    assert row.tools == [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    "written",
    ['[{"role": "user", "content": "it\'s"}]', """[{'role': 'user', 'content': "it's"}]""",
     '[{"from": "human", "value": "it\'s"}]'],
)  # fmt: skip
def test_messages_written_as_text_are_messages(written) -> None:
    assert to_messages(written, "user", "here:1", "m") == [{"role": "user", "content": "it's"}]
    # any other text that begins like a list is what somebody says
    assert to_messages("[{1}]", "user", "here:1", "m") == [{"role": "user", "content": "[{1}]"}]


def test_openais_preferences_bring_their_tools() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    question = [{"role": "user", "content": "p"}]
    sides = {"preferred_output": [{"role": "assistant", "content": "a"}],
             "non_preferred_output": [{"role": "assistant", "content": "b"}]}  # fmt: skip
    raw = {"input": {"messages": question, "tools": tools}, **sides}
    [row] = normalise(raw, "pair", "here:1")
    assert (row.prompt, row.chosen, row.rejected, row.tools) == (
        question, sides["preferred_output"], sides["non_preferred_output"], tools
    )  # fmt: skip
    columns = {"prompt": "input", "chosen": "preferred_output", "rejected": "non_preferred_output"}
    assert normalise(raw, "pair", "here:1", columns) == [row]


def test_a_mask_is_yes_or_no() -> None:
    with pytest.raises(UserError, match=r"here:1: m\[0\] has weight: 0\.5, expected 0 or 1"):
        to_messages([{"role": "assistant", "content": "x", "weight": 0.5}], "user", "here:1", "m")
    [message] = to_messages([{"role": "assistant", "content": "x", "weight": 1}], "user", "here:1", "m")
    assert message == {"role": "assistant", "content": "x"}
