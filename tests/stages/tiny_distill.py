"""Distillation trainers of a few thousand weights, and the parts that their tests share."""

from pathlib import Path
from typing import Any

import torch

from preftune.models.adapters import AdapterSet
from preftune.models.lineage import Lineage, tokenizer_info, write_lineage
from preftune.models.lora import LoraSpec
from preftune.stages.distill import Distillation, DistillationConfig, DistillationTrainer
from preftune.stages.ppo.rollout import Rollout

from .collecting import collect
from .tiny_ppo import BASE, PROMPTS, TOKENIZER, tiny, tiny_model

DEMOS = [
    {"prompt": "a", "completion": "short"},
    {"prompt": "hello there", "completion": "a longer reply"},
    {"prompt": "what?", "completion": "no"},
    {"prompt": "one two three", "completion": "four five"},
]


def make(folder: Path, teacher: Any = None, model: Any = None, **options: Any) -> Any:
    """A student on `tiny()`, taught by another tiny model: 2 iterations of 8 prompts, 2 minibatches each."""
    given = {name: options.pop(name) for name in ("callbacks", "eval_dataset") if name in options}
    prompts, tokenizer = options.pop("prompts", PROMPTS), options.pop("tokenizer", TOKENIZER)
    values = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "rollout_batch_size": 8,
        "num_mini_batches": 2, "total_episodes": 16, "max_new_tokens": 6, "learning_rate": 1e-3,
        "per_device_train_batch_size": 3, "seed": 1,
    } | options  # fmt: skip
    return DistillationTrainer(
        tiny() if model is None else model,
        tiny_model(seed=3) if teacher is None else teacher,
        DistillationConfig(str(folder), **values),
        prompts,
        processing_class=tokenizer,
        quiet=True,
        **given,
    )


def adapter_folder(folder: Path, seed: int = 5) -> Path:
    """A stage's folder on `tiny()`'s base, whose adapter says something else than the student's."""
    torch.manual_seed(seed)
    adapters = tiny(strength=0.3)
    adapters.save("default", folder)
    lineage = Lineage(
        stage="expert", kind="sft", base={"spec": "tiny", "revision": None, "sha256": ""},
        tokenizer=tokenizer_info(TOKENIZER), parents=[], config={}, data={"spec": {}, "fingerprint": ""},
        seed=0, versions={}, created="", seconds=0.0,
    )  # fmt: skip
    write_lineage(folder, lineage)
    return folder


def loaded_beside(folder: Path) -> AdapterSet:
    """The same adapter on a base of its own."""
    return AdapterSet.create(tiny_model(), BASE, LoraSpec(r=4, alpha=8), folder)


def rollout_of(made: DistillationTrainer, iteration: int = 0) -> Rollout:
    """What the trainer collects in that iteration."""
    return collect(made, iteration, 0.0).rollout


def method_of(made: DistillationTrainer) -> Distillation:
    """The trainer's method."""
    assert isinstance(made.method, Distillation)
    return made.method


def gradient(made: Any, rollout: Rollout, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Of a step that takes all rows of the rollout, or these."""
    made.updater.gradients(rollout, torch.arange(len(rollout.episodes)) if rows is None else rows, 0.0)
    return torch.cat([p.grad.flatten() for p in made.trainables.values() if p.grad is not None])
