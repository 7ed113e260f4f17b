"""What is exported says to transformers 4 what it says to 5. (4 itself is tried by hand: docs/install.md.)"""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaTokenizer

from preftune.models.loading import resolve_base
from preftune.models.older import config_for_both, save_tokenizer
from preftune.models.tokens import load_tokenizer

TEXT = "hello <|im_end|> hello"
VOCABULARY = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "h": 4, "e": 5, "l": 6, "o": 7, "▁h": 8}


def of_llama(add_bos_token: bool) -> Any:
    return LlamaTokenizer(vocab=dict(VOCABULARY), merges=[("▁", "h")], add_bos_token=add_bos_token)


def saved(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Its config, once this transformers has read the same tokenizer from the files."""
    save_tokenizer(tokenizer, folder)
    again: Any = AutoTokenizer.from_pretrained(folder)
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert set(again.all_special_ids) == set(tokenizer.all_special_ids)
    assert again.chat_template == tokenizer.chat_template
    return json.loads((folder / "tokenizer_config.json").read_text())


def test_a_tokenizer_has_a_class_and_special_tokens_that_transformers_4_knows(tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(resolve_base("random:llama"))
    said = saved(tokenizer, tmp_path)
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in said  # 4 ends in "'list' object has no attribute 'keys'"
    assert said["additional_special_tokens"] == tokenizer.extra_special_tokens


@pytest.mark.parametrize("add", [True, False])
def test_whether_bos_is_put_first_is_said_to_classes_that_have_a_default(add: bool, tmp_path: Path) -> None:
    tokenizer = of_llama(add)
    assert (tokenizer(TEXT)["input_ids"][0] == tokenizer.bos_token_id) is add
    said = saved(tokenizer, tmp_path)
    assert said["tokenizer_class"] == "LlamaTokenizer" and said["add_bos_token"] is add
    assert said["add_eos_token"] is False


LLAMA_3 = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 1e5}, LLAMA_3], ids=["plain", "scaled"])
def test_a_config_says_its_rotary_base_twice(rope: dict[str, Any], tmp_path: Path) -> None:
    LlamaConfig(rope_parameters=dict(rope), dtype="bfloat16", max_position_embeddings=131072).save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text()), "or there is nothing to mend"
    config_for_both(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["rope_theta"] == rope["rope_theta"] and said["torch_dtype"] == "bfloat16"
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    assert said["rope_scaling"] == (scaling if rope is LLAMA_3 else None)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == before


def test_rotary_parameters_per_kind_of_layer_are_left_alone(tmp_path: Path) -> None:
    kinds = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"rope_parameters": kinds}}))
    config_for_both(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"text_config": {"rope_parameters": kinds}}
