"""Kahneman-Tversky optimisation (arXiv 2402.01306): single responses labelled good or bad."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.utils import use_adapter

from ..data.encode import encode_labels
from ..data.store import derived
from ..models import seams
from .activations import settle_checkpointing
from .global_batch import ROWS, Counts, Metrics, MicroBatch
from .job import StageJob
from .method_problems import check_batch
from .options import refusals_in_words, stage_config
from .reference_trainer import ReferenceTrainer, reference_of
from .run import PolicyStage, load_data, open_policy, open_tokenizer, train_policy
from .trainers import NO_AUX, settle_dropout, stage_callbacks


class KTOStageTrainer(ReferenceTrainer, KTOTrainer):
    """TRL's KTOTrainer on encoded rows: `prompt_ids`, `completion_ids`, `label` (and `KL_completion_ids`).

    z0 is made of all rows of an optimiser step, or of all held-out rows, before the first of their losses: TRL makes
    one of each micro-batch.
    """

    overridden = (*ReferenceTrainer.overridden, seams.KL_LOGPS)
    mean_over = MappingProxyType(
        {
            "entropy": "tokens",
            "logits/chosen": "chosen_tokens",
            "logits/rejected": "rejected_tokens",
            **{f"{of}/{side}": side for of in ("rewards", "logps") for side in ("chosen", "rejected")},
        }
    )
    _z0: torch.Tensor | None = None

    def counted(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        tokens, good = inputs["completion_mask"][:, 1:].sum(1), torch.as_tensor(inputs["label"]).bool()
        good = good.to(tokens.device)
        return {
            "tokens": tokens.sum(),
            "chosen": good.sum(),
            "rejected": (~good).sum(),
            "chosen_tokens": tokens[good].sum(),
            "rejected_tokens": tokens[~good].sum(),
        }

    def collapsed(self, metrics: Metrics, counts: Sequence[Counts]) -> Metrics:
        found = super().collapsed(metrics, counts)
        if "rewards/chosen" in found and "rewards/rejected" in found:  # maybe of no micro-batch alone
            found["rewards/margins"] = [found["rewards/chosen"][0] - found["rewards/rejected"][0]]
        return found

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self.calculate_KL and batches:
            self._z0 = self._estimate(zip(batches, self._coming, strict=True))
        return batches, items

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        if self.calculate_KL:
            assert self.model is not None
            self.model.eval()
            self._z0 = self._estimate((batch, self.micro_batch(batch.pop(ROWS))) for batch in dataloader)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    @torch.no_grad()
    def _estimate(self, batches: Iterable[tuple[dict[str, Any], MicroBatch]]) -> torch.Tensor:
        """z0 (KTO eq. 7): the mean log-ratio of mismatched pairs, nats, not below 0. Shape [1]."""
        found, trl = list[torch.Tensor](), cast(Any, super())
        args: Any = self.args
        for inputs, now in batches:
            batch = self._prepare_inputs(inputs)
            plain = disable_gradient_checkpointing(cast(Any, self.model), args.gradient_checkpointing_kwargs)
            with self.compute_loss_context_manager(), plain:
                logps = trl._compute_kl_logps(self.model, batch)
                if self.precompute_ref_logps:
                    reference = batch["ref_KL_logps"]
                else:
                    whole, own = self.ref_model, self.accelerator.unwrap_model(self.model)
                    with nullcontext() if whole is not None else use_adapter(own, adapter_name="ref"):
                        reference = trl._compute_kl_logps(self.model if whole is None else whole, batch)
            found.append(self.of_all_rows(logps - reference, now))
        return torch.cat(found).mean().clamp(min=0)[None]

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        if self._z0 is not None:
            # TRL subtracts one from the other and takes the mean
            inputs = {**inputs, "ref_KL_logps": torch.zeros_like(self._z0)}
        return super()._compute_loss(model, inputs, return_outputs)

    def _compute_kl_logps(self, model: Any, batch: Any) -> Any:
        if self._z0 is None:
            return super()._compute_kl_logps(model, batch)
        own: Any = self.model
        refers = model is self.ref_model if self.ref_model is not None else "ref" in own.active_adapters
        return torch.zeros_like(self._z0) if refers else self._z0


def with_kl_completions(rows: Dataset, batch_size: int) -> Dataset:
    """Add `KL_completion_ids`: within each block of `batch_size` rows, an optimiser step's, every prompt gets the
    completion before its own.

    z0, the KL estimate that KTO's loss subtracts, is taken over these mismatched pairs (KTO eq. 7); the rotation keeps
    a block's completions the same set, as TRL's preparation does. A last block of one row takes the completion of the
    row before it: rotated onto itself it would estimate the reward instead.
    """
    arrow: Any = rows.with_format("arrow")
    completions: Any = rows.select_columns(["completion_ids"]).with_format("arrow")
    order = _rotated(len(rows), batch_size)
    piece = max(1, _PIECE // batch_size) * batch_size

    def tables() -> Iterator[pa.Table]:
        for start in range(0, len(rows), piece):
            before = completions[order[start : start + piece].tolist()]["completion_ids"]
            with_kl = arrow[start : start + piece].append_column("KL_completion_ids", before)
            yield with_kl.replace_schema_metadata(None)  # which lists the columns of before

    # the fingerprint says in which order the rows stand
    fingerprint = rows._fingerprint  # pyright: ignore[reportPrivateUsage]: TRL names its caches after it as well
    return derived(rows, f"kl-{batch_size}-{fingerprint}", tables)


_PIECE = 10_000


def _rotated(count: int, size: int) -> "np.ndarray[Any, Any]":
    """For each of `count` places the one before it within its block of `size`; for a block's first its last."""
    before = np.arange(count) - 1
    firsts = np.arange(0, count, size)
    lasts = np.minimum(firsts + size, count) - 1
    before[firsts] = np.where((lasts == firsts) & (firsts > 0), firsts - 1, lasts)
    return before


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
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        train_rows = with_kl_completions(train_rows, step)
        if held_rows is not None:
            held_rows = with_kl_completions(held_rows.shuffle(seed=job.seed), len(held_rows))
    # 2. the base, the adapter that trains, its frozen copy as the reference
    policy = open_policy(job, tokenizer)
    settle_dropout(job, args, policy.model, reference=True)
    with refusals_in_words(job):
        trainer = KTOStageTrainer(
            model=policy.model,
            ref_model=reference_of(job, policy, tokenizer),
            args=args,
            train_dataset=train_rows,
            eval_dataset=held_rows,
            processing_class=tokenizer,
            callbacks=stage_callbacks(job),
        )
    return PolicyStage(trainer, policy, tokenizer, data)
