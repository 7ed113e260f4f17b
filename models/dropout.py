"""Training without dropout."""

from torch import nn
from transformers import PreTrainedConfig

from . import seams

RATES = ("attention_dropout", "activation_dropout", "dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop")
"""Under these names transformers' modules and configs keep a rate that is no `nn.Dropout`."""


def dropout_rate(model: nn.Module) -> float:
    """The highest rate at which anything of the model is dropped in train mode; 0: it computes the same in both."""
    rates = [0.0]
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):  # pyright: ignore[reportPrivateUsage]  # seam dropout
            rates.append(module.p)
        for holder in (module, getattr(module, "config", None)):
            if isinstance(holder, nn.Module | PreTrainedConfig):
                rates += [rate for name in RATES if isinstance(rate := getattr(holder, name, None), float)]
    return max(rates)


def no_dropout(model: nn.Module) -> None:
    """No dropout anywhere, LoRA's included, whatever mode the model is in (gradient checkpointing needs train mode).

    Raises:
        SeamMoved: something is left that would still be dropped.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):  # pyright: ignore[reportPrivateUsage]  # seam dropout
            module.p = 0.0
        # some attention modules read their rate from the config at every forward
        for holder in (module, getattr(module, "config", None)):
            if isinstance(holder, nn.Module | PreTrainedConfig):
                for name in RATES:
                    if isinstance(getattr(holder, name, None), float):
                        setattr(holder, name, 0.0)
    seams.check(seams.DROPOUT, model)
