"""What a stage left in the run folder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.encode import TRUNCATED
from ...data.spec import DataSpec, SourceSpec
from ...errors import UserError
from ...files import LINEAGE, LOG, METRICS, MODEL_CONFIG, ROWS, partial_folder, read_json_lines
from ...intact import damage, read_json_object
from ...models.fingerprints import content
from ...models.heads import ScalarHead
from ...models.lineage import Lineage, read_lineage
from ...models.lora import CONFIG, SCORE, WEIGHTS, read_tensors
from ...stages.job import StageJob
from ...values import is_finite


@dataclass(frozen=True)
class Record:
    """One stage as it lies in the run folder.

    Attributes:
        job: the stage as the run's recipe has it.
        lineage: None where the stage is not finished; then only its log can be looked at.
        metrics: metrics.json.
        log: the rows of log.jsonl, of the finished stage or of one that was interrupted.
        damage: what of its files is not as it was written, in words; its lineage is None then.
    """

    job: StageJob
    lineage: Lineage | None
    metrics: dict[str, Any]
    log: list[dict[str, Any]]
    damage: str | None = None

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def folder(self) -> Path:
        return self.job.output_dir

    @property
    def is_policy(self) -> bool:
        return self.job.record.speaks

    def start(self) -> str:
        """Name of what the stage starts from."""
        return "the base" if self.job.parent is None else self.job.parent.name

    def data(self) -> DataSpec:
        """The data as the stage read them, whatever the recipe says by now."""
        if self.lineage is None:
            return self.job.data
        spec = dict(self.lineage.data["spec"])
        return DataSpec(**{**spec, "sources": tuple(SourceSpec(**each) for each in spec["sources"])})

    def setting(self, key: str, default: Any) -> Any:
        """A method's or trainer's setting as the stage used it."""
        config = self.lineage.config if self.lineage is not None else {}
        for part in (config.get("method"), config.get("train"), self.job.method, self.job.train):
            if part and part.get(key) is not None:
                return part[key]
        return default

    def low_precision(self) -> bool:
        """Whether it computed in 16 bits."""
        dtype = self.job.dtype if self.lineage is None else self.lineage.config.get("dtype", self.job.dtype)
        return dtype != "float32" or bool(self.setting("bf16", False)) or bool(self.setting("fp16", False))

    def dropout(self) -> float:
        """LoRA's, in training."""
        lora = {} if self.lineage is None else self.lineage.config.get("lora") or {}
        return float(lora.get("dropout", self.job.lora.dropout))

    def tensors(self) -> dict[str, Tensor]:
        """The saved adapter's, on the CPU."""
        return read_tensors(self.folder / WEIGHTS)


def read_record(job: StageJob, run_dir: Path) -> Record:
    """The record of a stage, finished or not, sound or damaged."""
    folder = job.output_dir
    written = (CONFIG, WEIGHTS) if job.record.adapts else (MODEL_CONFIG,) if job.full else (ROWS,)
    names = (LINEAGE, *written)
    finished = all((folder / name).is_file() for name in names)
    # a stage at work, or one that was interrupted, lies beside its place
    lies = folder if finished else partial_folder(run_dir, job.name)
    broken, lineage, metrics = damage(folder), None, dict[str, Any]()
    try:
        metrics = read_json_object(lies / METRICS)
        if finished and broken is None:
            if not job.full:
                content(folder)
            lineage = read_lineage(folder)
    except UserError as error:
        broken = broken or f"{Path(error.where).name} {error.problem}"
    return Record(job, lineage if broken is None else None, metrics, read_json_lines(lies / LOG), broken)


def series(log: Sequence[dict[str, Any]], *keys: str) -> list[list[float]]:
    """The values of each key in the rows that have all of them as finite numbers, in order."""
    rows = [row for row in log if all(is_finite(row.get(key)) for key in keys)]
    return [[float(row[key]) for row in rows] for key in keys]


def lost_rows(metrics: dict[str, Any]) -> tuple[int, int] | None:
    """(rows read, rows dropped or truncated) by reading and encoding; None where metrics.json does not say."""
    data = metrics.get("data") or {}
    read = (data.get("read") or {}).get("read")
    if not read:
        return None
    dropped = sum(sum((part.get("dropped") or {}).values()) for part in data.values())
    return int(read), int(dropped + sum((part.get("notes") or {}).get(TRUNCATED, 0) for part in data.values()))


def score_weight(record: Record) -> tuple[float | None, float]:
    """(norm of the saved score weight or None, its distance from the fresh one that the seed gives)."""
    weight = record.tensors().get(SCORE)
    if weight is None:
        return None, math.nan
    assert record.lineage is not None
    with torch.random.fork_rng(devices=[]):
        fresh = ScalarHead(weight.shape[-1], False, torch.Generator().manual_seed(record.lineage.seed)).score.weight
    return float(weight.float().norm()), float((weight.float() - fresh.detach()).norm())


def lora_change(child: dict[str, Tensor], parent: dict[str, Tensor] | None) -> tuple[float, float | None]:
    """How a child's LoRA B relate to those of its parent, over all layers together.

    Args:
        child, parent: saved adapters; the child's rank may be larger. parent None: the child started from the base.

    Returns:
        (norm of the change in the parent's norm, projection on the parent as a share of it); from the base, or from a
        parent that is 0 everywhere, the plain norm and None. (nan, None) where a weight is not finite.
    """
    change = size = shared = 0.0
    if not all(bool(tensor.isfinite().all()) for tensor in child.values()):
        return math.nan, None
    for name, ours in child.items():
        if "lora_B" not in name and "lora_embedding_B" not in name:
            continue
        grown = torch.zeros_like(ours, dtype=torch.float64)
        if parent is not None and name in parent:
            old = parent[name].double()
            grown[tuple(slice(length) for length in old.shape)] = old
        change += float((ours.double() - grown).square().sum())
        size += float(grown.square().sum())
        shared += float((ours.double() * grown).sum())
    if size == 0:
        return math.sqrt(change), None
    return math.sqrt(change / size), shared / size
