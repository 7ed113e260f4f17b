"""What people write for a key, as TRL and its peers call it: the answer is the right key and its place."""

import re

import pytest

from preftune.errors import UserError, nearest
from preftune.recipes.load import load_recipe
from preftune.recipes.schema import Data, Eval, Lora, Model, Recipe, Reward, Teacher, stage_model
from preftune.stages.kinds import KINDS, PPO, stage_kind
from preftune.stages.names import ALIASES, SAID, WORDS, parameter_place
from preftune.stages.ppo.trl_names import CONFIG, SAME

PLACES = {
    "recipe": ("{}=1", Recipe),
    "model": ("model.{}=1", Model),
    "lora": ("lora.{}=1", Lora),
    "data": ("data.demos.{}=1", Data),
    "stages": ("stages.ppo.{}=1", stage_model(PPO)),
    "reward": ("stages.ppo.reward={{stage: reward, {}: 1}}", Reward),
    "teacher": ("stages.distill={{from: sft, data: prompts, teacher: {{{}: 1}}}}", Teacher),
    "eval": ("eval.{}=1", Eval),
}
IN_PART = [(part, word) for part, words in ALIASES.items() for word in words]


def remedy(override: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe("smoke", [override])
    return caught.value.remedy


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("model_name_or_path", "write it in model: {base: ...}"),
        ("torch_dtype", "write it in model: {dtype: ...}"),
        ("load_in_4bit", "write it in model: {quantization: 4bit}"),
        ("model.load_in_4bit", "write quantization: 4bit"),
        ("model.load_in_8bit", "write quantization: 8bit"),
        ("lora_r", "write it in lora: {r: ...}"),
        ("lora_alpha", "write it in lora: {alpha: ...}"),
        ("stages.sft.lora_r", "write it in lora: {r: ...}"),
        ("stages.sft.lora.lora_r", "did you mean 'r'?"),
        ("lora.dora", "did you mean 'use_dora'?"),
        ("lora.layer_replication", "leave it out: it makes another base, with layers said twice"),
        ("stages.dpo.lora.pissa", "write init_lora_weights: pissa"),
        ("use_peft", "leave it out: a stage trains a LoRA adapter (lora: {...}), or with full: true all weights"),
        ("dataset_name", "write it in data.NAME: {path: ...}"),
        ("data.demos.dataset_name", "did you mean 'path'?"),
        ("stages.sft.dataset_name", "did you mean 'data'?"),
        ("stages.sft.max_seq_length", "write it in data.NAME: {max_length: ...}"),
        ("stages.sft.max_length", "set max_length of the data entry"),
        ("stages.dpo.max_prompt_length", "write it in data.NAME: {max_prompt_length: ...}"),
        ("stages.ppo.response_length", "write max_new_tokens in stages.ppo"),
        ("stages.ppo.max_completion_length", "write max_new_tokens in stages.ppo"),
        ("response_length", "write max_new_tokens in a stage of kind ppo or grpo or rloo or distill or sample"),
        ("eval.response_length", "did you mean 'max_new_tokens'?"),
        ("stages.ppo.kl_coef", "write kl: {coef: ...} in stages.ppo"),
        ("stages.ppo.beta", "write kl: {coef: ...} in stages.ppo"),
        ("stages.ppo.init_kl_coef", "write kl: {coef: ...}, with target and horizon where it is to adapt"),
        ("stages.ppo.kl.beta", "did you mean 'coef'?"),
        ("stages.ppo.kl.kl_coef", "did you mean 'coef'?"),
        ("kl_coef", "write kl: {coef: ...} in a stage of kind ppo"),
        ("stages.sft.beta", "write beta in a stage of kind dpo or kto or grpo or rloo or distill"),
        ("stages.dpo.pref_beta", "write beta in stages.dpo"),
        ("stages.ppo.batch_size", "write rollout_batch_size (episodes an iteration, over all processes)"),
        ("stages.sft.batch_size", "write per_device_train_batch_size in stages.sft.train"),
        ("batch_size", "write per_device_train_batch_size in stages.NAME.train"),
        ("stages.sft.per_device_train_batch_size", "write it in stages.sft.train"),
        ("stages.ppo.learning_rate", "write it in stages.ppo.train"),
        ("stages.dpo.num_train_epochs", "write it in stages.dpo.train"),
        ("learning_rate", "write it in stages.NAME.train"),
        ("stages.sft.trust_remote_code", "leave it out: code that comes with a model is never run"),
        ("stages.sft.output_dir", "use --output-dir"),
        ("stages.ppo.reward_model_path", "write reward: NAME of a reward stage, or reward: {model: PATH}"),
        ("sft_model_path", "in a stage of kind ppo: write from: NAME of the SFT stage, or from: {adapter: PATH}"),
        (
            "stages.ppo.num_generations",
            "leave it out: PPO draws one response a prompt; kind: grpo and kind: rloo draw several",
        ),
        ("stages.sft.num_generations", "write num_generations in a stage of kind grpo or rloo"),
    ],
)
def test_the_word_is_answered_with_key_and_place(key: str, said: str):
    assert remedy(f"{key}=1") == said


@pytest.mark.parametrize(("part", "word"), IN_PART, ids=[".".join(each) for each in IN_PART])
def test_every_word_of_a_part_is_answered_there(part: str, word: str):
    place, model = PLACES[part]
    key = ALIASES[part][word].partition(": ")[0]
    known = {field.alias or name: field for name, field in model.model_fields.items()}
    assert key in known or (part, key) == ("stages", "loss_type")  # of other kinds
    if word not in known:
        assert re.search(rf"'{key}'|\b{key}\b", remedy(place.format(word)))


@pytest.mark.parametrize("word", [*WORDS, *SAID])
def test_every_other_word_is_answered_in_a_stage(word: str):
    said = remedy(f"stages.sft.{word}=1")
    assert said == SAID[word] if word in SAID else WORDS[word] in said


@pytest.mark.parametrize("word", SAME)
def test_every_word_of_a_method_names_its_parameter(word: str):
    for name, kind in KINDS.items():
        if SAME[word] in {each.name for each in kind.parameters} and word not in stage_model(kind).model_fields:
            assert remedy(f"stages.{name}.{word}=1") == f"write {parameter_place(kind, SAME[word])} in stages.{name}"
            return
    pytest.fail(f"no kind has the parameter {SAME[word]}")


@pytest.mark.parametrize("word", CONFIG)
def test_a_word_of_other_ppo_configs_is_never_guessed(word: str):
    said = remedy(f"stages.ppo.{word}=1")
    # nor answered with what only the Python API has
    assert "did you mean" not in said and "PPOTrainer" not in said and "kl_coef" not in said


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("dapo", "write kind: grpo, loss_type: dapo"),
        ("dr_grpo", "write kind: grpo, loss_type: dr_grpo"),
        ("gspo", "write kind: grpo and importance_sampling_level: sequence"),
        ("cispo", "write kind: grpo, loss_type: cispo"),
        ("reinforce", "write kind: rloo"),
        ("orpo", "kind: sft, then kind: dpo"),
        ("simpo", "loss_type: sigmoid_norm"),
    ],
)
def test_a_variant_is_answered_with_kind_and_setting(word: str, said: str):
    with pytest.raises(UserError) as caught:
        stage_kind(word)
    assert said in caught.value.remedy
    with pytest.raises(UserError, match=re.escape(said)):
        load_recipe("smoke", [f"stages.{word}={{from: sft, data: prompts}}"])


def test_a_kind_in_capitals_is_named():
    with pytest.raises(UserError) as caught:
        stage_kind("GRPO")
    assert "did you mean 'grpo'?" in caught.value.remedy


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("kl_coef", "write beta"),
        ("num_ppo_epochs", "write num_iterations"),
        ("max_completion_length", "write max_new_tokens"),
        ("generation_batch_size", "write rollout_batch_size"),
        ("steps_per_generation", "write num_mini_batches"),
        ("reward_weights", "write weight in each entry of reward"),
        ("gamma", "there is no value"),
        ("value", "there is no value"),
        ("use_vllm", "write rollout: {engine: vllm"),
        ("max_prompt_length", "write max_prompt_length in the data entry"),
    ],
)
def test_what_groups_do_not_have_is_answered(kind: str, word: str, said: str):
    with pytest.raises(UserError, match=re.escape(said)):
        load_recipe("smoke", [f"stages.{kind}={{from: sft, data: prompts, reward: reward, {word}: 1}}"])


@pytest.mark.parametrize(("word", "not_this"), [("response_length", "ensemble_penalty"), ("use_peft", "seed")])
def test_what_is_hardly_alike_is_not_guessed(word: str, not_this: str):
    assert nearest(word, [not_this, "temperature"]) == f"use one of {not_this}, temperature"
