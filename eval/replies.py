"""What is true of a policy's replies whoever judges them: how long they are, whether they end, how they repeat.

A metric is declared here and nowhere else: from its record in `REPLY_METRICS` come its columns in results.json, its
place in the terminal's table of replies and in the report's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .statistics.intervals import mean_se

if TYPE_CHECKING:
    from .samples import Sample

REPETITION_GRAM = 4


@dataclass(frozen=True)
class ReplyMetric:
    """One number of a policy's replies.

    Attributes:
        name: its column in results.json; that of its standard error is `{name}_se`.
        measure: all replies of a policy -> the number and its standard error, which is nan where there is none.
        heading: of its column in the report's table of replies; None: it is not shown there.
        share: whether it is a fraction of 1, which the report shows in per cent.
        digits: decimals in the report.
        legend: what it counts, in a few words, under the terminal's table; None where the name says it.
        note: a sentence on it under the report's table.
    """

    name: str
    measure: Callable[[Sequence["Sample"]], tuple[float, float]]
    heading: str | None = None
    share: bool = False
    digits: int = 1
    legend: str | None = None
    note: str | None = None

    @property
    def error(self) -> str:
        """The column of its standard error."""
        return f"{self.name}_se"


def mean_over_replies(of: Callable[["Sample"], float]) -> Callable[[Sequence["Sample"]], tuple[float, float]]:
    """The measure that is the mean of one number per reply; nan's error for fewer than two replies."""
    return lambda replies: mean_se([of(reply) for reply in replies])


def repeated_share(tokens: Sequence[int], gram: int = REPETITION_GRAM) -> float:
    """seq-rep-n of one reply: the share of its n-grams that stand earlier in it too, in [0, 1).

    1 - |different n-grams| / |n-grams| (Welleck et al., arXiv 1908.04319, section 5). A reply shorter than n tokens has
    no n-gram, repeats nothing, and counts as 0.
    """
    grams = [tuple(tokens[place : place + gram]) for place in range(len(tokens) - gram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


REPLY_METRICS = (
    # tokens of a reply, its EOS included
    ReplyMetric(
        "length", mean_over_replies(lambda reply: len(reply.tokens)), "length, tokens", legend="length in tokens"
    ),
    ReplyMetric(
        "eos_rate",
        mean_over_replies(lambda reply: float(reply.finished)),
        "ends by itself",
        share=True,
        note="“Ends by itself” is the share of replies that reach the end-of-sequence token within the limit.",
    ),
    ReplyMetric(
        "repetition",
        mean_over_replies(lambda reply: repeated_share(reply.tokens)),
        "repetition",
        share=True,
        legend=f"repetition of {REPETITION_GRAM}-grams",
        note=f"Repetition is the share of a reply's token {REPETITION_GRAM}-grams that stand earlier in it.",
    ),
)

KL_COLUMNS = ("kl", "kl_se", "kl_per_token")
REPLY_COLUMNS = (*(column for each in REPLY_METRICS for column in (each.name, each.error)), *KL_COLUMNS)
"""The columns of results.json that are the same for every judge."""
REPLY_LEGEND = ", ".join([*(each.legend for each in REPLY_METRICS if each.legend), "KL to the reference in nats"])


def measure_replies(replies: Sequence["Sample"]) -> dict[str, float]:
    """Every metric of one policy's replies, with its standard error, by their columns."""
    measured: dict[str, float] = {}
    for metric in REPLY_METRICS:
        measured[metric.name], measured[metric.error] = metric.measure(replies)
    return measured
