"""TRL 1.12's PPO on given prompts: run by the Python of a venv that has it, as `python trl_ppo.py SETTINGS.json`.

It imports nothing of preftune. Policy and value are LoRA adapters of the same shape as ours, each on a model of its
own, as TRL wants it; the reward is a third model, and the reference the policy without its adapter.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # pyright: ignore[reportMissingImports]: the TRL of that venv has it


class Clock(TrainerCallback):
    """When each iteration ended."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())


def lora(settings, task):
    return LoraConfig(r=settings["r"], lora_alpha=settings["alpha"], target_modules="all-linear", task_type=task)


def main():
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(0)
    path = settings["model"]
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = settings["pad_token"]
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.bfloat16, num_labels=1) for _ in range(2)
    )
    value.requires_grad_(False)
    # as get_peft_model does it, but TRL's PPO wants the classifier itself
    inject_adapter_in_model(
        LoraConfig(r=settings["r"], lora_alpha=settings["alpha"], target_modules=settings["modules"]), value
    )
    for name, parameter in value.named_parameters():
        if "lora_" in name or name.startswith("score"):
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    for model in (policy, reward, value):
        model.config.pad_token_id = tokenizer.pad_token_id
    clock = Clock()
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=settings["output"],
            per_device_train_batch_size=settings["micro"],
            gradient_accumulation_steps=settings["episodes"] // settings["micro"],
            local_rollout_forward_batch_size=settings["episodes"],
            num_mini_batches=1,
            num_ppo_epochs=settings["epochs"],
            total_episodes=settings["episodes"] * settings["iterations"],
            response_length=settings["new_tokens"],
            temperature=settings["temperature"],
            stop_token=None,
            num_sample_generations=0,
            learning_rate=1e-5,
            gradient_checkpointing=False,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in settings["prompts"]]),
        callbacks=[clock],
        peft_config=lora(settings, "CAUSAL_LM"),
    )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    episodes = settings["episodes"] * (len(clock.ends) - 1)
    seconds = clock.ends[-1] - clock.ends[0]
    print(json.dumps({"episodes_per_second": episodes / seconds, "seconds": seconds, "peak_memory_bytes": peak}))


if __name__ == "__main__":
    main()
