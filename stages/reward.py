"""The Bradley-Terry reward model: chosen should score above rejected."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from ..data.encode import encode_pairs
from ..data.store import derived
from ..models.batching import right_pad, row_batches
from ..models.causal import decoder_of, inner_model
from ..models.reward_model import create_reward_model, save_reward_model
from ..models.whole_model import WholeModel
from .activations import settle_checkpointing
from .job import StageJob
from .metrics import length_baselines, mean_std, pair_accuracy
from .options import refusals_in_words, stage_config
from .run import StageData, finish, load_data, open_tokenizer
from .trainers import StageTrainer, settle_dropout, stage_callbacks, train

REFERENCE_RESPONSES = 128
"""How many chosen responses the stored mean and deviation are taken over at most: the mean's error is std / 11."""


class RewardStageTrainer(StageTrainer, RewardTrainer):
    """TRL's RewardTrainer on encoded rows: `chosen_ids`, `rejected_ids` (both with the prompt), `margin` if there."""

    compact_head = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        now = self._now
        if now is None or len(set(now.rows)) == 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # TRL takes the mean of the processes' means
        found = super().compute_loss(model, inputs, True, num_items_in_batch)
        chosen, rejected = found[1].logits.squeeze(-1).chunk(2)
        margins = self.of_all_rows(chosen - rejected, now)
        trl: Any = self
        metrics = trl._metrics["train" if self.model_is_training else "eval"]
        metrics["accuracy"][-1], metrics["margin"][-1] = (margins > 0).float().mean().item(), margins.mean().item()
        return found if return_outputs else found[0]


_PIECE = 10_000


def with_prompts(pairs: Dataset) -> Dataset:
    """The pairs as the classifier reads them: the prompt before both sides."""
    arrow: Any = pairs.with_format("arrow")
    margins = ["margin"] if "margin" in pairs.column_names else []

    def tables() -> Iterator[pa.Table]:
        for start in range(0, len(pairs), _PIECE):
            piece = arrow[start : start + _PIECE].combine_chunks()
            sides = {side: _joined(piece["prompt_ids"], piece[side]) for side in ("chosen_ids", "rejected_ids")}
            yield pa.table(sides | {name: piece[name] for name in margins})

    return derived(pairs, "with-prompts", tables)


def _joined(first: pa.ChunkedArray, second: pa.ChunkedArray) -> pa.ListArray:
    """Of each row the first list with the second behind it."""
    lists = [each.combine_chunks() for each in (first, second)]
    offsets = [each.offsets.to_numpy() for each in lists]
    lengths = [np.diff(each) for each in offsets]
    values = [each.flatten().to_numpy() for each in lists]
    ends = np.concatenate([[0], np.cumsum(lengths[0] + lengths[1])]).astype(np.int32)
    joined = np.empty(int(ends[-1]), values[0].dtype)
    starts = (ends[:-1], ends[:-1] + lengths[0])
    for begins, each, length, value in zip(starts, offsets, lengths, values, strict=True):
        joined[np.arange(len(value)) + np.repeat(begins - (each[:-1] - each[0]), length)] = value
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(joined))


@dataclass(frozen=True)
class RewardStage:
    """A reward stage, built and ready for its first step; `held` is the held-out rows as the classifier reads them,
    `whole` the model where all of it trains."""

    trainer: RewardStageTrainer
    tokenizer: PreTrainedTokenizerBase
    data: StageData
    held: Dataset | None
    whole: WholeModel | None = None


def build_reward(job: StageJob) -> RewardStage:
    """Everything up to the first step: data, base, classifier, trainer."""
    # 1. tokenizer, data, config
    tokenizer = open_tokenizer(job)
    data = load_data(job, encode_pairs, tokenizer)
    train_rows = with_prompts(data.train)
    held_rows = None if data.held is None else with_prompts(data.held)
    args = stage_config(RewardConfig, job, held_out=held_rows is not None, max_length=job.data.max_length)
    settle_checkpointing(job, args, data.train)
    # 2. the classifier: the parent's adapter, or all of it, and a fresh fp32 score head
    options: Any = {"task": "reward", "packed": job.packed, "seed": job.seed}
    whole = WholeModel.open(job.base, tokenizer, job.torch_dtype(), **options) if job.full else None
    model: Any = whole.model if whole is not None else _with_adapter(job, tokenizer)
    settle_dropout(job, args, model, reference=False)
    with refusals_in_words(job):
        trainer = RewardStageTrainer(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=held_rows,
            processing_class=tokenizer,
            callbacks=stage_callbacks(job),
        )
    return RewardStage(trainer, tokenizer, data, held_rows, whole)


def _with_adapter(job: StageJob, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    return create_reward_model(
        job.base,
        tokenizer,
        job.lora,
        job.parent,
        job.torch_dtype(),
        seed=job.seed,
        quantization=job.quantization,
        packed=job.packed,
    )


def run_reward(job: StageJob) -> dict[str, Any]:
    """Run a reward stage (see `run_stage`). Metrics also hold what `held_out_accuracy` and `reference_scores` say."""
    stage = build_reward(job)
    trainer, data = stage.trainer, stage.data
    rows = trainer.train_dataset
    assert isinstance(rows, Dataset)
    trainer.came_from(job, data.train, data.origins)
    metrics = train(trainer, len(rows))
    model: Any = trainer.model
    pad, batch_size = stage.tokenizer.pad_token_id, trainer.args.per_device_eval_batch_size
    assert isinstance(pad, int)
    measured = rows if stage.held is None else stage.held
    reference = mean_std(score(model, measured["chosen_ids"][:REFERENCE_RESPONSES], pad, batch_size))
    metrics |= {f"reference_reward_{key}": value for key, value in reference.items()}
    if data.held is not None and stage.held is not None:
        metrics |= _held_out(model, stage.held, data.held, pad, batch_size)
    write = trainer.is_world_process_zero()
    if stage.whole is not None:
        stage.whole.save(job.name, job.output_dir, write=write)
    else:
        save_reward_model(model, job.base, job.output_dir, write=write)
    backbone = decoder_of(inner_model(model))
    return finish(job, stage.tokenizer, data, trainer.args, metrics, backbone=backbone, reward=reference)


@torch.no_grad()
def score(model: torch.nn.Module, rows: Sequence[list[int]], pad_token_id: int, batch_size: int = 16) -> list[float]:
    """A classifier's raw score of each row of token ids, in the rows' order. Rows of like length share a batch."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    scores = [0.0] * len(rows)
    for batch in row_batches([len(row) for row in rows], batch_size, longest_first=False):
        input_ids, mask = right_pad([rows[index] for index in batch], pad_token_id, device)
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        for index, value in zip(batch, logits.squeeze(-1).float().tolist(), strict=True):
            scores[index] = value
    model.train(was_training)
    return scores


def _held_out(model: torch.nn.Module, rows: Dataset, pairs: Dataset, pad: int, batch_size: int) -> dict[str, float]:
    """Accuracy on held-out pairs, ties one half (R5), and what the length of the replies alone would reach (R6)."""
    chosen, rejected = (score(model, rows[side][:], pad, batch_size) for side in ("chosen_ids", "rejected_ids"))
    lengths = [[len(ids) for ids in pairs[side]] for side in ("chosen_ids", "rejected_ids")]
    return {
        "held_out_pairs": len(rows),
        "held_out_accuracy": pair_accuracy(chosen, rejected),
        **{f"held_out_{key}": value for key, value in length_baselines(*lengths).items()},
    }
