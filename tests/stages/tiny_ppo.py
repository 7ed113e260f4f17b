"""A PPO trainer of a few thousand weights, and the parts that its tests share."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PrinterCallback, TrainerCallback

from preftune.models.adapters import AdapterSet
from preftune.models.base import Base
from preftune.models.lineage import Lineage, tokenizer_info, write_lineage
from preftune.models.lora import LoraSpec
from preftune.models.tiny import byte_tokenizer
from preftune.stages.ppo.config import PPOConfig
from preftune.stages.ppo.rewards import RewardSource
from preftune.stages.ppo.rollout import Rollout
from preftune.stages.ppo.trainer import PPOTrainer

from .collecting import collect, ppo_of

TOKENIZER: Any = byte_tokenizer()
PROMPTS = [{"prompt": text} for text in ("a", "hello there", "what?", "one two three")]
BASE = Base(spec="tiny", path=Path("tiny"), revision=None, sha256="")
SPECIAL = {
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": TOKENIZER.pad_token_id,
}
UNEVEN = torch.tensor([1, 9, 2, 9, 3, 1, 5, 9])
"""Response lengths where an average of averages differs from the average."""


def tiny_model(seed: int = 0, dropout: float = 0.0) -> PreTrainedModel:
    """One layer, 32 wide, byte vocabulary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2, tie_word_embeddings=True, attention_dropout=dropout, **SPECIAL,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def tiny(
    seed: int = 0, dropout: float = 0.0, strength: float = 0.05, model: PreTrainedModel | None = None
) -> AdapterSet:
    """The tiny model, or another, with an adapter that already does something."""
    model = tiny_model(seed, dropout) if model is None else model
    adapters = AdapterSet.create(model, BASE, LoraSpec(r=4, alpha=8, dropout=dropout))
    with torch.no_grad():
        for parameter in adapters.parameters("default"):
            parameter.add_(strength * torch.randn_like(parameter))
    return adapters


def letters(completions: list[str], **_: Any) -> list[float]:
    """The share of letters."""
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]


def settings(folder: Path, **options: Any) -> PPOConfig:
    """Two iterations of 8 episodes, 2 epochs of 2 minibatches each."""
    values = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "rollout_batch_size": 8,
        "num_ppo_epochs": 2, "num_mini_batches": 2, "total_episodes": 16, "max_new_tokens": 6, "learning_rate": 1e-3,
        "per_device_train_batch_size": 3, "seed": 1,
    } | options  # fmt: skip
    return PPOConfig(str(folder), **values)


def trainer(folder: Path, model: Any = None, **options: Any) -> PPOTrainer:
    """A trainer on `tiny()` that is rewarded for letters, unless told otherwise."""
    given = {
        name: options.pop(name)
        for name in ("rewards", "callbacks", "reward_adapter", "lora", "eval_dataset")
        if name in options
    }
    made = PPOTrainer(
        tiny() if model is None else model,
        processing_class=options.pop("tokenizer", TOKENIZER),
        train_dataset=options.pop("prompts", PROMPTS),
        reward_funcs=options.pop("reward", letters),
        args=settings(folder, **options),
        **given,
    )
    made.remove_callback(PrinterCallback)
    return made


def rollout_of(made: PPOTrainer, iteration: int = 0) -> Rollout:
    """What the trainer collects in that iteration."""
    return collect(made, iteration).rollout


def eager_tokenizer(folder: Path) -> Any:
    """A tokenizer whose EOS the tiny policy says now and then: some of its 20-token responses end early, some not."""
    said = rollout_of(trainer(folder, max_new_tokens=20)).episodes.responses()
    tokenizer: Any = byte_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(said[0][5])
    return tokenizer


def move_policy(made: PPOTrainer, strength: float = 0.3) -> None:
    """Change the policy alone: away from its reference, and from rollouts taken before."""
    with torch.no_grad():
        ppo_of(made).policy[1].add_(strength)


def reward_folder(folder: Path, mean: float = 0.4, std: float = 2.0, seed: int = 3) -> Path:
    """A reward stage's folder on `tiny()`'s base: an adapter of its own with a random head."""
    adapters = tiny(strength=0.2)
    adapters.copy("reward")
    adapters.add_head("reward", bias=False, trainable=False, seed=seed)
    adapters.save("reward", folder)
    lineage = Lineage(
        stage="reward", kind="reward", base={"spec": "tiny", "revision": None, "sha256": ""},
        tokenizer=tokenizer_info(TOKENIZER), parents=[], config={}, data={"spec": {}, "fingerprint": ""},
        seed=0, versions={}, created="", seconds=0.0, reward={"mean": mean, "std": std},
    )  # fmt: skip
    write_lineage(folder, lineage)
    return folder


def with_reward(folder: Path, mean: float = 0.4, std: float = 2.0, weight: float = 1.0, **options: Any) -> PPOTrainer:
    """A trainer whose reward is a stage with these constants in its lineage."""
    source = RewardSource("stage", str(reward_folder(folder / "reward", mean, std)), weight)
    return trainer(folder, reward=(), rewards=[source], **options)


class Steps(TrainerCallback):
    """Counts optimiser steps and keeps every log."""

    def __init__(self) -> None:
        self.steps, self.logs = 0, []

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.steps += 1

    def on_log(self, *_: Any, logs: dict | None = None, **__: Any) -> None:
        self.logs.append(logs)
