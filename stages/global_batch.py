"""What a loss and a metric are over: the rows of one optimiser step, however they are split.

A step's rows lie in the micro-batches of several processes. TRL takes the mean of each and then the mean of the means,
which is another number as soon as they are of unlike size, as the last of an epoch are; accelerate makes those full
with rows of the epoch's beginning. Here nothing is repeated: what is left is divided among the processes, every mean
counts by what it is over, and one process computes what several do.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from accelerate.utils import gather
from torch.utils.data import BatchSampler, DataLoader
from transformers import Trainer, TrainingArguments

from ..models import seams

logger = logging.getLogger(__name__)

ROWS = "preftune_rows"
"""The key under which a batch says how many rows it is made of; 0: its only row stands in for none."""
Metrics = dict[str, list[float]]
Counts = Mapping[str, float]
"""What the values of one micro-batch are means over: `rows`, `tokens` and what else the kind of trainer counts."""


class DividedBatches:
    """A batch sampler's batches by the turn of the processes. What is left at the end is divided among all of them, in
    order; a process for which nothing is left gets an empty batch."""

    batch_size = None  # they differ: accelerate is to take them as they are

    def __init__(self, batches: BatchSampler, processes: int) -> None:
        self.batches, self.processes, self.drop_last = batches, processes, batches.drop_last
        self.sampler = batches.sampler

    def __len__(self) -> int:
        whole, left = divmod(len(self.batches), self.processes)
        return self.processes * (whole + bool(left and not self.drop_last))

    def __iter__(self) -> Iterator[list[int]]:
        together: list[list[int]] = []
        for batch in self.batches:
            together.append(batch)
            if len(together) == self.processes:
                yield from divided([row for each in together for row in each], self.processes)
                together = []
        if together and not self.drop_last:
            yield from divided([row for each in together for row in each], self.processes)


def divided(rows: Sequence[int], parts: int) -> list[list[int]]:
    """The rows in order in that many parts, whose lengths differ by at most one."""
    size, more = divmod(len(rows), parts)
    starts = [part * size + min(part, more) for part in range(parts + 1)]
    return [list(rows[start:end]) for start, end in pairwise(starts)]


class CountingCollator:
    """A collator whose batches say how many rows they are made of. One of none holds the data's first row, on which
    nothing trains: a process takes part in each step."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]], dataset: Any) -> None:
        self.collate, self.dataset = collate, dataset

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        batch = self.collate(examples or [self.dataset[0]])
        if not examples and "labels" in batch:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        return {**batch, ROWS: len(examples)}


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of all processes. rows: of each process; step: rows of its optimiser step in all processes and
    micro-batches; parts: micro-batches of that step."""

    rows: tuple[int, ...]
    step: int
    parts: int = 1

    def share(self, process: int) -> float:
        """What a process' mean counts, so that the mean over processes of the mean over micro-batches is the mean over
        the step's rows: 1 where all are of one size."""
        return self.rows[process] * len(self.rows) * self.parts / self.step


class GlobalBatch(Trainer):
    """Mixed in before a TRL trainer: its losses and metrics are over the rows of a step, whatever their split.

    Attributes:
        mean_over_rows: its loss is a mean over rows; else one over the step's tokens, which Transformers divides by.
        mean_over: metric -> which count it is a mean over; those that are not named are means over rows.
        loss_over: which count the loss is a mean over.
    """

    mean_over_rows = True
    loss_over = "rows"
    mean_over: Mapping[str, str] = {}
    _coming: deque[MicroBatch]
    _now: MicroBatch | None = None
    _aside: Metrics | None = None
    _seen: list[tuple[Counts, Counts]]
    _losses: list[float]

    def counted(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """What the values of a micro-batch are means over, in this process, besides its rows."""
        return {}

    # the rows of each process

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """As it is, but where rows of like length are put together it is by the steps of all processes."""
        own = self.args.gradient_accumulation_steps
        self.args.gradient_accumulation_steps = own * self.args.world_size
        try:
            return super()._get_train_sampler(*args, **kwargs)
        finally:
            self.args.gradient_accumulation_steps = own

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        own = self.data_collator
        self.data_collator = CountingCollator(own, dataset)
        try:
            loader: Any = super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            self.data_collator = own
        processes = self.args.world_size
        if processes > 1:
            seams.require(seams.BATCH_SHARDS, loader)
            shards = loader.batch_sampler
            if shards.num_processes > 1:  # `batch_rebalance` divides by itself
                shards.batch_sampler = DividedBatches(shards.batch_sampler, processes)
                shards.batch_size, shards.even_batches = None, False
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        own = [batch.pop(ROWS) for batch in batches]
        of_all = self.of_each_process(own)
        step = sum(map(sum, of_all))
        self._coming = deque(MicroBatch(tuple(rows), step, len(own)) for rows in of_all)
        if len(own) > 1:
            seams.require(seams.METRICS, self)
            trl: Any = self
            self._aside, trl._metrics["train"], self._seen = trl._metrics["train"], defaultdict(list), []
        return batches, items

    def of_each_process(self, own: Sequence[int]) -> list[list[int]]:
        """For each of the process' own numbers, that of every process."""
        if self.args.world_size == 1:
            return [[each] for each in own]
        of_all: Any = gather(torch.tensor([own], dtype=torch.int64, device=self.args.device))
        return of_all.T.tolist()

    # losses

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        coming = getattr(self, "_coming", None)
        self._now = coming.popleft() if coming else None
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._aside is not None and not coming:
            trl: Any = self
            over = self.collapsed(trl._metrics["train"], [of_all for _, of_all in self._seen])
            for name, values in over.items():
                # a total stands there as it is
                self._aside[name] = values if name == _TOTAL else [*self._aside[name], *values]
            trl._metrics["train"], self._aside = self._aside, None
        self._now = None
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        now, loss_of = self._now, cast(Any, super().compute_loss)
        if now is None:
            return loss_of(model, inputs, return_outputs, num_items_in_batch)
        if self._aside is not None or not self.model_is_training:
            self._seen.append(self._counts(inputs, now))
        with self._of_real_rows(now):
            found = loss_of(model, inputs, return_outputs, num_items_in_batch)
        share = now.share(self.args.process_index)
        if share == 1 or not self.mean_over_rows or not self.model_is_training:
            return found
        return (found[0] * share, found[1]) if return_outputs else found * share

    @property
    def model_is_training(self) -> bool:
        """Whether a loss is one to train on."""
        return self.model is not None and self.model.training

    def _counts(self, inputs: Mapping[str, Any], now: MicroBatch) -> tuple[Counts, Counts]:
        """What the micro-batch's values are means over: (here, in all processes)."""
        rows = now.rows[self.args.process_index]
        here = {"rows": rows, **{name: int(each) if rows else 0 for name, each in self.counted(inputs).items()}}
        of_all = self.of_each_process(list(here.values()))
        return here, dict(zip(here, map(sum, of_all), strict=True))

    @contextmanager
    def _of_real_rows(self, now: MicroBatch) -> Generator[None]:
        """Within it, what TRL gathers for its metrics are the values of rows, and of none that stands in."""
        if len(set(now.rows)) == 1:
            yield
            return
        accelerator: Any = self.accelerator
        accelerator.gather = accelerator.gather_for_metrics = lambda each: self.of_all_rows(each, now)
        try:
            yield
        finally:
            del accelerator.gather, accelerator.gather_for_metrics

    def of_all_rows(self, values: torch.Tensor, now: MicroBatch) -> torch.Tensor:
        """The values of the processes that have rows, one after the other.

        Args:
            values: of the process' rows (shape [n, ...], n may differ), or one (shape []).
        """
        own = values.detach() if values.dim() else values.detach()[None]
        if len(now.rows) == 1:
            return own
        sizes = self.of_each_process([len(own)])[0]
        padded = own.new_zeros(1, max(sizes), *own.shape[1:])
        padded[0, : len(own)] = own
        of_all: Any = gather(padded)
        return torch.cat([part[:size] for part, size, rows in zip(of_all, sizes, now.rows, strict=True) if rows])

    # metrics

    def collapsed(self, metrics: Metrics, counts: Sequence[Counts]) -> Metrics:
        """The metrics of several micro-batches as those of one that holds all their rows."""
        over = self.mean_over
        return {name: [mean_of(name, each, counts, over.get(name, "rows"))] for name, each in metrics.items()}

    def micro_batch(self, rows: int) -> MicroBatch:
        """One that stands for itself, of which this process has so many rows. Every process asks."""
        of_all = self.of_each_process([rows])[0]
        return MicroBatch(tuple(of_all), sum(of_all))

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._now = self.micro_batch(inputs.pop(ROWS))
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        self._now = None
        assert loss is not None
        self._losses.append(float(loss))
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        seams.require(seams.METRICS, self)
        trl: Any = self
        self._seen, self._losses = [], []
        output: Any = super().evaluation_loop(*args, **kwargs)
        over = self.collapsed(trl._metrics["eval"], [of_all for _, of_all in self._seen])
        trl._metrics["eval"] = defaultdict(list, over)
        weights = [here[self.loss_over] for here, _ in self._seen]
        own = sum(loss * weight for loss, weight in zip(self._losses, weights, strict=True) if weight)
        sums: Any = torch.tensor([[own, sum(weights)]], dtype=torch.float64, device=self.args.device)
        of_all: Any = sums if self.args.world_size == 1 else gather(sums)
        loss, weight = of_all.sum(0).tolist()
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = loss / weight if weight else 0.0
        return output


def say_own_batches(name: str, args: TrainingArguments, terms: Collection[str]) -> None:
    """Say which terms of a loss look at a whole batch, and so at what one process computes at once.

    Args:
        name: of the stage. terms: of its loss.
    """
    parts = args.world_size * args.gradient_accumulation_steps
    if terms and parts > 1 and args.process_index == 0:
        logger.warning(
            "%s: %s is of the rows computed at once, %d here, and a step has %d such parts: with others it is another",
            name, ", ".join(terms), args.per_device_train_batch_size, parts,
        )  # fmt: skip


_TOTAL = "num_tokens"
"""TRL's metric that is the run's total and no mean."""


def mean_of(name: str, values: Sequence[float], counts: Sequence[Counts], over: str) -> float:
    """One metric of several micro-batches: its mean over all that they count; of a least or greatest value, that.

    Args:
        values: of the micro-batches; of those alone that hold something to be a mean over, where others do not.
        over: which of the counts the metric is a mean over.
    """
    if name == _TOTAL:
        return values[-1]
    if name.startswith(("min_", "max_")):
        return (min if name.startswith("min_") else max)(values)
    weights = [each[over] for each in counts]
    if len(weights) != len(values):
        weights = [each for each in weights if each]
    if len(weights) != len(values) or len(set(weights)) == 1 or not sum(weights):
        return sum(values) / len(values)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
