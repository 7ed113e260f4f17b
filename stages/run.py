"""One stage from its job to its folder: data, base, parent, training, adapter with its lineage."""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from .. import stopping
from ..data.load import stream_rows
from ..data.report import DataReport
from ..data.rows import Fingerprint, Row
from ..data.spec import DataSpec
from ..data.split import check_sides, prompt_position
from ..errors import UserError, user_code
from ..files import CHECKPOINTS, LINEAGE, LOGS, METRICS, ROWS
from ..models.adapters import AdapterSet
from ..models.base import Base, content_sha256
from ..models.batching import forward_tokens
from ..models.cache import file_sha256
from ..models.context import check_context
from ..models.devices import device_name, say_unused_gpus
from ..models.generate import sampler_used
from ..models.lineage import (
    Lineage,
    adapter_sha256,
    base_info,
    check_parent,
    library_versions,
    parent_entry,
    read_lineage,
    tokenizer_info,
    write_lineage,
)
from ..models.loading import load_model
from ..models.model_card import write_card
from ..models.older import save_tokenizer
from ..models.packing import attention_used
from ..models.sound import weight_files
from ..models.tokens import check_vocabulary, load_tokenizer, prepare_model, vocabulary_size
from ..models.whole_model import WholeModel
from ..values import plain
from .checkpoints import SAVING, checkpoints, is_asked
from .encoded import SHAPES, encoded_rows
from .job import StageJob
from .kinds import KINDS
from .options import keeps_checkpoints
from .trainers import StageTrainer, train

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

TrainerT = TypeVar("TrainerT", bound=Trainer)


def run_stage(job: StageJob) -> dict[str, Any]:
    """Train one stage and write its folder.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: an unknown kind, a parent of another base or tokenizer, data or options that cannot be used.
    """
    run = job.record.runner()
    job.output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(job.seed)
    say_unused_gpus()
    if job.deterministic:
        deterministic_kernels(job.name)
    if job.kind in KINDS:
        return run(job)
    with user_code(f"stages.{job.name}", f"{job.kind} raised", "correct the method"):
        return run(job)


def deterministic_kernels(name: str) -> None:
    """From here on this process' GPU computes the same bits every time; a CPU does so anyway.

    The price is speed, above all in attention's backward and wherever gradients are scattered; and an operation that
    has no such kernel raises.
    """
    if not torch.cuda.is_available():
        return
    # read when the first handle is made (NVIDIA's cuBLAS documentation, "Results reproducibility")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    logger.warning("%s: deterministic: slower kernels, the same bits every time", name)


@dataclass(frozen=True)
class PolicyStage(Generic[TrainerT]):
    """A stage that trains the adapter `default` on the causal base, or all of the base, ready for its first step."""

    trainer: TrainerT
    policy: AdapterSet | WholeModel
    tokenizer: PreTrainedTokenizerBase
    data: "StageData"

    @property
    def adapters(self) -> AdapterSet:
        """The policy of a stage that trains an adapter."""
        assert isinstance(self.policy, AdapterSet)
        return self.policy


def train_policy(job: StageJob, stage: PolicyStage[TrainerT]) -> dict[str, Any]:
    """Train, save the adapter and everything beside it; returns the metrics as written."""
    if isinstance(stage.trainer, StageTrainer):
        stage.trainer.came_from(job, stage.data.train, stage.data.origins)
    metrics = train(stage.trainer, len(stage.data.train))
    stage.policy.save("default", job.output_dir, write=stage.trainer.is_world_process_zero(), done=True)
    args, backbone = stage.trainer.args, stage.policy.backbone
    return finish(job, stage.tokenizer, stage.data, args, metrics, backbone=backbone)


@dataclass(frozen=True)
class StageData:
    """The encoded rows of a stage: `held` is None where nothing is held out; `origins` is where `train` comes from."""

    train: "Dataset"
    held: "Dataset | None"
    fingerprint: str
    report: dict[str, Any]
    origins: Sequence[str] = ()


Encode = Callable[["Iterable[Row]", PreTrainedTokenizerBase, DataSpec], "tuple[Dataset, DataReport]"]


def load_data(job: StageJob, encode: Encode, tokenizer: PreTrainedTokenizerBase) -> StageData:
    """Read, split by prompt (R7) and encode the job's data; what the data room's encoders made of them before is taken
    from the cache.

    Args:
        encode: the data room's encoder of the kind of rows that the stage reads, or one of the method's own.

    Raises:
        UserError: no row is left to train on.
    """
    with stopping.interruptible():
        if (shape := SHAPES.get(encode)) is None:
            return _encoded_here(job, encode, tokenizer)
        stored, where = encoded_rows(job, shape, tokenizer), f"data.{job.data_name}"
        for name in (each for each in stored.reports if each != "read"):
            logger.info("%s, %s rows of %s: %s", job.name, name, job.data_name, "; ".join(stored.lines[name]))
        for part in (stored.train, stored.held):
            if part is not None:
                check_ids(part, tokenizer, job.base, where)
                _check_lengths(job, part, where)
        return StageData(stored.train, stored.held, stored.fingerprint, stored.reports, stored.origins)


def _encoded_here(job: StageJob, encode: Encode, tokenizer: PreTrainedTokenizerBase) -> StageData:
    """The same by a method's own encoder, which is handed the rows: they stay in memory."""
    data, where = job.data, f"data.{job.data_name}"
    read, content, held_rows = DataReport(), Fingerprint(), list[Row]()

    def train_rows() -> Iterator[Row]:
        for row in stream_rows(data, job.rows, job.folders, read, where):
            content.add(row)
            if data.held_out > 0 and prompt_position(row, data.seed) < data.held_out:
                held_rows.append(row)
            else:
                yield row

    rows = train_rows()
    if (first := next(rows, None)) is None:
        check_sides(data.held_out, 0, len(held_rows))
        raise AssertionError("a stream without rows raises")
    report: dict[str, Any] = {"read": {}}

    def encoded(name: str, part_rows: "Iterable[Row]") -> "tuple[Dataset, tuple[str, ...]]":
        made, part = encode(part_rows, tokenizer, data)
        check_ids(made, tokenizer, job.base, where)
        report[name] = part.as_dict()
        logger.info("%s, %s rows of %s: %s", job.name, name, job.data_name, "; ".join(part.lines()))
        return made, tuple(part.origins)

    train, origins = encoded("train", chain([first], rows))
    if data.held_out > 0:
        check_sides(data.held_out, read.used - len(held_rows), len(held_rows))
    held = encoded("held_out", held_rows)[0] if held_rows else None
    report["read"] = read.as_dict()
    for part in (train, held):
        if part is not None:
            _check_lengths(job, part, where)
    return StageData(train, held, content.hexdigest(), report, origins)


def _check_lengths(job: StageJob, rows: "Dataset", where: str) -> None:
    """Rows, and prompts with what is sampled after them, against the base's context."""
    if job.rows == "prompt":
        check_context(rows, job.base, where, job.method_value("max_new_tokens") or 0)
        return
    check_context(rows, job.base, where)
    if job.record.draws:
        check_context(rows.select_columns(["prompt_ids"]), job.base, where, job.method_value("max_new_tokens"))


def check_ids(rows: "Dataset", tokenizer: PreTrainedTokenizerBase, base: Base, where: str) -> None:
    """Every token of the encoded rows has its row in the base's embedding (see `check_vocabulary`)."""
    if len(tokenizer) <= (size := vocabulary_size(base)):
        return  # no token is beyond it
    for column in rows.column_names:
        if column.endswith("_ids"):
            check_vocabulary((row[column] for row in rows), tokenizer, size, where)  # pyright: ignore[reportCallIssue, reportArgumentType]: a row is a dictionary


def open_tokenizer(job: StageJob) -> PreTrainedTokenizerBase:
    """The base's tokenizer with the job's chat template, and the parent's lineage checked against both.

    Raises:
        UserError: the parent was made from another base or with another tokenizer or template.
    """
    tokenizer = load_tokenizer(job.base, job.chat_template, job.template_date)
    if job.parent is not None:
        check_parent(job.parent, job.base, tokenizer)
    return tokenizer


def open_policy(job: StageJob, tokenizer: PreTrainedTokenizerBase) -> AdapterSet | WholeModel:
    """What the stage trains: an adapter on the causal base (`open_adapters`), or the base as a whole."""
    if not job.full:
        return open_adapters(job, tokenizer)
    with stopping.interruptible():
        return WholeModel.open(job.base, tokenizer, job.torch_dtype(), packed=job.packed)


def open_adapters(job: StageJob, tokenizer: PreTrainedTokenizerBase) -> AdapterSet:
    """The causal base with a trainable `default` adapter: a copy of the parent, or a fresh one on the base."""
    with stopping.interruptible():
        model = load_model(
            job.base,
            dtype=job.torch_dtype(),
            quantization=job.quantization,
            packed=job.packed,
        )
    prepare_model(model, tokenizer)
    return AdapterSet.create(model, job.base, job.lora, job.parent, seed=job.seed)


def finish(
    job: StageJob,
    tokenizer: PreTrainedTokenizerBase,
    data: StageData,
    args: TrainingArguments,
    metrics: dict[str, Any],
    *,
    backbone: PreTrainedModel | None = None,
    reward: dict[str, float] | None = None,
    parents: tuple[Path, ...] | None = None,
    made_of: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write what lies beside a saved adapter: tokenizer, metrics.json, lineage.json; remove the checkpoints that
    nobody asked for.

    Args:
        args: the resolved config; `train` in the lineage holds what differs from its class' defaults.
        metrics: what metrics.json holds; `train_seconds` goes into the lineage too.
        backbone: the decoder that trained: the lineage says how it was computed.
        reward: {mean, std} on reference responses, of a reward stage (P22).
        parents: adapter folders it came from; default: the job's parent.
        made_of: what the lineage's config says besides.

    Returns:
        The metrics as written.
    """
    metrics = plain({**metrics, "data": data.report})
    folders = parents if parents is not None else (() if job.parent is None else (job.parent,))
    if args.process_index == 0:
        save_tokenizer(tokenizer, job.output_dir)
        (job.output_dir / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        lineage = Lineage(
            stage=job.name,
            kind=job.record.name,
            base=base_info(job.base),
            tokenizer=tokenizer_info(tokenizer),
            parents=[parent_entry(each, job.output_dir) for each in folders],
            config=_resolved(job, args)
            | dict(made_of)
            | ({} if backbone is None else {"computed": computed(backbone)}),
            data={
                "spec": plain(dataclasses.asdict(job.data)),
                "fingerprint": data.fingerprint,
                "rows": len(data.train),
            },
            seed=job.seed,
            versions=library_versions(job.quantization),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=metrics["train_seconds"],
            reward=reward,
        )
        write_lineage(job.output_dir, lineage)
        write_card(job.output_dir)
        clear_checkpoints(job)
    return metrics


def finished(job: StageJob) -> dict[str, Any] | None:
    """What a stage measured that was cut off after its end, before its folder took its place; None for any other.

    Its lineage is the last that `finish` writes; what `finish` removes may still lie there, and goes here.
    """
    if not (job.output_dir / LINEAGE).is_file():
        return None
    try:
        if job.full:
            content_sha256(job.output_dir, weight_files(job.output_dir, job.name), job.name)
        elif job.record.trains:
            adapter_sha256(job.output_dir)
        elif file_sha256(job.output_dir / ROWS) != read_lineage(job.output_dir).config["rows"]["sha256"]:
            raise ValueError("the rows are not those that were written")
        metrics = json.loads((job.output_dir / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, UserError):
        (job.output_dir / LINEAGE).unlink()  # a machine that stopped: made again from the last checkpoint
        return None
    clear_checkpoints(job)
    return metrics


def clear_checkpoints(job: StageJob) -> None:
    """Remove the checkpoints, unless the recipe asks for them; what trackers wrote beside them stays, in `runs`."""
    folder = job.output_dir / CHECKPOINTS
    if not job.record.trains:
        shutil.rmtree(folder, ignore_errors=True)  # what was drawn stands in the rows
        return
    shutil.rmtree(folder / SAVING, ignore_errors=True)
    for _, each in checkpoints(folder):
        if not is_asked(each):
            shutil.rmtree(each)
    for each in sorted(folder.iterdir()) if folder.is_dir() else ():
        if each.name == "README.md":
            each.unlink()  # a card of TRL's that every saving writes
        elif not each.name.startswith("checkpoint-"):
            (job.output_dir / LOGS).mkdir(exist_ok=True)
            each.replace(job.output_dir / LOGS / each.name)
    if not keeps_checkpoints(job) or (folder.is_dir() and not any(folder.iterdir())):
        shutil.rmtree(folder, ignore_errors=True)


def computed(backbone: PreTrainedModel) -> dict[str, Any]:
    """What was chosen for this device and this model: nothing of it is a setting, all of it may explain a number."""
    found = {
        "device": device_name(),
        "attention": attention_used(backbone) or "the model's own",
        "sampler": sampler_used(backbone),
        "forward_tokens": forward_tokens(backbone),
    }
    return {name: value for name, value in found.items() if value is not None}


def _resolved(job: StageJob, args: TrainingArguments) -> dict[str, Any]:
    """The stage's config as it was used: only what a default of the config's class does not say already."""
    defaults = {each.name: each.default for each in dataclasses.fields(args)}
    used = {key: value for key, value in args.to_dict().items() if key in defaults and defaults[key] != value}
    places = (
        *("output_dir", "logging_dir", "samples_file", "policies_dir", "rollout_place"),
        *("run_name", "hub_token", "push_to_hub_token"),
    )
    return plain(
        {
            "dtype": job.dtype,
            "quantization": job.quantization,
            **({"full": True} if job.full else {"lora": dataclasses.asdict(job.lora)}),
            "method": job.method,
            "train": {key: value for key, value in used.items() if key not in places},
            **({"rewards": [each.as_dict() for each in job.rewards]} if job.rewards else {}),
        }
    )
