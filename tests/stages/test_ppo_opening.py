"""What `PPOTrainer` is handed: taken as it is meant, or refused in words."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from preftune import PPOTrainer
from preftune.errors import UserError
from preftune.files import ADAPTER_CONFIG
from preftune.models.lora import LoraSpec

from .tiny_ppo import PROMPTS, TOKENIZER, letters, settings, tiny, tiny_model

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def opened(folder: Path, model: Any, **given: Any) -> PPOTrainer:
    return PPOTrainer(model, settings(folder, total_episodes=8), TOKENIZER, PROMPTS, reward_funcs=letters, **given)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"init_lora_weights": "pissa"}, "writes into the base"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA on an embedding"),
        ({"target_modules": ["q_proj", "lm_head"]}, "LoRA on the output head"),
    ],
)
def test_a_peft_model_that_is_not_plain_lora_is_refused(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        opened(tmp_path, get_peft_model(tiny_model(), LoraConfig(**{**LORA, **changes})))


def test_another_kind_of_peft_model_and_a_merged_one_are_refused(tmp_path: Path) -> None:
    other = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="expected one LoRA"):
        opened(tmp_path, get_peft_model(tiny_model(), other))
    merged: Any = get_peft_model(tiny_model(), LoraConfig(**LORA))
    merged.merge_adapter()
    with pytest.raises(UserError, match="merged into"):
        opened(tmp_path, merged)


@pytest.mark.parametrize("form", ["peft_config", "PeftModel"])
def test_a_regular_expression_trains_what_it_matches_and_is_saved_as_names(tmp_path: Path, form: str) -> None:
    lora = LoraConfig(**{**LORA, "target_modules": r".*self_attn\.[qv]_proj"})
    given = {"peft_config": lora} if form == "peft_config" else {}
    made = opened(tmp_path, tiny_model() if given else get_peft_model(tiny_model(), lora), **given)
    made.train()
    made.save_model()
    listed = json.loads((tmp_path / ADAPTER_CONFIG).read_text())["target_modules"]
    assert {name.rpartition(".")[2] for name in listed} == {"q_proj", "v_proj"}
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    ids = torch.tensor([[20, 21, 22, 23]])
    with torch.no_grad(), made.adapters.using("default"):
        torch.testing.assert_close(loaded(ids).logits, made.adapters.model(ids).logits, rtol=0, atol=1e-5)


def test_a_peft_config_without_targets_takes_pefts_own_choice(tmp_path: Path) -> None:
    made = opened(tmp_path, tiny_model(), peft_config=LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"))
    wanted = get_peft_model(tiny_model(), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"))
    count = sum(p.numel() for p in wanted.parameters() if p.requires_grad)
    assert sum(p.numel() for p in made.adapters.parameters("default")) == count


def test_settings_of_an_adapter_that_is_there_already_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lora is given, and the model has its adapter already"):
        opened(tmp_path, tiny(), lora=LoraSpec(r=8))
    with pytest.raises(UserError, match="peft_config is given"):
        opened(tmp_path, get_peft_model(tiny_model(), LoraConfig(**LORA)), peft_config=LoraConfig(**LORA))
    with pytest.raises(UserError, match="'v_porj' matches no module"):
        opened(tmp_path, tiny_model(), peft_config=LoraConfig(**{**LORA, "target_modules": ["q_proj", "v_porj"]}))
