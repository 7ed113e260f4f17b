"""A LoRA adapter merged into its base, as one ordinary model."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from ..files import ADAPTER_CONFIG, LINEAGE
from .base import Base
from .lineage import load_adapter_base, read_lineage
from .loading import load_model
from .quiet import quiet_transformers


@dataclass(frozen=True)
class Merged:
    """What was written: the base that the adapter belongs to, and the dtype of the weights."""

    base: Base
    dtype: str


def merge_adapter(adapter: Path, out: Path, dtype: str | None = None) -> Merged:
    """Write base + adapter as safetensors, with the tokenizer beside them.

    The sum is taken in fp32 and rounded once: sums in bf16 would lose what a small adapter says. A reward adapter
    becomes a sequence classifier with its score head.

    Args:
        adapter: a finished stage's folder, or any of PEFT's; its base is found by its lineage, wherever it was trained.
        out: a folder; files of the same names in it are overwritten.
        dtype: float32, bfloat16 or float16; None: the one that the stage was trained in, or else float32.

    Raises:
        UserError: its base cannot be found, or is another model now.
    """
    base = load_adapter_base(adapter)
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    trained = read_lineage(adapter).config.get("dtype") if (adapter / LINEAGE).is_file() else None
    target = dtype or trained or "float32"
    reward = config.get("task_type") == "SEQ_CLS"
    model = load_model(base, dtype=torch.float32, task="reward" if reward else "causal")
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(adapter if has_tokenizer else base.path)
    # PEFT hands methods that it has not itself to the model within, whatever type that is
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()  # pyright: ignore[reportCallIssue]
    merged.config.pad_token_id = tokenizer.pad_token_id
    merged.config.eos_token_id = tokenizer.eos_token_id
    merged.to(getattr(torch, target))
    merged.config.name_or_path = ""
    with quiet_transformers():
        merged.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
    return Merged(base, target)
