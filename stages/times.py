"""How long a stage will take: by what its steps took here, or by the published figures of a GPU."""

from ..models.calibration import Timed, look, rollout, train
from ..models.cards import DECODING_SHARE, TRAINING_SHARE, Card
from ..models.cost import BYTES, Sizes
from .costs import StageCost, Work
from .job import StageJob

_DECODED = (4, 12)
"""New tokens of the two rollouts whose difference tells a decode step from the prompts' forward."""


def measured_seconds(cost: StageCost, timed: Timed, limit: float) -> float | None:
    """Seconds of a stage's training loop on the machine that `timed` holds its models on; None: how often is unknown.

    Args:
        limit: at most about so many seconds are spent on measuring.
    """
    if any(work.times is None for work in cost.work):
        return None
    each = limit / sum(2 if work.decodes else 1 for work in cost.work)
    return sum((work.times or 0) * _seconds(work, timed, each) for work in cost.work if work.phase != "evaluation")


def _seconds(work: Work, timed: Timed, limit: float) -> float:
    rows = work.typical
    if work.decodes is not None:
        _, new_tokens = work.decodes
        few, more = (timed.seconds(rollout(rows, count), limit) for count in _DECODED)
        step = max(0.0, (more - few) / (_DECODED[1] - _DECODED[0]))
        return few + step * (new_tokens - _DECODED[0])
    if work.step in ("forward", "prefill"):
        return timed.seconds(look(rows, work.scored), limit)
    both = work.step == "policy and reference"
    scored = 0 if work.step == "score" else work.scored
    return timed.seconds(train(rows, scored, reference=both, step=1 / work.passes), limit)


def card_seconds(job: StageJob, cost: StageCost, size: Sizes, card: Card, processes: int = 1) -> float | None:
    """Seconds by a card's published rates and the shares of them that are taken to be reached (`cards.py`).

    A decode step reads every weight and the keys and values of its rows once.
    """
    if cost.flops is None:
        return None
    seconds = cost.flops / processes / (card.tflops * 1e12 * TRAINING_SHARE)
    for work in cost.work:
        if work.decodes is not None:
            rows, new_tokens = work.decodes
            length = sum(map(len, work.typical)) / max(len(work.typical), 1) + new_tokens / 2
            read = size.parameters * BYTES[job.dtype] + rows * length * size.kv_bytes
            steps = (work.times or 0) * new_tokens
            seconds += steps * read / (card.bandwidth * 1e9 * DECODING_SHARE)
    return seconds
