"""GRPO and RLOO trainers of a few thousand weights, and the parts that their tests share."""

from pathlib import Path
from typing import Any

import torch

from preftune.stages.groups import GroupMethod, GroupTrainer
from preftune.stages.grpo import GRPOConfig, GRPOTrainer
from preftune.stages.ppo.rollout import Rollout
from preftune.stages.rloo import RLOOConfig, RLOOTrainer

from .collecting import collect
from .tiny_ppo import PROMPTS, TOKENIZER, letters, tiny

GROUP = 4
MADE: dict[str, tuple[type[GRPOConfig | RLOOConfig], type[GroupTrainer]]] = {
    "grpo": (GRPOConfig, GRPOTrainer),
    "rloo": (RLOOConfig, RLOOTrainer),
}


def make(folder: Path, kind: str = "grpo", model: Any = None, **options: Any) -> Any:
    """A trainer on `tiny()`, rewarded for letters: 2 iterations of 2 prompts x 4 replies, 2 passes of 2 minibatches."""
    config, trainer = MADE[kind]
    given = {name: options.pop(name) for name in ("rewards", "callbacks", "eval_dataset") if name in options}
    reward, prompts = options.pop("reward", letters), options.pop("prompts", PROMPTS)
    tokenizer = options.pop("tokenizer", TOKENIZER)
    values = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "rollout_batch_size": 8,
        "num_generations": GROUP, "num_iterations": 2, "num_mini_batches": 2, "total_episodes": 16,
        "max_new_tokens": 6, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "seed": 1,
    } | options  # fmt: skip
    model = tiny() if model is None else model
    return trainer(
        model, reward, config(str(folder), **values), prompts, processing_class=tokenizer, quiet=True, **given
    )


def rollout_of(made: GroupTrainer, iteration: int = 0) -> Rollout:
    """What the trainer collects in that iteration."""
    return collect(made, iteration, 0.0).rollout


def method_of(made: GroupTrainer) -> GroupMethod:
    """The trainer's method."""
    assert isinstance(made.method, GroupMethod)
    return made.method


def move(made: GroupTrainer, strength: float = 0.1) -> None:
    """Change the policy alone: away from its reference, and from rollouts taken before."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in method_of(made).policy:
            parameter.add_(strength * torch.randn(parameter.shape, generator=generator))


def gradient(made: GroupTrainer, rollout: Rollout, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Of a step that takes all rows of the rollout, or these."""
    made.updater.gradients(rollout, torch.arange(len(rollout.episodes)) if rows is None else rows, 0.0)
    return torch.cat([p.grad.flatten() for p in made.trainables.values() if p.grad is not None])
