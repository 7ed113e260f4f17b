"""One reply at a time."""

from dataclasses import replace
from pathlib import Path

import pytest

from preftune.data.spec import DataSpec, SourceSpec
from preftune.data.template import prompt_ids
from preftune.errors import UserError
from preftune.eval.chat.conversation import Conversation
from preftune.eval.spec import EvalSpec
from preftune.eval.workbench import Workbench
from preftune.models.adapters import AdapterSet
from preftune.models.beam import beam_search
from preftune.models.generate import sample
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import LoraSpec

from .conftest import shake

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("talk")
    base = resolve_base("random:llama")
    adapters = AdapterSet.create(load_model(base), base, LoraSpec(r=2, alpha=4), parent=None)
    for seed, name in enumerate(("sft", "dpo")):
        shake(adapters, "default", seed)
        adapters.save("default", root / name)
    return root


@pytest.fixture(scope="module")
def talk(folder) -> Conversation:
    spec = EvalSpec(
        base=resolve_base("random:llama"),
        policies={"sft": folder / "sft"},
        reference="base",
        prompts=DataSpec((SourceSpec("none.jsonl"),)),
        max_new_tokens=24,
        kl=False,
    )
    return Conversation(Workbench.open(spec))


def set_to(talk: Conversation, **changes) -> Conversation:
    return Conversation(replace(talk.bench, spec=replace(talk.bench.spec, **changes)))


def test_a_reply_can_be_searched_with_beams(talk):
    wide = set_to(talk, beams=3, temperature=0.0)
    heard: list[str] = []
    reply = wide.reply("sft", HELLO, seed=0, on_text=heard.append)
    ids, tokenizer = prompt_ids(talk.bench.tokenizer, HELLO), talk.bench.tokenizer
    best = beam_search(
        talk.bench.adapters, talk.bench.roles["sft"], [ids], num_beams=3, max_new_tokens=24,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    assert reply.text == tokenizer.decode(best.tokens[0], skip_special_tokens=True) == "".join(heard)
    assert (reply.tokens, reply.finished, reply.stopped) == (len(best.tokens[0]), best.finished[0], False)
    stopped = wide.reply("sft", HELLO, seed=0, stop=lambda: True)
    assert (stopped.text, stopped.tokens, stopped.stopped) == ("", 0, True)


def test_a_reply_is_a_sample_with_the_evaluations_settings(talk):
    ids, tokenizer = prompt_ids(talk.bench.tokenizer, HELLO), talk.bench.tokenizer
    for seed in (0, 5):
        drawn = sample(
            talk.bench.adapters, talk.bench.roles["sft"], [ids], max_new_tokens=24, temperature=0.7, seed=[seed],
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        reply = talk.reply("sft", HELLO, seed=seed)
        assert reply.text == tokenizer.decode(drawn.tokens[0], skip_special_tokens=True)
        assert (reply.policy, reply.tokens, reply.finished) == ("sft", len(drawn.tokens[0]), drawn.finished[0])
        assert not reply.stopped
    assert talk.reply("sft", HELLO, seed=0) == talk.reply("sft", HELLO, seed=0)
    assert talk.reply("sft", HELLO, seed=0) != talk.reply("sft", HELLO, seed=5)


def test_a_policy_can_join_later(talk, folder):
    talk.add("dpo", folder / "dpo")
    talk.add("base", None)
    greedy = set_to(talk, temperature=0)
    said = {policy: greedy.reply(policy, HELLO, seed=0).text for policy in ("base", "sft", "dpo")}
    assert len(set(said.values())) == 3
    with pytest.raises(UserError, match="holds no adapter"):
        talk.add("none", folder / "none")
    assert "none" not in talk.bench.roles


def test_the_text_is_heard_in_parts_that_make_up_the_whole(talk):
    parts: list[str] = []
    replies = [talk.reply("base", HELLO, seed=seed, on_text=parts.append) for seed in range(6)]
    assert "".join(parts) == "".join(reply.text for reply in replies)
    assert len(parts) > len(replies)


def test_it_can_be_stopped_after_any_token(talk):
    whole = talk.reply("sft", HELLO, seed=0)
    assert whole.tokens > 4
    asked = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) == 4

    parts: list[str] = []
    reply = talk.reply("sft", HELLO, seed=0, on_text=parts.append, stop=stop)
    assert (reply.tokens, reply.stopped, reply.finished) == (4, True, False)
    # what was held back as half a word is shown all the same
    assert "".join(parts) == reply.text
    assert talk.reply("sft", HELLO, seed=0) == whole


def test_a_reply_ends_where_the_model_can_read_no_further(talk):
    most = 2048
    template = len(prompt_ids(talk.bench.tokenizer, [{"role": "user", "content": ""}]))
    full = [{"role": "user", "content": "x" * (most - template - 3)}]
    reply = talk.reply("base", full, seed=0)
    assert reply.tokens == 3 and not reply.finished and not reply.stopped
    with pytest.raises(UserError, match=rf"conversation: {most} tokens, and the model can read {most}"):
        talk.reply("base", [{"role": "user", "content": "x" * (most - template)}], seed=0)
