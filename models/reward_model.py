"""The reward model: the base as a classifier with one label, a LoRA adapter and an fp32 `score` head."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModelForSequenceClassification
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .adapters import DEFAULT
from .base import Base
from .fused_lora import use_fused_lora
from .lineage import check_base
from .loading import Quantization, load_model
from .lora import (
    SCORE,
    LoraSpec,
    fill,
    lora_layers,
    lora_state,
    put_on,
    read_adapter,
    start,
    write_adapter,
)
from .starts import settled
from .token_rows import use_token_rows
from .tokens import prepare_model
from .whole import whole


def create_reward_model(
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    lora: LoraSpec,
    parent: Path | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    quantization: Quantization | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    packed: bool = True,
) -> PeftModelForSequenceClassification:
    """A reward model ready for TRL's RewardTrainer.

    Its adapter "default" starts as an exact copy of the parent's LoRA; `score` is fresh (or the parent's, where that is
    a reward adapter), computes in fp32 and trains in full.

    Args:
        tokenizer: from `load_tokenizer`; the score is read at the last token that is not its PAD.
        parent: adapter to start from; None: the bare base.
        dtype: of the frozen trunk.
        packed: see `load_model`.

    Raises:
        UserError: the parent cannot be taken over exactly, or the base has no classifier.
    """
    if parent is not None:
        check_base(parent, base)
    model = load_model(
        base,
        dtype=dtype,
        task="reward",
        quantization=quantization,
        device=device,
        attn_implementation=attn_implementation,
        seed=seed,
        packed=packed,
    )
    prepare_model(model, tokenizer)
    kind = PeftModelForSequenceClassification
    lora = lora.on(base)
    peft = put_on(kind, model, lora, "SEQ_CLS", ["score"], continued=parent is not None, seed=seed)
    _check_trained_whole(peft)
    use_fused_lora(peft)
    # PEFT's new dropout layers are in training mode, whatever mode the model is in.
    peft.eval()
    config: Any = peft.peft_config[DEFAULT]
    # PEFT appends its own list of usual head names.
    config.modules_to_save = ["score"]
    start(lora_layers(peft), config, lora, parent, seed)
    if parent is not None:
        _, tensors = read_adapter(parent)
        if SCORE in tensors:
            with torch.no_grad():
                _score(peft).weight.copy_(tensors[SCORE])
    return peft


def save_reward_model(
    model: PeftModelForSequenceClassification, base: Base, folder: Path, *, write: bool = True
) -> None:
    """Write the adapter and its fp32 score straight into `folder`, for plain PEFT and for `AdapterSet.load`.

    Args:
        write: as of `AdapterSet.save`.
    """
    config: Any = model.peft_config[DEFAULT]
    tensors = whole(reward_tensors(model))
    if write:
        write_adapter(folder, base, config, settled(tensors, lora_state(lora_layers(model), DEFAULT)))


def reward_tensors(model: PeftModelForSequenceClassification) -> dict[str, Tensor]:
    """What is saved: the adapter's LoRA and `score`."""
    return {**lora_state(lora_layers(model), DEFAULT), SCORE: _score(model).weight}


def load_reward_model(
    folder: Path,
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
) -> PeftModelForSequenceClassification:
    """A saved reward model, frozen and in evaluation mode; `logits` [B, 1] are fp32.

    Raises:
        UserError: no reward adapter there, or one of another base.
    """
    check_base(folder, base)
    config, tensors = read_adapter(folder)
    if SCORE not in tensors:
        raise UserError(str(folder), "an adapter without a score head, expected a reward model", "name a reward stage")
    model = load_model(base, dtype=dtype, task="reward", device=device, attn_implementation=attn_implementation)
    prepare_model(model, tokenizer)
    config.modules_to_save = ["score"]
    peft = PeftModelForSequenceClassification(model, config, adapter_name=DEFAULT)
    use_token_rows(peft)
    use_fused_lora(peft)
    config.modules_to_save = ["score"]
    fill({**lora_state(lora_layers(peft), DEFAULT), SCORE: _score(peft).weight}, tensors, str(folder))
    return peft.requires_grad_(False).eval()


def _check_trained_whole(model: PeftModelForSequenceClassification) -> None:
    """PEFT trains every module whole that has a usual head's name, a router that is called classifier too.

    Raises:
        UserError: there is one beside the score.
    """
    whole = [name for name, each in model.get_base_model().named_modules() if isinstance(each, ModulesToSaveWrapper)]
    if others := sorted({*whole} - {"score"}):
        problem = f"PEFT would train {', '.join(others)} whole in a reward model, as if it were a head"
        raise UserError("model.base", problem, "take another base for the reward model")


def _score(model: PeftModelForSequenceClassification) -> nn.Linear:
    """The score that trains (PEFT keeps the untouched original beside it)."""
    inner: Any = model.get_base_model()
    return inner.score.modules_to_save[DEFAULT]
