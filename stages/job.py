"""One stage from its job to its folder: data, base, parent, training, adapter with its lineage."""

import dataclasses
import importlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from ..data.load import load_rows
from ..data.spec import DataSpec
from ..data.split import split_rows
from ..errors import UserError
from ..models.adapters import AdapterSet, LoraSpec
from ..models.base import Base
from ..models.lineage import (
    Lineage,
    adapter_sha256,
    base_info,
    check_lineage,
    library_versions,
    read_lineage,
    tokenizer_info,
    write_lineage,
)
from ..models.loading import load_model
from ..models.tokens import load_tokenizer, prepare_model
from ..values import plain
from .trainers import train

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.rows import Row
    from ..data.spec import Kind
    from .rewards import RewardSource

logger = logging.getLogger(__name__)

_RUNNERS = {
    "sft": ("sft", "run_sft"),
    "reward": ("reward", "run_reward"),
    "dpo": ("dpo", "run_dpo"),
    "kto": ("kto", "run_kto"),
    "ppo": ("ppo_stage", "run_ppo"),
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """Everything one stage needs, resolved: no recipe is read below this line.

    Attributes:
        name: the stage's name in the recipe; kind: sft, reward, dpo, kto or ppo.
        parent: folder of the adapter that it starts from; None for the base.
        folders: where relative data paths are looked up, in order.
        method: what stands beside `train:` (beta, loss_type, early_stopping_patience...).
        train: fields of the TRL / Transformers config by their own names.
        rewards: where PPO's scores come from.
        output_dir: gets the adapter, the tokenizer, lineage.json, metrics.json and log.jsonl.
        packed: forwards run without padding and repeated prefixes.
        data_name: the data entry's name in the recipe, for messages and lineage.
    """

    name: str
    kind: str
    base: Base
    dtype: str = "float32"
    quantization: str | None = None
    lora: LoraSpec = field(default_factory=LoraSpec)
    parent: Path | None = None
    data: DataSpec
    folders: tuple[Path, ...] = ()
    method: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    rewards: "tuple[RewardSource, ...]" = ()
    seed: int = 0
    output_dir: Path
    chat_template: str | None = None
    packed: bool = True
    data_name: str = "data"


def run_stage(job: StageJob) -> dict[str, Any]:
    """Train one stage and write its folder.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: an unknown kind, a parent of another base or tokenizer, data or options that cannot be used.
    """
    if job.kind not in _RUNNERS:
        raise UserError(f"stages.{job.name}.kind", f"{job.kind!r} is no kind of stage", f"use {', '.join(_RUNNERS)}")
    module, function = _RUNNERS[job.kind]
    run: Callable[[StageJob], dict[str, Any]] = getattr(importlib.import_module(f".{module}", __package__), function)
    job.output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(job.seed)
    return run(job)


@dataclass(frozen=True)
class PolicyStage:
    """A stage that trains the adapter `default` on the causal base, built and ready for its first step."""

    trainer: Any
    adapters: AdapterSet
    tokenizer: PreTrainedTokenizerBase
    data: "StageData"


def train_policy(job: StageJob, stage: PolicyStage) -> dict[str, Any]:
    """Train, save the adapter and everything beside it; returns the metrics as written."""
    metrics = train(stage.trainer, len(stage.data.train))
    if stage.trainer.is_world_process_zero():
        stage.adapters.save("default", job.output_dir)
    return finish(job, stage.tokenizer, stage.data, stage.trainer.args, metrics)


@dataclass(frozen=True)
class StageData:
    """The encoded rows of a stage: `held` is None where nothing is held out."""

    train: "Dataset"
    held: "Dataset | None"
    fingerprint: str
    report: dict[str, Any]


Encode = Callable[["list[Row]", PreTrainedTokenizerBase, DataSpec], "tuple[Dataset, Any]"]


def load_data(job: StageJob, kind: "Kind", encode: Encode, tokenizer: PreTrainedTokenizerBase) -> StageData:
    """Read, split by prompt (R7) and encode the job's data.

    Args:
        kind: "demo", "pair" or "label".
        encode: the data room's encoder of that kind.

    Raises:
        UserError: no row is left to train on.
    """
    loaded = load_rows(job.data, kind, job.folders)
    train_rows, held_rows = (
        split_rows(loaded.rows, job.data.held_out, job.data.seed) if job.data.held_out > 0 else (loaded.rows, [])
    )
    report: dict[str, Any] = {"read": loaded.report.as_dict()}
    encoded: dict[str, Dataset] = {}
    for name, rows in (("train", train_rows), ("held_out", held_rows)):
        if rows:
            encoded[name], part = encode(list(rows), tokenizer, job.data)
            report[name] = part.as_dict()
            logger.info("%s, %s rows of %s: %s", job.name, name, job.data_name, "; ".join(part.lines()))
    train = encoded.get("train")
    if train is None or not len(train):
        raise UserError(
            f"data.{job.data_name}",
            f"no row is left to train on ({len(loaded.rows)} read, {len(train_rows)} after the split)",
            "raise max_length, or see `preftune validate` for why rows were dropped",
        )
    held = encoded.get("held_out")
    return StageData(train, held if held is not None and len(held) else None, loaded.fingerprint, report)


def open_tokenizer(job: StageJob) -> PreTrainedTokenizerBase:
    """The base's tokenizer with the job's chat template, and the parent's lineage checked against both.

    Raises:
        UserError: the parent was made from another base or with another tokenizer or template.
    """
    tokenizer = load_tokenizer(job.base, job.chat_template)
    if job.parent is not None:
        check_lineage(job.parent, job.base, tokenizer)
    return tokenizer


def open_adapters(job: StageJob, tokenizer: PreTrainedTokenizerBase) -> AdapterSet:
    """The causal base with a trainable `default` adapter: a copy of the parent, or a fresh one on the base."""
    quantization: Any = job.quantization
    model = load_model(
        job.base,
        dtype=torch_dtype(job),
        quantization=quantization,
        device="cuda" if job.quantization else None,
        packed=job.packed,
    )
    prepare_model(model, tokenizer)
    return AdapterSet.create(model, job.base, job.lora, job.parent, seed=job.seed)


def torch_dtype(job: StageJob) -> torch.dtype:
    """The job's dtype. Raises UserError for one that nothing trains in."""
    if job.dtype not in DTYPES:
        raise UserError("model.dtype", f"{job.dtype!r} is unknown", f"use {', '.join(DTYPES)}")
    return DTYPES[job.dtype]


def finish(
    job: StageJob,
    tokenizer: PreTrainedTokenizerBase,
    data: StageData,
    args: TrainingArguments,
    metrics: dict[str, Any],
    *,
    reward: dict[str, float] | None = None,
    parents: tuple[Path, ...] | None = None,
) -> dict[str, Any]:
    """Write what lies beside a saved adapter: tokenizer, metrics.json, lineage.json; remove the checkpoints.

    Args:
        args: the resolved config; `train` in the lineage holds what differs from its class' defaults.
        metrics: what metrics.json holds; `train_seconds` goes into the lineage too.
        reward: {mean, std} on reference responses, of a reward stage (P22).
        parents: adapter folders it came from; default: the job's parent.

    Returns:
        The metrics as written.
    """
    metrics = plain({**metrics, "data": data.report})
    folders = parents if parents is not None else (() if job.parent is None else (job.parent,))
    if args.process_index == 0:
        tokenizer.save_pretrained(job.output_dir)
        (job.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        lineage = Lineage(
            stage=job.name,
            kind=job.kind,
            base=base_info(job.base),
            tokenizer=tokenizer_info(tokenizer),
            parents=[{"stage": read_lineage(each).stage, "sha256": adapter_sha256(each)} for each in folders],
            config=_resolved(job, args),
            data={
                "spec": plain(dataclasses.asdict(job.data)),
                "fingerprint": data.fingerprint,
                "rows": len(data.train),
            },
            seed=job.seed,
            versions=library_versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=metrics["train_seconds"],
            reward=reward,
        )
        write_lineage(job.output_dir, lineage)
        shutil.rmtree(job.output_dir / "checkpoints", ignore_errors=True)
    return metrics


def _resolved(job: StageJob, args: TrainingArguments) -> dict[str, Any]:
    """The stage's config as it was used: only what a default of the config's class does not say already."""
    defaults = {each.name: each.default for each in dataclasses.fields(args)}
    used = {key: value for key, value in args.to_dict().items() if key in defaults and defaults[key] != value}
    places = (
        *("output_dir", "logging_dir", "samples_file", "policies_dir"),
        *("run_name", "hub_token", "push_to_hub_token"),
    )
    return plain(
        {
            "dtype": job.dtype,
            "quantization": job.quantization,
            "lora": dataclasses.asdict(job.lora),
            "method": job.method,
            "train": {key: value for key, value in used.items() if key not in places},
        }
    )
