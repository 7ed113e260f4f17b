"""From what a user hands to `PPOTrainer` to adapters, tokenizer and reward sources."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ...errors import UserError
from ...files import ADAPTER_CONFIG, LINEAGE
from ...models.adapters import AdapterSet
from ...models.base import Base
from ...models.lineage import check_lineage, load_adapter_base
from ...models.loading import load_model, resolve_base
from ...models.lora import LoraSpec, read_adapter
from ...models.tokens import load_tokenizer, prepare_model
from .rewards import RewardFunc, RewardKind, RewardSource

# what would make an adapter more, or start it elsewhere, than a `LoraSpec` can say
_PLAIN = (
    "use_dora", "lora_bias", "bias", "rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save",
    "init_lora_weights",
)  # fmt: skip


def open_policy(
    model: AdapterSet | PeftModel | PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase | None,
    lora: LoraSpec | None,
    peft_config: LoraConfig | None,
) -> tuple[AdapterSet, PreTrainedTokenizerBase]:
    """Adapters with a trainable "default", and the tokenizer.

    Raises:
        UserError: a tokenizer is missing, both `lora` and `peft_config` are given, or settings that do not fit.
    """
    if lora is not None and peft_config is not None:
        raise UserError("PPOTrainer", "lora and peft_config are both given", "give one of them")
    lora = lora if peft_config is None else _spec_of(peft_config)
    if isinstance(model, str):
        return _load(model, tokenizer, lora)
    if tokenizer is None:
        raise UserError("PPOTrainer", "processing_class is missing", "pass the model's tokenizer")
    if isinstance(model, AdapterSet):
        return model, tokenizer
    if isinstance(model, PeftModel):
        return _wrap(model), tokenizer
    model.requires_grad_(False)
    return AdapterSet.create(model, _base_of(model), lora or LoraSpec()), tokenizer


def reward_sources(
    reward_funcs: RewardFunc | Sequence[RewardFunc] | None,
    reward_adapter: str | Path | None,
    rewards: Sequence[RewardSource],
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
        raise UserError("PPOTrainer", "no reward is given", "pass reward_funcs, reward_adapter or rewards")
    return sources


def _load(
    spec: str, tokenizer: PreTrainedTokenizerBase | None, lora: LoraSpec | None
) -> tuple[AdapterSet, PreTrainedTokenizerBase]:
    """A base with a fresh adapter, or a stage's folder: its base, its adapter's settings and its chat template."""
    parent = Path(spec) if _is_adapter(spec) else None
    base = resolve_base(spec) if parent is None else load_adapter_base(parent)
    if tokenizer is None:
        saved = parent is not None and (parent / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(base, AutoTokenizer.from_pretrained(parent).chat_template if saved else None)
    if parent is not None:
        if (parent / LINEAGE).is_file():
            check_lineage(parent, base, tokenizer)
        lora = lora or _spec_of(read_adapter(parent)[0])
    causal = load_model(base, dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    prepare_model(causal, tokenizer)
    return AdapterSet.create(causal, base, lora or LoraSpec(), parent), tokenizer


def _is_adapter(spec: str) -> bool:
    return (Path(spec) / ADAPTER_CONFIG).is_file()


def _kind_of(reward: RewardFunc) -> RewardKind:
    if not isinstance(reward, str):
        return "function"
    if _is_adapter(reward):
        return "stage"
    return "function" if ":" in reward else "model"


def _wrap(model: PeftModel) -> AdapterSet:
    config = model.peft_config.get("default")
    if not isinstance(config, LoraConfig) or len(model.peft_config) != 1:
        raise UserError(
            "PPOTrainer",
            f"the PeftModel has the adapters {', '.join(model.peft_config)}, expected one LoRA named 'default'",
            "load it with PeftModel.from_pretrained and no adapter_name",
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default." in name)
    return AdapterSet(model, _base_of(model))  # pyright: ignore[reportArgumentType]: any PeftModel that is causal will do


def _base_of(model: PreTrainedModel | PeftModel) -> Base:
    """Where a loaded model came from; one made in memory has no content hash."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    try:
        return resolve_base(name)
    except (UserError, OSError, ValueError):
        return Base(name or "unsaved", Path(name or "."), None, "")


def _spec_of(config: LoraConfig) -> LoraSpec:
    """Rank, scaling, dropout and modules.

    Raises:
        UserError: the config asks for more than a plain LoRA.
    """
    plain = LoraConfig()
    for name in _PLAIN:
        if getattr(config, name) != getattr(plain, name):
            raise UserError("PPOTrainer", f"peft_config has {name}={getattr(config, name)!r}", "use a plain LoRA")
    targets = config.target_modules or "all-linear"
    return LoraSpec(
        r=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else sorted(targets),
        use_rslora=config.use_rslora,
    )
