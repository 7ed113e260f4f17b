"""Whether a GPU keeps a step's activations or computes them again in the backward, where the recipe says neither.

Computing them again (activation checkpointing, Chen et al., arXiv 1604.06174) costs about a third of a step's time and
no number changes, so it is done only where they would not fit.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
import torch
from transformers import PreTrainedConfig, TrainingArguments

from ..data.spec import RowKind
from ..errors import UserError
from ..models.auto import open_config
from ..models.cards import room
from ..models.context import column_lengths
from .costs import AnyRows, AssumedRows, Place, StageCost, stage_cost
from .job import StageJob

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_KEYS = ("gradient_checkpointing", "activation_checkpointing")
_MARGIN = 1.15
"""How far above its plan a step may come to lie: plans are held to 15 % of what is measured."""

_SEQUENCES: dict[RowKind, tuple[tuple[str, ...], ...]] = {
    "demo": (("input_ids",),),
    "pair": (("prompt_ids", "chosen_ids"), ("prompt_ids", "rejected_ids")),
    "label": (("prompt_ids", "completion_ids"),),
    "prompt": (("prompt_ids",),),
}
"""The columns of encoded rows whose tokens stand one after the other in a sequence, by the kind of rows."""


def settle_checkpointing(job: StageJob, args: TrainingArguments, rows: "Dataset") -> None:
    """Switch activation checkpointing off in the config where a GPU has room for all that a step keeps.

    Args:
        args: the stage's config; what the recipe says stays.
        rows: encoded, to train on.
    """
    settings: Any = args
    if not torch.cuda.is_available() or says_which(job):
        return
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    config = open_config(job.base.path)
    assumed = heaviest_rows(rows, job.record.rows, settings.per_device_train_batch_size)
    beside = None if job.teacher is None else job.teacher.outline(job.base)
    teacher = None if beside is None else beside.config
    cost = cost_if_kept(job, config, assumed, None, Place("cuda", settings.world_size, memory=total), (), teacher)
    settings.activation_checkpointing = cost is None
    said = "" if cost is None else f": a step holds {cost.peak[1] / 1e9:.1f} of {total / 1e9:.1f} GB without it"
    logger.info("%s: activation checkpointing is %s%s", job.name, "on" if cost is None else "off", said)


def says_which(job: StageJob) -> bool:
    """Whether the recipe says what becomes of activations."""
    return any(job.train.get(key) is not None for key in _KEYS)


def cost_if_kept(
    job: StageJob,
    config: PreTrainedConfig,
    rows: AnyRows,
    held: AnyRows | None,
    place: Place,
    replies: Sequence[int] = (),
    teacher: PreTrainedConfig | None = None,
) -> StageCost | None:
    """What the stage costs where its activations are kept, if they fit the GPU; arguments as of `stage_cost`.

    None where they do not fit, or where a plan of it is no more than a rule of thumb.
    """
    assert place.memory is not None
    train = {key: value for key, value in job.train.items() if key not in _KEYS} | {_KEYS[0]: False}
    try:
        cost = stage_cost(replace(job, train=train), config, rows, held, place, replies, teacher)
    except UserError:
        return None
    fits = cost.approximate is None and cost.peak[1] * _MARGIN <= room(place.memory)
    return cost if fits else None


def heaviest_rows(rows: "Dataset", kind: RowKind, batch: int) -> AssumedRows:
    """Rows of one length of which no batch of the real ones holds more tokens: as many, none like another."""
    lengths_N = numpy.max([column_lengths(rows, columns) for columns in _SEQUENCES[kind]], axis=0)
    longest = numpy.sort(lengths_N)[-batch:]
    return AssumedRows(len(rows), int(numpy.ceil(longest.mean())), kind)
