"""The tokenizer: a PAD that is not EOS, the EOS that ends the template's turns, a chat template."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BloomConfig, LlamaConfig, PreTrainedTokenizerFast

from preftune import UserError, load_model, load_tokenizer
from preftune.data.template import DEFAULT_CHAT_TEMPLATE
from preftune.models.base import Base
from preftune.models.context import check_context, context_length
from preftune.models.tiny import byte_tokenizer
from preftune.models.tokens import end_token_ids, prepare_model, set_eos, set_pad

TURNS = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "ÿ ok"}]


def test_bytes_go_in_and_come_out(tokenizer):
    for text in ("hé ÿ\n\t\x00  two  spaces", "日本語 🙂"):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert text == "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\nÿ ok<|im_end|>\n"


@pytest.mark.checklist("P6")
def test_p06_pad_is_never_eos(base, tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "right"
    model = load_model(base)
    model.generation_config.eos_token_id = [7, 2]
    prepare_model(model, tokenizer)
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (0, 0)
    assert model.generation_config.eos_token_id == [2, 7]


def words(specials, **named):
    vocab = {token: i for i, token in enumerate([*specials, "a", "b", "ÿ"])}
    core = Tokenizer(models.WordLevel(vocab, unk_token=named.get("unk_token")))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(list(specials))
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


@pytest.mark.checklist("P6")
@pytest.mark.parametrize(
    ("specials", "named", "pad"),
    [
        # SmolLM2 as it comes out of its GGUF file.
        (["<|endoftext|>", "<s>", "</s>"], {"eos_token": "</s>", "pad_token": "</s>", "bos_token": "<s>"},
         "<|endoftext|>"),
        # Its own PAD is kept where it is good.
        (["<pad>", "<x>", "</s>"], {"eos_token": "</s>", "pad_token": "<x>"}, "<x>"),
        # Llama 2: only <unk> is left.
        (["<unk>", "<s>", "</s>"], {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}, "<unk>"),
        # Llama 3: a reserved token.
        (["<s>", "</s>", "<|reserved_special_token_0|>"], {"eos_token": "</s>", "bos_token": "<s>"},
         "<|reserved_special_token_0|>"),
        # GPT-2: nothing but EOS; the byte that UTF-8 never uses.
        (["<|endoftext|>"], {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}, "ÿ"),
    ],
)  # fmt: skip
def test_p06_a_token_that_is_there_already_becomes_pad(specials, named, pad):
    tokenizer = words(specials, **named)
    size = len(tokenizer)
    set_pad(tokenizer, size)
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == size


def test_spare_rows_of_the_embedding_take_a_new_pad_and_a_full_one_is_refused():
    core = Tokenizer(models.WordLevel({"<e>": 0, "a": 1}))
    core.add_special_tokens(["<e>"])
    with pytest.raises(UserError, match="can serve as padding"):
        set_pad(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>"), 2)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>")
    set_pad(tokenizer, 3)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 2)


def test_eos_is_what_ends_the_templates_turns():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|reserved_1|>"
    set_eos(tokenizer)
    assert tokenizer.eos_token == "<|im_end|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    tokenizer.eos_token = "<|reserved_1|>"
    set_eos(tokenizer)
    assert tokenizer.eos_token == "<|reserved_1|>"
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    set_eos(tokenizer)
    assert tokenizer.eos_token == "<|reserved_1|>"


def test_the_template_is_a_file_or_text_or_a_name(base, tokenizer, tmp_path):
    jinja = "{% for m in messages %}{{ m['content'] }}<|reserved_0|>{% endfor %}"
    (tmp_path / "chat.jinja").write_text(jinja)
    for given in (jinja, str(tmp_path / "chat.jinja")):
        ours = load_tokenizer(base, given)
        assert ours.chat_template == jinja
        assert ours.eos_token == "<|reserved_0|>"
        assert ours.pad_token_id != ours.eos_token_id
    assert load_tokenizer(base, "default").chat_template == DEFAULT_CHAT_TEMPLATE
    assert load_tokenizer(base).chat_template == tokenizer.chat_template
    with pytest.raises(UserError, match="neither a file"):
        load_tokenizer(base, "nonesuch")


def test_saved_and_loaded_it_encodes_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.pad_token_id == tokenizer.pad_token_id
    assert torch.equal(
        torch.tensor(again.apply_chat_template(TURNS)["input_ids"]),
        torch.tensor(tokenizer.apply_chat_template(TURNS)["input_ids"]),
    )


def test_an_end_token_that_is_not_marked_special_ends_the_turn():
    core = words(["<s>", "</s>"], eos_token="</s>", bos_token="<s>")
    core.add_tokens(["<|im_end|>"])
    core.chat_template = "{% for m in messages %}{{ m.role + ' ' + m.content + '<|im_end|>' }}{% endfor %}"
    set_eos(core)
    assert core.eos_token == "<|im_end|>"


def test_a_reply_ends_at_every_end_token_of_the_base(base, tokenizer):
    model = load_model(base)
    model.generation_config.eos_token_id = [7, tokenizer.pad_token_id]
    model.generation_config._from_model_config = False
    prepare_model(model, tokenizer)
    assert end_token_ids(tokenizer, model) == [tokenizer.eos_token_id, 7, tokenizer.pad_token_id]
    # what only repeats the model's config may be the default of its class
    model.generation_config._from_model_config = True
    assert end_token_ids(tokenizer, model) == [tokenizer.eos_token_id]


STRETCHED = {"rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "length"),
    [(None, 64), ({"rope_type": "dynamic", **STRETCHED}, 256),
     ({"rope_type": "yarn", **STRETCHED, "original_max_position_embeddings": 16}, 64)],
)  # fmt: skip
def test_rows_longer_than_the_context_are_refused(rope, length, tmp_path):
    config = LlamaConfig(
        vocab_size=9, hidden_size=8, num_attention_heads=2, max_position_embeddings=64, rope_parameters=rope
    )
    config.save_pretrained(tmp_path)
    found = Base("here", tmp_path, None, "")
    assert context_length(found) == length
    rows = Dataset.from_dict({"prompt_ids": [[1] * 4, [1] * 5], "chosen_ids": [[1] * (length - 4), [1]],
                              "rejected_ids": [[1], [1] * (length - 4)]})  # fmt: skip
    problem = (
        rf"1 of 2 rows are longer than the base's context of {length} positions \(the longest: {length + 1} tokens"
    )
    with pytest.raises(UserError, match=problem):
        check_context(rows, found, "data.d")
    check_context(rows.select([0]), found, "data.d")
    with pytest.raises(UserError, match=rf"longer with {length} new tokens .*set max_prompt_length: 1"):
        check_context(rows.select_columns(["prompt_ids"]), found, "data.d", length)


def test_positions_without_a_limit_have_no_context(tmp_path):
    BloomConfig(vocab_size=9, hidden_size=8, n_head=2, n_layer=1).save_pretrained(tmp_path)
    assert context_length(Base("here", tmp_path, None, "")) is None


def test_a_template_that_does_not_end_is_refused(base: Base, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("preftune.data.template.PATIENCE", 0.2)
    loops = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    with pytest.raises(UserError, match=r"model\.chat_template: .* takes more than 0\.2 s; correct the template"):
        load_tokenizer(base, loops + "{{ messages }}")
