"""Words of other trainers in `train`: the answer is the key and its place."""

from dataclasses import replace

import pytest

from preftune.stages.options import word_problems


@pytest.mark.parametrize(
    ("kind", "word", "said"),
    [
        ("sft", "lr", "write learning_rate"),
        ("sft", "lora_r", "write it in lora: {r: ...}"),
        ("sft", "model_name_or_path", "write it in model: {base: ...}"),
        ("sft", "load_in_4bit", "write it in model: {quantization: 4bit}"),
        ("sft", "dataset_name", "write data in stages.sft"),
        ("sft", "max_seq_length", "write it in data.NAME: {max_length: ...}"),
        ("sft", "beta", "write beta in a stage of kind dpo or kto or grpo or rloo or distill"),
        ("sft", "attn_implementation", "leave it out: the attention is chosen by the device"),
        ("dpo", "pref_beta", "write beta in stages.dpo"),
        ("dpo", "ref_model", "write from in stages.dpo"),
        ("dpo", "response_length", "write max_new_tokens in a stage of kind ppo or grpo or rloo or distill or sample"),
        ("ppo", "response_length", "write max_new_tokens in stages.ppo"),
        ("ppo", "max_completion_length", "write max_new_tokens in stages.ppo"),
        ("ppo", "beta", "write kl: {coef: ...} in stages.ppo"),
        ("ppo", "reward_funcs", "write reward in stages.ppo"),
        ("ppo", "steps", "write total_episodes"),
    ],
)
def test_a_word_in_train_is_answered_with_key_and_place(make_job, kind: str, word: str, said: str):
    job = replace(make_job("sft"), name=kind, kind=kind, method={}, train={word: 1})
    (error,) = word_problems(job)
    assert error.where == f"stages.{kind}.train.{word}" and error.remedy == said
