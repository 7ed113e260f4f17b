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
from .costs import AssumedRows, Place, stage_cost
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
    if not torch.cuda.is_available() or any(job.train.get(key) is not None for key in _KEYS):
        return
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    config = open_config(job.base.path)
    assumed = heaviest_rows(rows, job.record.rows, settings.per_device_train_batch_size)
    place = Place("cuda", settings.world_size, memory=total)
    peak = peak_without(job, config, assumed, place)
    fits = peak is not None and peak * _MARGIN <= room(total)
    settings.activation_checkpointing = not fits
    said = "" if peak is None else f": a step would hold {peak / 1e9:.1f} of {total / 1e9:.1f} GB without it"
    logger.info("%s: activation checkpointing is %s%s", job.name, "off" if fits else "on", said)


def peak_without(job: StageJob, config: PreTrainedConfig, rows: AssumedRows, place: Place) -> int | None:
    """Bytes that the stage holds at its peak without checkpointing; None where its plan is a rule of thumb."""
    train = {key: value for key, value in job.train.items() if key not in _KEYS} | {_KEYS[0]: False}
    try:
        cost = stage_cost(replace(job, train=train), config, rows, None, place)
    except UserError:
        return None
    return None if cost.approximate else cost.peak[1]


def heaviest_rows(rows: "Dataset", kind: RowKind, batch: int) -> AssumedRows:
    """Rows of one length of which no batch of the real ones holds more tokens: as many, none like another."""
    lengths_N = numpy.max([_lengths(rows, columns) for columns in _SEQUENCES[kind]], axis=0)
    longest = numpy.sort(lengths_N)[-batch:]
    return AssumedRows(len(rows), int(numpy.ceil(longest.mean())), kind)


def _lengths(rows: "Dataset", columns: Sequence[str]) -> "numpy.ndarray[Any, Any]":
    """Tokens of each row's sequence, read without making a Python list of any."""
    table = rows.with_format("arrow")[:]
    counted = [
        numpy.concatenate([numpy.diff(each.offsets.to_numpy()) for each in table[name].chunks]) for name in columns
    ]
    return numpy.sum(counted, axis=0)
