"""A base whose own weights train: `full: true`. What comes out is a model of its own, and no adapter beside a base.

The weights are held in fp32 while they train, whatever the run computes in: a step of 16-bit weights is lost where it
is smaller than their rounding.
"""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..errors import UserError
from .base import Base
from .causal import decoder_of
from .loading import Task, load_model
from .lora import check_finite_weights
from .older import config_for_both
from .quiet import quiet_transformers
from .rounding import rounded
from .sharded import shards_base
from .tokens import prepare_model
from .whole import check_whole


class WholeModel:
    """The base as one trainable model, with as much of `AdapterSet` as a stage on TRL's trainers asks for.

    Attributes:
        model: the causal model, or a classifier with one label; every weight trains.
        base: what it was loaded from.
        dtype: in which it is written.
    """

    def __init__(self, model: PreTrainedModel, base: Base, dtype: torch.dtype) -> None:
        self.model, self.base, self.dtype = model, base, dtype

    @classmethod
    def open(
        cls,
        base: Base,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype,
        *,
        task: Task = "causal",
        packed: bool = True,
        seed: int = 0,
    ) -> "WholeModel":
        """The base's weights, ready to train.

        Args:
            dtype: in which they are written in the end.
            task, packed, seed: as of `load_model`.

        Raises:
            UserError: the base is quantised, or an engine divides it.
        """
        if shards_base() or is_deepspeed_zero3_enabled():
            said = "divides the base, and all of it trains (full: true)"
            raise UserError("--launch", said, "use --launch ddp")
        model = load_model(base, dtype=torch.float32, task=task, packed=packed, seed=seed)
        if not all(each.is_floating_point() for each in model.parameters()):
            said = f"{base.spec!r} is quantised, and all of it trains (full: true)"
            raise UserError("model.base", said, "name the base that it was made from")
        prepare_model(model, tokenizer)
        model.requires_grad_(True)
        return cls(model, base, dtype)

    @property
    def backbone(self) -> PreTrainedModel:
        """The decoder."""
        return decoder_of(self.model)

    def reference(self, tokenizer: PreTrainedTokenizerBase, *, packed: bool) -> PreTrainedModel:
        """A frozen copy of what the training starts from."""
        frozen = load_model(self.base, dtype=torch.float32, packed=packed)
        prepare_model(frozen, tokenizer)
        return frozen

    def save(self, _name: str, folder: Path, *, write: bool = True, done: bool = True) -> None:
        """Write it as `from_pretrained` reads it, each weight rounded once to `dtype`; a classifier's score in fp32.

        Args:
            write: False in every process of a run but one.

        Raises:
            UserError: a weight is not finite.
        """
        del done
        if not write:
            return
        named = dict(self.model.named_parameters())
        check_whole(str(folder), named)
        check_finite_weights(folder, named)
        held = {name: each.data for name, each in named.items()}
        config: Any = self.model.config
        before, config.dtype = config.dtype, self.dtype
        try:
            for name, each in named.items():
                if name != "score.weight":
                    each.data = rounded(held[name], self.dtype)
            with quiet_transformers():
                cast(Any, self.model).save_pretrained(folder)
        finally:
            config.dtype = before
            for name, each in named.items():
                each.data = held[name]
        config_for_both(folder)
