"""How long a stage will take: by what its steps took here, or by the published figures of a GPU."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..models.batching import TokenIds
from ..models.calibration import Timed, look, train
from ..models.cards import DECODING_SHARE, TRAINING_SHARE, Card
from ..models.cost import BYTES, Sizes
from .costs import Decodes, StageCost, Work
from .job import StageJob

_DECODED = 10
"""New tokens of the replies on which a decode step is timed."""
_AROUND_A_STEP = 0.045
"""Seconds of a step in which the trainer does something else: its checks, its log, norms, callbacks. From the smoke
recipe, whose stages hold little else (two cores, 3 to 8 steps); beside a real model's step it is nothing."""


class Seconds(NamedTuple):
    """Of a stage's training loop. most: where every sampled reply is as long as it may be."""

    expected: float
    most: float


def measured_seconds(cost: StageCost, timed: Timed, limit: float) -> Seconds | None:
    """On the machine that `timed` holds its models on; None: how often is unknown.

    Args:
        limit: about so many seconds are spent on measuring, where a step takes no longer.
    """
    if any(work.times is None for work in cost.work):
        return None
    each = limit / len(cost.work)
    found = [(work.times or 0, _seconds(work, timed, each)) for work in cost.work if work.phase != "evaluation"]
    around = _AROUND_A_STEP * (cost.steps or 0)
    return Seconds(*(around + sum(times * one[way] for times, one in found) for way in (0, 1)))


def _seconds(work: Work, timed: Timed, limit: float) -> Seconds:
    rows = work.typical
    if work.decodes is not None:
        return _rollout_seconds(rows, work.decodes, timed)
    if work.step in ("forward", "prefill"):
        once = timed.seconds(look(rows, work.scored), limit)
    else:
        both = work.step == "policy and reference"
        scored = 0 if work.step == "score" else work.scored
        once = timed.seconds(train(rows, scored, reference=both, step=1 / work.passes), limit)
    return Seconds(once, once * work.longer)


def _rollout_seconds(prompts: Sequence[TokenIds], decodes: Decodes, timed: Timed) -> Seconds:
    """A step's time is taken to grow evenly with its rows, between all of them and a quarter."""
    few = max(1, len(prompts) // 4)
    first, wide = timed.decoding(prompts, _DECODED)
    narrow = timed.decoding(prompts[:few], _DECODED)[1] if few < len(prompts) else wide
    a_row = max(0.0, wide - narrow) / max(1, len(prompts) - few)

    def all_steps(replies: Decodes) -> float:
        steps = [*rows_in_flight(replies.lengths, replies.at_once)]
        waves = len(replies.lengths) / replies.at_once
        return first * waves + sum(wide - a_row * (replies.at_once - rows) for rows in steps[1:])

    return Seconds(all_steps(decodes), all_steps(decodes.longest()))


def rows_in_flight(lengths: Sequence[int], at_once: int) -> Iterator[int]:
    """How many rows each decode step has: a reply that ends gives its place to a prompt that waits."""
    waiting, running = [*lengths][::-1], list[int]()
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(waiting.pop())
        yield len(running)
        running = [left - 1 for left in running if left > 1]


def card_seconds(job: StageJob, cost: StageCost, size: Sizes, card: Card, processes: int = 1) -> Seconds | None:
    """By a card's published rates and the shares of them that are taken to be reached (`cards.py`).

    A decode step reads every weight and the keys and values of its rows once.
    """
    if cost.flops is None:
        return None
    trained = cost.flops / processes / (card.tflops * 1e12 * TRAINING_SHARE)
    longer = max(work.longer for work in cost.work)
    decoded = [_decoding(job, work, size, card) for work in cost.work]
    return Seconds(trained + sum(each[0] for each in decoded), trained * longer + sum(each[1] for each in decoded))


def _decoding(job: StageJob, work: Work, size: Sizes, card: Card) -> Seconds:
    if work.decodes is None:
        return Seconds(0.0, 0.0)
    prompt = sum(map(len, work.typical)) / max(len(work.typical), 1)

    def all_steps(replies: Decodes) -> float:
        steps = [*rows_in_flight(replies.lengths, replies.at_once)]
        cached = (prompt + sum(replies.lengths) / len(replies.lengths) / 2) * size.kv_bytes
        read = len(steps) * size.parameters * BYTES[job.dtype] + sum(steps) * cached
        return (work.times or 0) * read / (card.bandwidth * 1e9 * DECODING_SHARE)

    return Seconds(all_steps(work.decodes), all_steps(work.decodes.longest()))
