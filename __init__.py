"""preftune: alignment fine-tuning in one chain.

`run` trains a recipe, `load_policy` opens what came of it, `score`, `evaluate` and `kl` measure it; `PPOTrainer`,
`GRPOTrainer`, `RLOOTrainer` and `DistillationTrainer` are for a script of one's own. What the caller can put right is
raised as `UserError`.
The public names are loaded on first use, so that the command line starts without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import telemetry
from .version import __version__

if TYPE_CHECKING:
    from .api.evaluating import evaluate
    from .api.models import Policy, RewardModel, kl, load_policy, load_reward, score
    from .api.recipe import Recipe
    from .api.results import EvaluationResult, Generations, KLResult, RunResult, Scores, StageResult
    from .api.running import run, train_stage
    from .errors import UserError
    from .models.adapters import AdapterSet
    from .models.loading import load_model, resolve_base
    from .models.lora import LoraSpec
    from .models.tokens import load_tokenizer
    from .stages.distill import DistillationConfig, DistillationTrainer
    from .stages.grpo import GRPOConfig, GRPOTrainer
    from .stages.ppo.config import PPOConfig
    from .stages.ppo.trainer import PPOTrainer
    from .stages.rloo import RLOOConfig, RLOOTrainer

__all__ = [
    "AdapterSet",
    "DistillationConfig",
    "DistillationTrainer",
    "EvaluationResult",
    "GRPOConfig",
    "GRPOTrainer",
    "Generations",
    "KLResult",
    "LoraSpec",
    "PPOConfig",
    "PPOTrainer",
    "Policy",
    "RLOOConfig",
    "RLOOTrainer",
    "Recipe",
    "RewardModel",
    "RunResult",
    "Scores",
    "StageResult",
    "UserError",
    "__version__",
    "evaluate",
    "kl",
    "load_model",
    "load_policy",
    "load_reward",
    "load_tokenizer",
    "resolve_base",
    "run",
    "score",
    "train_stage",
]

_HOMES = {
    "AdapterSet": ".models.adapters",
    "DistillationConfig": ".stages.distill",
    "DistillationTrainer": ".stages.distill",
    "EvaluationResult": ".api.results",
    "GRPOConfig": ".stages.grpo",
    "GRPOTrainer": ".stages.grpo",
    "Generations": ".api.results",
    "KLResult": ".api.results",
    "LoraSpec": ".models.adapters",
    "PPOConfig": ".stages.ppo.config",
    "PPOTrainer": ".stages.ppo.trainer",
    "Policy": ".api.models",
    "RLOOConfig": ".stages.rloo",
    "RLOOTrainer": ".stages.rloo",
    "Recipe": ".api.recipe",
    "RewardModel": ".api.models",
    "RunResult": ".api.results",
    "Scores": ".api.results",
    "StageResult": ".api.results",
    "UserError": ".errors",
    "evaluate": ".api.evaluating",
    "kl": ".api.models",
    "load_model": ".models.loading",
    "load_policy": ".api.models",
    "load_reward": ".api.models",
    "load_tokenizer": ".models.tokens",
    "resolve_base": ".models.loading",
    "run": ".api.running",
    "score": ".api.models",
    "train_stage": ".api.running",
}

telemetry.switch_off()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
