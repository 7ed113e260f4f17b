"""Supervised fine-tuning: next-token loss on the assistant's tokens, EOS included."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ..data.encode import encode_demos
from .activations import settle_checkpointing
from .job import StageJob
from .options import refusals_in_words, stage_config
from .run import PolicyStage, load_data, open_policy, open_tokenizer, train_policy
from .trainers import NO_AUX, StageTrainer, stage_callbacks


class SFTStageTrainer(StageTrainer, SFTTrainer):
    """TRL's SFTTrainer on encoded rows: `input_ids` and `labels` (-100 where nothing trains)."""

    mean_over_rows = False
    loss_over = "tokens"
    mean_over = MappingProxyType({"entropy": "tokens", "mean_token_accuracy": "tokens"})

    def counted(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][..., 1:]
        return {"tokens": (labels != -100).sum()}

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        # packing is part of TRL's preparation; on encoded rows the rest of it does nothing
        return SFTTrainer._prepare_dataset(self, dataset, *args, **kwargs) if self.padding_free else dataset


def run_sft(job: StageJob) -> dict[str, Any]:
    """Run an SFT stage (see `run_stage`)."""
    return train_policy(job, build_sft(job))


def build_sft(job: StageJob) -> PolicyStage[SFTStageTrainer]:
    """Everything up to the first step: data, base, adapters, trainer."""
    # 1. tokenizer, data, config
    tokenizer = open_tokenizer(job)
    data = load_data(job, encode_demos, tokenizer)
    args = stage_config(SFTConfig, job, held_out=data.held is not None, max_length=job.data.max_length, **NO_AUX)
    settle_checkpointing(job, args, data.train)
    # 2. the base with the adapter that trains
    policy = open_policy(job, tokenizer)
    with refusals_in_words(job):
        trainer = SFTStageTrainer(
            model=policy.model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.held,
            processing_class=tokenizer,
            callbacks=stage_callbacks(job),
        )
    return PolicyStage(trainer, policy, tokenizer, data)
