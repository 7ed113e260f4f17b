"""Two makers of the same trainer: our stages, and TRL's own trainers as their documentation shows them.

Both get the same base, rows, order, batch, LoRA, learning rate and dtype. TRL reads the messages and tokenises them by
itself; it is given our tokenizer, whose PAD is not its EOS.
"""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ..data.spec import DataSpec, SourceSpec
from ..models.lora import LoraSpec
from ..models.tokens import load_tokenizer
from ..stages.job import StageJob
from .workload import SMOLLM2, base

LORA = LoraSpec(r=16, alpha=32)

TUNED: dict[str, dict[str, Any]] = {
    # one row without padding; on a CPU its attention is SDPA, with a block mask that transformers makes of positions
    "sft": {"padding_free": True},
    # their trainers know no padding-free batches (DPO's option is disabled), so rows of like length share a batch
    "reward": {},
    "dpo": {},
}
"""What TRL's options offer against padding on this work."""


def our_trainer(
    kind: str, rows: Path, train: dict[str, Any], output: Path, *, packed: bool, spec: str = SMOLLM2
) -> Any:
    """The trainer that the stage runs."""
    train = dict(train)
    job = StageJob(
        name=kind,
        kind=kind,
        base=base(spec),
        dtype="bfloat16",
        lora=LORA,
        data=DataSpec((SourceSpec(str(rows)),), max_length=None),
        seed=train.pop("seed"),
        train={**train, "save_strategy": "no"},  # as on the other side
        output_dir=output,
        packed=packed,
    )
    if kind == "sft":
        from ..stages.sft import build_sft

        return build_sft(job).trainer
    if kind == "dpo":
        from ..stages.dpo import build_dpo

        return build_dpo(job).trainer
    from ..stages.reward import build_reward

    return build_reward(job).trainer


def trl_trainer(
    kind: str,
    rows: Path,
    train: dict[str, Any],
    output: Path,
    *,
    tuned: bool,
    spec: str = SMOLLM2,
    attention: str | None = None,
    warm: int = 1,
) -> Any:
    """TRL's trainer on the same rows.

    Args:
        train: fields of its config, beside which all is as TRL has it. tuned: with `TUNED`, and rows after the first
            `warm` batches sorted by length. attention: transformers' name of it; None: as transformers chooses.
    """
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    trainers: dict[str, tuple[Any, Any]] = {
        "sft": (SFTTrainer, SFTConfig),
        "dpo": (DPOTrainer, DPOConfig),
        "reward": (RewardTrainer, RewardConfig),
    }
    trainer_class, config_class = trainers[kind]
    reward = kind == "reward"
    tokenizer = load_tokenizer(base(spec))
    auto: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    asked: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": attention}
    model = auto.from_pretrained(base(spec).path, **asked, **({"num_labels": 1} if reward else {}))
    model.config.pad_token_id = tokenizer.pad_token_id
    options = {"max_length": None, **train, **(TUNED[kind] if tuned else {})}
    unsorted = warm * train["per_device_train_batch_size"]
    return trainer_class(
        model=model,
        args=config_class(output_dir=str(output), report_to="none", save_strategy="no", disable_tqdm=True, **options),
        train_dataset=_dataset(rows, tokenizer, after=unsorted if tuned else None),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=LORA.r,
            lora_alpha=int(LORA.alpha),
            target_modules="all-linear",
            task_type="SEQ_CLS" if reward else "CAUSAL_LM",
            modules_to_save=["score"] if reward else None,
        ),
    )


def _dataset(rows: Path, tokenizer: Any, *, after: int | None) -> Dataset:
    """The rows; those behind the first `after` ones sorted by length, where that is given."""
    made = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]

    def length(row: dict[str, Any]) -> int:
        sides = [row[name] for name in ("chosen", "rejected", "completion") if name in row]
        texts = [tokenizer.apply_chat_template(row["prompt"] + side, tokenize=False) for side in sides]
        return max(len(tokenizer(text).input_ids) for text in texts)

    return Dataset.from_list(made if after is None else made[:after] + sorted(made[after:], key=length))
