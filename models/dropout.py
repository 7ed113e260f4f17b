"""Training without dropout."""

from torch import nn
from transformers import PreTrainedConfig

from . import seams

RATES = (
    "attention_dropout",
    "activation_dropout",
    "dropout",
    "hidden_dropout",
    "embd_pdrop",
    "resid_pdrop",
    "attn_pdrop",
)
"""Under these names transformers' configs keep a rate that some attention reads at every forward."""


def dropout_rate(model: nn.Module) -> float:
    """The highest rate at which anything of the model is dropped in train mode; 0: it computes the same in both."""
    return max((getattr(holder, name) for holder, name in _rates(model)), default=0.0)


def no_dropout(model: nn.Module) -> None:
    """No dropout anywhere, LoRA's included, whatever mode the model is in (gradient checkpointing needs train mode).

    Raises:
        SeamMoved: something is left that would still be dropped.
    """
    for holder, name in _rates(model):
        setattr(holder, name, 0.0)
    seams.check(seams.DROPOUT, model)


def _rates(model: nn.Module) -> list[tuple[nn.Module | PreTrainedConfig, str]]:
    """Every place that holds a rate: (module or config, name of its attribute).

    A module's own is any number with "drop" in its name: attention modules have many names for it.
    """
    found: list[tuple[nn.Module | PreTrainedConfig, str]] = []
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):  # pyright: ignore[reportPrivateUsage]  # seam dropout
            found.append((module, "p"))
        found += [(module, name) for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            found += [(config, name) for name in RATES if isinstance(getattr(config, name, None), float)]
    return found
