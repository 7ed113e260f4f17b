"""Direct preference optimisation (arXiv 2305.18290), IPO and every other loss that TRL's DPOTrainer has."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from ..data.encode import encode_pairs
from .activations import settle_checkpointing
from .global_batch import say_own_batches
from .job import StageJob
from .options import refusals_in_words, stage_config
from .reference_trainer import ReferenceTrainer, reference_of
from .run import PolicyStage, load_data, open_policy, open_tokenizer, train_policy
from .trainers import NO_AUX, settle_dropout, stage_callbacks


class DPOStageTrainer(ReferenceTrainer, DPOTrainer):
    """TRL's DPOTrainer on encoded rows: `prompt_ids`, and `chosen_ids` and `rejected_ids` without the prompt."""

    mean_over = MappingProxyType(
        {
            "entropy": "tokens",
            "logits/chosen": "chosen_tokens",
            "logits/rejected": "rejected_tokens",
            "mean_token_accuracy": "chosen_tokens",
        }
    )

    def counted(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        tokens = inputs["completion_mask"][:, 1:].sum(1)
        chosen, rejected = tokens.chunk(2)  # the collator lays the chosen before the rejected
        return {"tokens": tokens.sum(), "chosen_tokens": chosen.sum(), "rejected_tokens": rejected.sum()}


_OF_A_BATCH = ("aot", "aot_unpaired", "sft")
"""Losses that are no mean over rows: they sort a batch's rows, or are a mean over its tokens."""


def run_dpo(job: StageJob) -> dict[str, Any]:
    """Run a DPO stage (see `run_stage`)."""
    return train_policy(job, build_dpo(job))


def build_dpo(job: StageJob) -> PolicyStage[DPOStageTrainer]:
    """Everything up to the first step: data, base, adapters, trainer."""
    # 1. tokenizer, data, config
    tokenizer = open_tokenizer(job)
    data = load_data(job, encode_pairs, tokenizer)
    args = stage_config(DPOConfig, job, held_out=data.held is not None, max_length=job.data.max_length, **NO_AUX)
    settle_checkpointing(job, args, data.train)
    # 2. the base, the adapter that trains, its frozen copy as the reference
    policy = open_policy(job, tokenizer)
    settle_dropout(job, args, policy.model, reference=True)
    say_own_batches(job.name, args, [each for each in args.loss_type if each in _OF_A_BATCH])
    with refusals_in_words(job):
        trainer = DPOStageTrainer(
            model=policy.model,
            ref_model=reference_of(job, policy, tokenizer),
            args=args,
            train_dataset=data.train,
            eval_dataset=data.held,
            processing_class=tokenizer,
            callbacks=stage_callbacks(job),
        )
    return PolicyStage(trainer, policy, tokenizer, data)
