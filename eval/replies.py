"""What is true of a policy's replies whoever judges them: how long they are, whether they end, how they repeat."""

from collections.abc import Sequence
from dataclasses import dataclass

from .statistics.intervals import mean_se

REPETITION_GRAM = 4


@dataclass(frozen=True)
class ReplyStatistics:
    """Means over replies with their standard errors; an error is nan for fewer than two replies.

    Attributes:
        length, length_se: tokens of a reply, its EOS included.
        eos_rate, eos_rate_se: share of the replies that ended by themselves.
        repetition, repetition_se: of a reply's token 4-grams, the share that repeats (see `repeated_share`).
    """

    length: float
    length_se: float
    eos_rate: float
    eos_rate_se: float
    repetition: float
    repetition_se: float


def repeated_share(tokens: Sequence[int], gram: int = REPETITION_GRAM) -> float:
    """seq-rep-n of one reply: the share of its n-grams that stand earlier in it too, in [0, 1).

    1 - |different n-grams| / |n-grams| (Welleck et al., arXiv 1908.04319, section 5). A reply shorter than n tokens has
    no n-gram, repeats nothing, and counts as 0.
    """
    grams = [tuple(tokens[place : place + gram]) for place in range(len(tokens) - gram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def reply_statistics(replies: Sequence[Sequence[int]], finished: Sequence[bool]) -> ReplyStatistics:
    """The statistics of N replies.

    Args:
        replies: [N] token ids, EOS included where it was reached.
        finished: [N] whether the reply ended at EOS.
    """
    if len(replies) != len(finished):
        raise ValueError(f"{len(replies)} replies and {len(finished)} ends, expected as many")
    return ReplyStatistics(
        *mean_se([len(reply) for reply in replies]),
        *mean_se([float(end) for end in finished]),
        *mean_se([repeated_share(reply) for reply in replies]),
    )
