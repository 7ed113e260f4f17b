"""Where the replies are, in templates that write a turn otherwise once others follow, and what they would leave out."""

import re
from pathlib import Path
from typing import Any

import pytest
import trl

from preftune.data.encode import NONE_TRAINS, encode_demos, encode_pairs, encode_prompts
from preftune.data.messages import to_messages
from preftune.data.rows import Row
from preftune.data.spans import EMPTY_REASONING
from preftune.data.template import set_date
from preftune.data.turns import first_turn
from preftune.errors import UserError
from preftune.models.tokens import set_eos

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SPECIALS = """
<|im_start|> <|im_end|> <|endoftext|> <|start|> <|end|> <|message|> <|channel|> <|return|> <|call|> <|user|>
<|assistant|> <|observation|> <|system|> [gMASK] <sop> <|eot_id|> <|start_header_id|> <|end_header_id|>
<start_of_turn> <end_of_turn> <｜User｜> <｜Assistant｜> <｜begin▁of▁sentence｜> <｜end▁of▁sentence｜>
"""
EOS = {"deepseek_r1_distill": "<｜end▁of▁sentence｜>", "glm4moe": "<|endoftext|>"}
# As Qwen3's: reasoning is read from the content, and written for the last reply alone.
REASONS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% set parts = m.content.split('</think>') %}"
    "{% if loop.last and m.role == 'assistant' and parts | length > 1 %}{{ parts[0] + '</think>' }}{% endif %}"
    "{{ parts[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def family(kit, name: str) -> Any:
    tokenizer = kit.tokenizer((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS.split()})
    tokenizer.eos_token = EOS.get(name, "<|im_end|>")
    set_eos(tokenizer)
    return tokenizer


def row(messages: list[dict[str, Any]], tools: list[Any] | None = None) -> Row:
    prompt, completion = first_turn(to_messages(messages, "user", "here:1", "messages"))
    return Row(prompt, completion, tools=tools, origin="here:1")


def trained(dataset: Any, tokenizer: Any) -> list[str]:
    runs: list[list[int]] = [[]]
    for label in dataset[0]["labels"]:
        if label >= 0:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def said(runs: list[str]) -> list[str]:
    """What each run says: without the header that TRL trains along, an empty block of reasoning, and the turn's end."""
    header = r"^(<\|start\|>assistant|<｜Assistant｜>|\n(?!<think>))"
    empty = r"^\s*(<think>)?\s*</think>\s*"
    end = r"(\s|<\|(im_end|end|return|endoftext|user|observation)\|>|<｜end▁of▁sentence｜>)*$"
    return [re.sub(end, "", re.sub(empty, "", re.sub(header, "", run))) for run in runs]


@pytest.mark.parametrize(
    "name",
    ["qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8", "gptoss", "glm4moe", "deepseek_r1_distill",
     "llama3", "gemma3", "phi3", "qwen2_5", "cohere", "lfm2"],
)  # fmt: skip
@pytest.mark.parametrize("with_tools", [False, True])
def test_every_reply_trains_as_in_trls_training_template(kit, name: str, with_tools: bool) -> None:
    tokenizer = family(kit, name)
    messages = [kit.user("What?"), kit.assistant("One."), kit.user("Why?"), kit.assistant("Two.")]
    if with_tools and "tool_calls" in tokenizer.chat_template and not name.startswith("deepseek"):
        call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
        result = {"role": "tool", "name": "weather", "content": "7"}
        messages = [kit.user("Oslo?"), call, result, kit.assistant("It is 7."), *messages]
    dataset, _ = encode_demos([row(messages)], tokenizer, kit.spec(max_length=None))
    template = (TEMPLATES / f"{name}_training.jinja").read_text(encoding="utf-8")
    oracle = tokenizer.apply_chat_template(
        messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    runs: list[list[int]] = [[]]
    for token, mask in zip(oracle["input_ids"], oracle["assistant_masks"], strict=True):
        if mask:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    ours = trained(dataset, tokenizer)
    assert said(ours) == said([tokenizer.decode(run) for run in runs if run])
    assert len(ours) == sum(message["role"] == "assistant" for message in messages)


@pytest.mark.parametrize("name", ["qwen3_5_think", "deepseek_r1_distill", "qwen3", "gptoss"])
def test_the_prompt_that_trains_is_the_one_that_is_sampled_after(kit, name: str) -> None:
    tokenizer = family(kit, name)
    one = row([kit.user("What?"), kit.assistant("One.")])
    dataset, report = encode_demos([one], tokenizer, kit.spec())
    prompt = encode_prompts([one], tokenizer, kit.spec())[0][0]["prompt_ids"]
    ids, labels = dataset[0]["input_ids"], dataset[0]["labels"]
    assert ids[: len(prompt)] == prompt and labels[len(prompt) - 1] == -100 and labels[len(prompt)] >= 0
    pair = encode_pairs([kit.pair()], tokenizer, kit.spec())[0][0]
    assert pair["prompt_ids"] == encode_prompts([kit.demo()], tokenizer, kit.spec())[0][0]["prompt_ids"]
    # the block that R1's prompt opens, and its own rendering of a reply leaves out, is closed, and counted
    assert report.count(EMPTY_REASONING) == int(name == "deepseek_r1_distill")


def test_reasoning_that_the_template_leaves_out_is_put_back(kit) -> None:
    tokenizer = kit.tokenizer(REASONS)
    messages = [kit.user("What?"), kit.assistant("<think>a b</think>One."), kit.user("Why?"), kit.assistant("Two.")]
    dataset, _ = encode_demos([row(messages)], tokenizer, kit.spec())
    assert trained(dataset, tokenizer) == ["<think>a b</think>One.<|im_end|>", "Two.<|im_end|>"]
    # beside the content, for a template that knows reasoning
    messages[1] = {"role": "assistant", "content": "One.", "reasoning_content": "a b"}
    dataset, _ = encode_demos([row(messages)], tokenizer, kit.spec())
    assert trained(dataset, tokenizer)[0] == "<think>\na b\n</think>\n\nOne.<|im_end|>"


def test_what_the_template_leaves_out_and_has_no_place_for_is_refused(kit, chatml) -> None:
    thinks = {"role": "assistant", "content": "One.", "thinking": "a b"}
    with pytest.raises(UserError, match=r"here:1: the chat template leaves out the thinking .*'a b'"):
        encode_demos([row([kit.user("What?"), thinks])], chatml, kit.spec())
    skips = kit.tokenizer("{% for message in messages if message.role != 'tool' %}" + kit.CHATML.partition("%}")[2])
    messages = [kit.user("What?"), kit.assistant("One."), {"role": "tool", "content": "secret"}, kit.assistant("Two.")]
    with pytest.raises(UserError, match=r"the turn of the role 'tool': 'secret'"):
        encode_demos([row(messages)], skips, kit.spec())
    cuts = kit.tokenizer(kit.CHATML.replace("message['content']", "message['content'][:3]"))
    with pytest.raises(UserError, match=r"a part of an assistant's turn: 'Once upon'"):
        encode_demos([row([kit.user("Hi?"), kit.assistant("Once upon")])], cuts, kit.spec())


@pytest.mark.parametrize("template", [None, "mistral"])
def test_a_role_that_the_template_does_not_know_is_named(kit, template) -> None:
    others_are_replies = (
        "{% for m in messages %}{{ '[Q]' + m.content if m.role == 'user' else m.content + '<|im_end|>' }}{% endfor %}"
    )
    tokenizer = kit.tokenizer(others_are_replies if template else None)
    messages = [kit.user("What?"), {"role": "critic", "content": "Hm."}, kit.assistant("One.")]
    with pytest.raises(UserError, match=r"here:1: the chat template does not know the role 'critic'"):
        encode_demos([row(messages)], tokenizer, kit.spec())
    # one that writes the name of whoever speaks may have speakers of its own
    dataset, _ = encode_demos([row(messages)], kit.tokenizer(), kit.spec())
    assert "critic\nHm." in kit.tokenizer().decode(dataset[0]["input_ids"])


@pytest.mark.parametrize("mask", [{"weight": 0}, {"train": False}, {"loss": "false"}])
def test_turns_that_the_row_masks_do_not_train(kit, chatml, mask) -> None:
    messages = [kit.user("What?"), kit.assistant("Bad.") | mask, kit.user("Why?"), kit.assistant("Two.")]
    dataset, _ = encode_demos([row(messages)], chatml, kit.spec())
    assert trained(dataset, chatml) == ["Two.<|im_end|>"]
    assert "Bad.<|im_end|>" in chatml.decode(dataset[0]["input_ids"])
    with pytest.raises(UserError, match=NONE_TRAINS):
        encode_demos([row(messages[:2])], chatml, kit.spec())


def test_a_reply_that_has_begun_is_gone_on_with(kit, chatml) -> None:
    one = Row([kit.user("What?"), kit.assistant("In short,")], [kit.assistant(" bread.")], origin="here:1")
    dataset, _ = encode_demos([one], chatml, kit.spec())
    whole = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nIn short, bread.<|im_end|>"
    assert chatml.decode(dataset[0]["input_ids"]) == whole
    assert trained(dataset, chatml) == [" bread.<|im_end|>"]
    prompt = encode_prompts([one], chatml, kit.spec())[0][0]["prompt_ids"]
    assert chatml.decode(prompt) == whole.removesuffix(" bread.<|im_end|>")


def test_of_two_ends_with_only_white_space_between_the_first_ends_the_reply(kit) -> None:
    tokenizer = kit.tokenizer(kit.CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")
    dataset, _ = encode_demos([row([kit.user("What?"), kit.assistant("One.")])], tokenizer, kit.spec())
    assert trained(dataset, tokenizer) == ["One.<|im_end|>"]


def test_arguments_go_in_as_the_template_wants_them(kit) -> None:
    for wanted, seen in (("| tojson", '{"city": "Oslo"}'), ("+ '!'", '{"city": "Oslo"}!')):
        tokenizer = kit.tokenizer(
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
            "{{ c.function.name + c.function.arguments " + wanted + " }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )
        if wanted == "| tojson":
            # an object here: joining it to a text would fail
            tokenizer.chat_template = tokenizer.chat_template.replace("name +", "name }}{{")
        text = CALL | {"function": CALL["function"] | {"arguments": '{"city": "Oslo"}'}}  # pyright: ignore[reportOperatorIssue]
        for call in (CALL, text):
            messages = [kit.user("Oslo?"), {"role": "assistant", "content": None, "tool_calls": [call]}]
            dataset, _ = encode_demos([row(messages)], tokenizer, kit.spec())
            assert trained(dataset, tokenizer) == [f"weather{seen}<|im_end|>"]


def test_the_date_in_a_template_is_the_runs(kit) -> None:
    import datetime

    tokenizer = kit.tokenizer("{{ strftime_now('%d %b %Y') + '\n' }}" + kit.CHATML)
    set_date(tokenizer, datetime.date(2024, 2, 29))
    dataset, _ = encode_demos([row([kit.user("What?"), kit.assistant("One.")])], tokenizer, kit.spec())
    assert tokenizer.decode(dataset[0]["input_ids"]).startswith("29 Feb 2024\n<|im_start|>user")
