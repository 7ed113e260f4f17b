"""What one stage is to do, resolved."""

from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ..data.spec import DataSpec, RowKind
from ..errors import UserError
from ..models.base import Base
from ..models.loading import Quantization
from ..models.lora import LoraSpec
from .kinds import StageKind, stage_kind
from .ppo.rewards import RewardSource
from .teachers import TeacherSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class CheckpointPlan:
    """When a stage writes a checkpoint that it could continue from; the newest alone is kept.

    Attributes:
        share: of the stage's optimiser steps between two; None: steps do not matter.
        minutes: at most so many pass between two; None: time does not matter.
    """

    share: float | None = 0.1
    minutes: float | None = 5.0


@dataclass(frozen=True)
class Trackers:
    """Who is told of a run besides its own files, and what they call it.

    Attributes:
        names: tensorboard, trackio, wandb, or others that Transformers reports to.
        project: the recipe's name. group: the run's, which all its stages and its evaluation share.
    """

    names: tuple[str, ...] = ()
    project: str = "preftune"
    group: str = "preftune"


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """Everything one stage needs, resolved: no recipe is read below this line.

    Attributes:
        name: the stage's name in the recipe; kind: as the recipe says it (see `kinds.stage_kind`).
        full: all weights train, and no adapter.
        parent: folder of the adapter that it starts from; None for the base.
        folders: where relative data paths are looked up, in order.
        method: the parameters that stand beside `train:` (beta, loss_type, kl_coef, early_stopping_patience, ...).
        train: fields of the TRL / Transformers config by their own names.
        rewards: where the scores of an on-policy stage come from. teacher: of a distillation.
        output_dir: gets the adapter, the tokenizer, lineage.json, metrics.json and log.jsonl.
        template_date: the day that templates write which write today's.
        packed: forwards run without padding and repeated prefixes.
        data_name: the data entry's name in the recipe, for messages and lineage.
        checkpoints: when it writes one to continue from.
        nonfinite_skips: so many steps whose loss or gradient is not finite are left out; one more ends the stage.
        deterministic: a GPU's kernels give the same bits every time.
        trackers: who is told, where `train` names nobody else.
    """

    name: str
    kind: str
    base: Base
    dtype: str = "float32"
    quantization: Quantization | None = None
    lora: LoraSpec = field(default_factory=LoraSpec)
    full: bool = False
    parent: Path | None = None
    data: DataSpec
    folders: tuple[Path, ...] = ()
    method: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    rewards: tuple[RewardSource, ...] = ()
    teacher: TeacherSource | None = None
    seed: int = 0
    output_dir: Path
    chat_template: str | None = None
    template_date: date | None = None
    packed: bool = True
    data_name: str = "data"
    checkpoints: CheckpointPlan = field(default_factory=CheckpointPlan)
    nonfinite_skips: int = 0
    deterministic: bool = False
    trackers: Trackers = field(default_factory=Trackers)

    @property
    def record(self) -> StageKind:
        """The record of its kind. Raises UserError where there is none."""
        kind = stage_kind(self.kind, f"stages.{self.name}.kind")
        return kind.of_all_weights() if self.full else kind

    @property
    def rows(self) -> RowKind:
        """The kind of rows that it reads."""
        return self.record.reads(self.method)

    def method_value(self, name: str) -> Any:
        """A parameter of the method: what the recipe says, or its default; None where the kind has no such."""
        default = next((each.default for each in self.record.parameters if each.name == name), None)
        return self.method.get(name, default)

    def says(self, key: str) -> Any:
        """What the recipe says for a field or parameter, beside `train` or in it; None where it says nothing."""
        return self.method.get(key, self.train.get(key))

    def continuing(self) -> CheckpointPlan | None:
        """When checkpoints to continue from are written; None where the recipe wants none, or the model alone."""
        unwanted = str(self.train.get("save_strategy")) == "no" or self.train.get("save_only_model")
        return None if unwanted else self.checkpoints

    def torch_dtype(self) -> torch.dtype:
        """The dtype of the base. Raises UserError for one that nothing trains in."""
        if self.dtype not in DTYPES:
            raise UserError("model.dtype", f"{self.dtype!r} is unknown", f"use {', '.join(DTYPES)}")
        return DTYPES[self.dtype]


def no_reward(job: StageJob) -> UserError:
    """The error of a stage that draws replies, and whose replies nothing scores."""
    return UserError(
        f"stages.{job.name}.reward", "no reward is given", "name a reward stage, a model, a function or a verifier"
    )
