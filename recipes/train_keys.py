"""Whether a stage's words are those of its config, before anything is loaded or trained."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..stages.job import StageJob

_CONFIGS = {
    "sft": ("trl", "SFTConfig"),
    "reward": ("trl", "RewardConfig"),
    "dpo": ("trl", "DPOConfig"),
    "kto": ("trl", "KTOConfig"),
    "ppo": ("..stages.ppo_config", "PPOConfig"),
}


def config_class(kind: str) -> type:
    """The TRL or Transformers config that a kind of stage is trained with. Imports torch and TRL."""
    module, name = _CONFIGS[kind]
    return getattr(importlib.import_module(module, __package__), name)


def check_train_keys(job: "StageJob") -> None:
    """Every key of the job's `train` and method is a field of its config.

    Raises:
        UserError: an unknown key (with the nearest one), one said twice, one that belongs elsewhere.
    """
    from ..stages.options import check_words

    check_words(config_class(job.kind), job)
