"""What `PPOTrainer` is handed: taken as it is meant, or refused in words."""

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

from preftune import PPOConfig, PPOTrainer
from preftune.errors import UserError
from preftune.files import ADAPTER_CONFIG
from preftune.models.loading import quantization_config
from preftune.models.lora import LoraSpec
from preftune.models.quantised import is_quantised
from preftune.stages.ppo.trl_names import CONFIG, TRAINER

from .tiny_ppo import PROMPTS, TOKENIZER, letters, settings, tiny, tiny_model

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def opened(folder: Path, model: Any, **given: Any) -> PPOTrainer:
    return PPOTrainer(model, letters, settings(folder, total_episodes=8), PROMPTS, None, TOKENIZER, **given)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"init_lora_weights": "pissa"}, "writes into the base"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
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


def test_an_optimizer_over_the_policy_gets_the_value_as_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapters = tiny()
    given = torch.optim.SGD(adapters.parameters("default"), lr=0.05)
    made = opened(tmp_path, adapters, optimizers=(given, None))
    assert "weights of the value join your optimizer" in caplog.text
    before = {name: each.detach().clone() for name, each in made.trainables.items()}
    made.train()
    changed = {name.partition(".")[0] for name, each in made.trainables.items() if not torch.equal(each, before[name])}
    assert changed == {"policy", "value"} and made.optimizer is given


def test_an_optimizer_that_leaves_the_policy_out_is_refused(tmp_path: Path) -> None:
    adapters = tiny()
    given = torch.optim.SGD(adapters.parameters("default")[2:], lr=0.05)
    with pytest.raises(UserError, match=r"2 of the policy's \d+ weights are not in the optimizer"):
        opened(tmp_path, adapters, optimizers=(given, None))


@pytest.mark.parametrize("name", [*TRAINER, "train_datset"])
def test_names_of_other_trainers_are_refused_with_what_to_write(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as error:
        opened(tmp_path, tiny(), **{name: None})
    assert name in error.value.problem and error.value.remedy == TRAINER.get(name, "did you mean 'train_dataset'?")


@pytest.mark.parametrize("name", [*CONFIG, "kl_coeff"])
def test_names_of_other_configs_are_refused_with_what_to_write(tmp_path: Path, name: str) -> None:
    given: dict[str, Any] = {name: 1}
    with pytest.raises(UserError) as error:
        PPOConfig(str(tmp_path), **given)
    assert name in error.value.problem and error.value.remedy == CONFIG.get(name, "did you mean 'kl_coef'?")
    assert name not in {each.name for each in fields(PPOConfig)}


def test_what_the_remedies_name_is_there(tmp_path: Path) -> None:
    """A field that a remedy tells to write is one."""
    known = {each.name for each in fields(PPOConfig)} | set(inspect.signature(PPOTrainer.__init__).parameters)
    told = {
        word for table in (TRAINER, CONFIG) for line in table.values() for word in re.findall(r"[a-z]+_[a-z_]+", line)
    }
    foreign = {"on_log", "max_prompt_length"}  # a callback's method, a word of a recipe's data entry
    assert told - known - foreign == set()


def test_a_config_in_the_models_place_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model is a PPOConfig, expected a model"):
        PPOTrainer(settings(tmp_path), TOKENIZER, tiny())  # pyright: ignore[reportArgumentType]: TRL's order of old
    with pytest.raises(
        UserError, match=r"reward_funcs is a PPOConfig, .*the order is model, reward_funcs, args, train_d"
    ):
        PPOTrainer(tiny(), settings(tmp_path), TOKENIZER, PROMPTS)  # pyright: ignore[reportArgumentType]: ours of old
    with pytest.raises(UserError, match="args is a TrainingArguments"):
        PPOTrainer(tiny(), letters, TrainingArguments(str(tmp_path), use_cpu=True))  # pyright: ignore[reportArgumentType]


def test_a_prompt_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt_ids": [20, 21, len(TOKENIZER) + 3]}]
    with pytest.raises(UserError, match=r"row 2 holds the token .*the base's embedding has 264 rows"):
        PPOTrainer(tiny(), letters, settings(tmp_path), rows, None, TOKENIZER)


@pytest.mark.checklist("Q4")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("form", ["model", "PeftModel"])
def test_q04_a_model_that_the_user_has_quantised_trains_as_any_other(tmp_path: Path, form: str, bits: Any) -> None:
    """Its first ratio is checked at the tolerance of float32: bitsandbytes' own layers would not pass in 8 bits."""
    tiny_model().save_pretrained(tmp_path / "base")
    packed = quantization_config(bits, torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=packed, dtype=torch.float32
    )
    given = {"peft_config": LoraConfig(**LORA)} if form == "model" else {}
    trainer = opened(tmp_path, model if given else get_peft_model(model, LoraConfig(**LORA)), **given)
    assert is_quantised(trainer.adapters.model)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "rollout/logprob_mismatch" in log]
    assert logs and logs[0]["rollout/logprob_mismatch"] < 1e-5
    assert {each.dtype for each in trainer.adapters.parameters("default")} == {torch.float32}
