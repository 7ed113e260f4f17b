"""Boundaries in templated ids, one BOS, replies that end at EOS."""

from typing import Any

import pytest

from preftune.data.encode import BOUNDARY_MOVED, encode_labels, encode_pairs, encode_prompts
from preftune.data.template import DEFAULT_CHAT_TEMPLATE, Templater, common_prefix, prompt_ids
from preftune.errors import UserError


def whole(tokenizer: Any, *messages: dict) -> list[int]:
    """The templated conversation as transformers itself tokenises it."""
    return tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False)


@pytest.mark.checklist("D7")
def test_d07_prompt_and_reply_are_the_conversations_own_ids(kit, chatml) -> None:
    dataset, report = encode_pairs([kit.pair()], chatml, kit.spec())
    row = dataset[0]
    for reply, text in ((row["chosen_ids"], "Good."), (row["rejected_ids"], "Bad.")):
        together = whole(chatml, kit.user("Hi?"), kit.assistant(text))
        # The template's newline after EOS is not part of the reply.
        assert row["prompt_ids"] + reply == together[:-1]
        assert chatml.decode(reply) == text + "<|im_end|>"
    assert report.notes == {}


@pytest.mark.checklist("D7")
def test_d07_a_prompt_trains_as_it_is_sampled_after_where_a_token_would_reach_over_the_seam(kit) -> None:
    # "Assistant:" + " Good": the tokenizer merges the colon with the space after it. Sampling starts after the colon.
    tokenizer = kit.tokenizer(None, merges=[": Ġ"])
    dataset, report = encode_pairs([kit.pair()], tokenizer, kit.spec())
    row = dataset[0]
    assert row["prompt_ids"] == encode_prompts([kit.demo()], tokenizer, kit.spec())[0][0]["prompt_ids"]
    assert tokenizer.decode(row["chosen_ids"]) == " Good.<|im_end|>"
    assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) == "\n\nHuman: Hi?\n\nAssistant: Good.<|im_end|>"
    assert report.notes == {}


@pytest.mark.checklist("D7")
def test_d07_a_tokenizer_that_cannot_begin_in_the_middle_keeps_the_wholes_ids(kit, monkeypatch) -> None:
    tokenizer = kit.tokenizer(None, merges=[": Ġ"])
    monkeypatch.setattr(Templater, "continued", lambda *_: None)
    dataset, report = encode_pairs([kit.pair()], tokenizer, kit.spec())
    row = dataset[0]
    text = "\n\nHuman: Hi?\n\nAssistant: Good.<|im_end|>"
    assert row["prompt_ids"] + row["chosen_ids"] == tokenizer(text).input_ids
    assert tokenizer.decode(row["chosen_ids"]) == ": Good.<|im_end|>"
    assert report.count(BOUNDARY_MOVED) == 1


@pytest.mark.checklist("D7")
def test_d07_all_kinds_agree_on_the_boundary(kit, chatml) -> None:
    pair, _ = encode_pairs([kit.pair("Hello.")], chatml, kit.spec())
    label, _ = encode_labels([kit.demo(label=True)], chatml, kit.spec())
    prompt, _ = encode_prompts([kit.demo()], chatml, kit.spec())
    assert pair[0]["prompt_ids"] == label[0]["prompt_ids"] == prompt[0]["prompt_ids"]
    assert pair[0]["chosen_ids"] == label[0]["completion_ids"]
    assert prompt[0]["prompt_ids"] == prompt_ids(chatml, [kit.user("Hi?")])


@pytest.mark.checklist("D9")
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", ["none", "chatml", "writes bos"])
def test_d09_one_bos_and_none_in_the_reply(template, adds_bos, kit) -> None:
    text = {"none": None, "chatml": kit.CHATML, "writes bos": "{{ bos_token }}" + kit.CHATML}[template]
    tokenizer = kit.tokenizer(text, adds_bos=adds_bos)
    row = encode_pairs([kit.pair()], tokenizer, kit.spec())[0][0]
    bos = tokenizer.bos_token_id
    wanted = template == "writes bos" or (template == "none" and adds_bos)
    assert row["prompt_ids"].count(bos) == int(wanted)
    assert (row["prompt_ids"][0] == bos) == wanted
    assert bos not in row["chosen_ids"] + row["rejected_ids"]


@pytest.mark.checklist("D9")
def test_d09_a_doubled_bos_is_one(kit) -> None:
    tokenizer = kit.tokenizer("{{ bos_token }}{{ bos_token }}" + kit.CHATML)
    ids = prompt_ids(tokenizer, [kit.user("Hi?")])
    assert ids.count(tokenizer.bos_token_id) == 1


def test_eos_is_appended_where_the_template_has_none(kit) -> None:
    tokenizer = kit.tokenizer("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    row = encode_labels([kit.demo(label=True)], tokenizer, kit.spec())[0][0]
    assert row["completion_ids"][-1] == tokenizer.eos_token_id
    assert row["completion_ids"].count(tokenizer.eos_token_id) == 1


def test_default_template_is_a_plain_dialogue(kit) -> None:
    tokenizer = kit.tokenizer(DEFAULT_CHAT_TEMPLATE)
    system = {"role": "system", "content": "Be kind."}
    turns = [system, kit.user(" Hi? "), kit.assistant("Hello."), kit.user("More?")]
    text = Templater(tokenizer).text(turns, None, generation_prompt=True)
    assert text == "Be kind.\n\nHuman: Hi?\n\nAssistant: Hello.<|im_end|>\n\nHuman: More?\n\nAssistant:"
    # The same without a template in the tokenizer, and with tools beside it.
    assert Templater(kit.tokenizer(None)).text(turns, None, generation_prompt=True) == text
    assert '"name": "add"' in Templater(tokenizer).text(turns, [{"name": "add"}], generation_prompt=True)


def test_a_refusing_template_is_an_error_with_the_rows_place(kit) -> None:
    tokenizer = kit.tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(UserError, match=r"here:1: .*user.*no system role"):
        encode_prompts([kit.demo()], tokenizer, kit.spec())


def test_a_tokenizer_without_eos_is_refused(kit) -> None:
    tokenizer = kit.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="EOS"):
        Templater(tokenizer)


@pytest.mark.parametrize(("a", "b", "n"), [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 3], 1), ([1], [1, 2], 1)])
def test_common_prefix(a, b, n) -> None:
    assert common_prefix(a, b) == n
