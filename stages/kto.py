"""Kahneman-Tversky optimisation (arXiv 2402.01306): single responses labelled good or bad."""

from typing import Any

from datasets import Dataset
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from ..data.encode import encode_labels
from .activations import settle_checkpointing
from .job import StageJob
from .method_problems import check_batch
from .options import refusals_in_words, stage_config
from .reference_trainer import ReferenceTrainer
from .run import PolicyStage, load_data, open_adapters, open_tokenizer, train_policy
from .trainers import NO_AUX, settle_dropout, stage_callbacks


class KTOStageTrainer(ReferenceTrainer, KTOTrainer):
    """TRL's KTOTrainer on encoded rows: `prompt_ids`, `completion_ids`, `label` (and `KL_completion_ids`)."""


def with_kl_completions(rows: Dataset, batch_size: int) -> Dataset:
    """Add `KL_completion_ids`: within each block of `batch_size` rows, every prompt gets the completion before its own.

    z0, the KL estimate that KTO's loss subtracts, is taken over these mismatched pairs (KTO eq. 7); the rotation keeps
    a block's completions the same set, as TRL's preparation does. A last block of one row takes the completion of the
    row before it: rotated onto itself it would estimate the reward instead.
    """
    completions = rows["completion_ids"][:]
    rotated = []
    for start in range(0, len(completions), batch_size):
        block = completions[start : start + batch_size]
        rotated += [completions[start - 1]] if len(block) == 1 and start > 0 else [block[-1], *block[:-1]]
    return rows.add_column("KL_completion_ids", rotated)


def run_kto(job: StageJob) -> dict[str, Any]:
    """Run a KTO stage (see `run_stage`)."""
    return train_policy(job, build_kto(job))


def build_kto(job: StageJob) -> PolicyStage[KTOStageTrainer]:
    """Everything up to the first step: data, base, adapters, trainer.

    Raises:
        UserError: one row a forward with a loss that estimates z0 from the batch (D4).
    """
    # 1. tokenizer, data, config
    tokenizer = open_tokenizer(job)
    data = load_data(job, encode_labels, tokenizer)
    args = stage_config(KTOConfig, job, held_out=data.held is not None, max_length=job.data.max_length, **NO_AUX)
    settle_checkpointing(job, args, data.train)
    # shuffled once here: z0 pairs neighbours, which in a file are often two answers to one prompt
    train_rows, held_rows = data.train.shuffle(seed=job.seed), data.held
    if args.loss_type == "kto":
        check_batch(job, args.per_device_train_batch_size, len(train_rows))
        train_rows = with_kl_completions(train_rows, args.per_device_train_batch_size)
        if held_rows is not None:
            held_rows = with_kl_completions(held_rows.shuffle(seed=job.seed), args.per_device_eval_batch_size)
    # 2. the base, the adapter that trains, its frozen copy as the reference
    adapters = open_adapters(job, tokenizer)
    settle_dropout(job, args, adapters.model, reference=True)
    with refusals_in_words(job):
        trainer = KTOStageTrainer(
            model=adapters.model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=held_rows,
            processing_class=tokenizer,
            callbacks=stage_callbacks(job),
        )
    return PolicyStage(trainer, adapters, tokenizer, data)
