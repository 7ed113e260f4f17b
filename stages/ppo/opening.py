"""From what a user hands to an on-policy trainer to adapters, tokenizer and reward sources."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import UserError
from ...files import ADAPTER_CONFIG
from ...models.adapters import AdapterSet
from ...models.auto import open_tokenizer
from ...models.base import Base
from ...models.lineage import check_parent, load_adapter_base
from ...models.loading import load_model, resolve_base
from ...models.lora import LoraSpec
from ...models.plain_lora import check_plain, target_names
from ...models.quantised import hold_packed
from ...models.token_rows import ROWS
from ...models.tokens import load_tokenizer, prepare_model
from .rewards import RewardFunc, RewardKind, RewardSource


def open_policy(
    model: AdapterSet | PeftModel | PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase | None,
    lora: LoraSpec | None,
    peft_config: LoraConfig | None,
    where: str = "PPOTrainer",
) -> tuple[AdapterSet, PreTrainedTokenizerBase]:
    """Adapters with a trainable "default", and the tokenizer.

    Args:
        where: whose arguments they are, for errors.

    Raises:
        UserError: a tokenizer is missing, both `lora` and `peft_config` are given, or settings that do not fit.
    """
    asked = [name for name, value in (("lora", lora), ("peft_config", peft_config)) if value is not None]
    if len(asked) == 2:
        raise UserError(where, "lora and peft_config are both given", "give one of them")
    if peft_config is not None:
        check_plain(peft_config, f"{where}, peft_config", fresh=True)
    if isinstance(model, str):
        return _load(model, tokenizer, lora or peft_config)
    if tokenizer is None:
        raise UserError(where, "processing_class is missing", "pass the model's tokenizer")
    if not isinstance(model, AdapterSet):
        hold_packed(model)
    if isinstance(model, AdapterSet | PeftModel):
        if asked:
            said = f"{asked[0]} is given, and the model has its adapter already"
            raise UserError(where, said, f"leave {asked[0]} out, or pass the base model")
        return model if isinstance(model, AdapterSet) else _wrap(model, where), tokenizer
    model.requires_grad_(False)
    return AdapterSet.create(model, _base_of(model), _spec(lora or peft_config, model)), tokenizer


def reward_sources(
    reward_funcs: RewardFunc | Sequence[RewardFunc] | None,
    reward_adapter: str | Path | None,
    rewards: Sequence[RewardSource],
    where: str = "PPOTrainer",
) -> list[RewardSource]:
    """All sources in one list: the adapter first, then the functions, then `rewards`.

    Raises:
        UserError: there is none.
    """
    if reward_funcs is None:
        several = []
    else:
        several = [reward_funcs] if isinstance(reward_funcs, str) or callable(reward_funcs) else reward_funcs
    sources = [] if reward_adapter is None else [RewardSource("stage", str(reward_adapter))]
    sources += [RewardSource(_kind_of(each), each) for each in several]
    sources += list(rewards)
    if not sources:
        raise UserError(where, "no reward is given", "pass reward_funcs, reward_adapter or rewards")
    return sources


def _load(
    spec: str, tokenizer: PreTrainedTokenizerBase | None, lora: LoraSpec | LoraConfig | None
) -> tuple[AdapterSet, PreTrainedTokenizerBase]:
    """A base with a fresh adapter, or a stage's folder: its base, its adapter's settings and its chat template."""
    parent = Path(spec) if _is_adapter(spec) else None
    base = resolve_base(spec) if parent is None else load_adapter_base(parent)
    if tokenizer is None:
        tokenizer = load_tokenizer(base, _saved_template(parent))
    if parent is not None:
        check_parent(parent, base, tokenizer)
        lora = lora or LoraSpec.of(parent)
    causal = load_model(base, dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    prepare_model(causal, tokenizer)
    return AdapterSet.create(causal, base, _spec(lora, causal), parent), tokenizer


def _saved_template(folder: Path | None) -> str | None:
    """The chat template of the tokenizer beside an adapter; None where there is none."""
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        return None
    return open_tokenizer(folder, str(folder)).chat_template


def _is_adapter(spec: str) -> bool:
    return (Path(spec) / ADAPTER_CONFIG).is_file()


def _kind_of(reward: RewardFunc) -> RewardKind:
    if not isinstance(reward, str):
        return "function"
    if _is_adapter(reward):
        return "stage"
    return "function" if ":" in reward else "model"


def _wrap(model: PeftModel, where: str) -> AdapterSet:
    config = model.peft_config.get("default")
    if not isinstance(config, LoraConfig) or len(model.peft_config) != 1:
        raise UserError(
            where,
            f"the PeftModel has the adapters {', '.join(model.peft_config)}, expected one LoRA named 'default'",
            "load it with PeftModel.from_pretrained and no adapter_name",
        )
    check_plain(config, f"{where}, the PeftModel")
    inner: Any = model.get_base_model()
    if inner.get_output_embeddings() is None:
        kind = type(inner).__name__
        raise UserError(where, f"the PeftModel is a {kind}, expected a causal model", "pass what generates")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default." in name or name.endswith(f".{ROWS}.default"))
    return AdapterSet(model, _base_of(model))  # pyright: ignore[reportArgumentType]: any PeftModel that is causal will do


def _base_of(model: PreTrainedModel | PeftModel) -> Base:
    """Where a loaded model came from; one made in memory has no content hash."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    try:
        return resolve_base(name)
    except (UserError, OSError, ValueError):
        return Base(name or "unsaved", Path(name or "."), None, "")


def _spec(lora: LoraSpec | LoraConfig | None, model: PreTrainedModel) -> LoraSpec:
    """What was asked for, as a `LoraSpec` for this model."""
    if isinstance(lora, LoraConfig):
        return LoraSpec.said_by(lora, target_names(model, lora))
    return lora or LoraSpec()
