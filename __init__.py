"""preftune: alignment fine-tuning in one chain.

The public names are loaded on first use, so that the command line starts without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import telemetry
from .version import __version__

if TYPE_CHECKING:
    from .errors import UserError
    from .models.adapters import AdapterSet
    from .models.loading import load_model, resolve_base
    from .models.lora import LoraSpec
    from .models.tokens import load_tokenizer
    from .stages.ppo.config import PPOConfig
    from .stages.ppo.trainer import PPOTrainer

__all__ = [
    "AdapterSet",
    "LoraSpec",
    "PPOConfig",
    "PPOTrainer",
    "UserError",
    "__version__",
    "load_model",
    "load_tokenizer",
    "resolve_base",
]

_HOMES = {
    "AdapterSet": ".models.adapters",
    "LoraSpec": ".models.adapters",
    "PPOConfig": ".stages.ppo.config",
    "PPOTrainer": ".stages.ppo.trainer",
    "UserError": ".errors",
    "load_model": ".models.loading",
    "load_tokenizer": ".models.tokens",
    "resolve_base": ".models.loading",
}

telemetry.switch_off()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
