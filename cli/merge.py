"""An adapter merged into its base, as one ordinary model folder."""

from pathlib import Path
from typing import Any

from ..errors import UserError


def merge_adapter(adapter: Path, out: Path, dtype: str | None = None) -> None:
    """Write base + adapter as safetensors with the tokenizer.

    Args:
        adapter: a finished stage's folder; its base is found by its lineage, wherever it was trained.
        out: a folder that does not exist yet or is empty.
        dtype: float32, bfloat16 or float16; None: the one that the stage was trained in.

    Raises:
        UserError: no adapter there, its base is another one now, or `out` holds something.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(str(adapter), "holds no adapter", "give a finished stage's folder, such as runs/NAME/dpo")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(str(out), "exists and is not empty", "give a new folder")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError("--dtype", f"{dtype!r} is unknown", "use float32, bfloat16 or float16")

    import json

    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    from ..models.lineage import load_adapter_base, read_lineage
    from ..models.loading import load_model
    from ..models.quiet import quiet_transformers

    base = load_adapter_base(adapter)
    has_lineage = (adapter / "lineage.json").is_file()
    trained = read_lineage(adapter).config.get("dtype") if has_lineage else None
    reward = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("task_type") == "SEQ_CLS"
    # merged in fp32 and rounded once: bf16 sums would lose what a small adapter says
    model = load_model(base, dtype=torch.float32, task="reward" if reward else "causal")
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(adapter if has_tokenizer else base.path)
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()  # type: ignore[operator]
    merged.config.pad_token_id = tokenizer.pad_token_id
    merged.config.eos_token_id = tokenizer.eos_token_id
    merged.to(getattr(torch, dtype or trained or "float32"))
    merged.config.name_or_path = ""
    with quiet_transformers():
        merged.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
    print(f"{out}: {base.spec} with {adapter} merged into it, {dtype or trained or 'float32'}")
