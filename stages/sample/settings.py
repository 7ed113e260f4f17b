"""The sampling stage's settings, typed once, and which rows they give. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from ...data.spec import RowKind
from ..serving.settings import PlaceSettings

Positive = Annotated[int, Ge(1)]
Keep = Literal["best_worst", "best", "all", "threshold"]

BEST_WORST, BEST, ALL, THRESHOLD = "best_worst", "best", "all", "threshold"


@dataclass(kw_only=True)
class SampleSettings(PlaceSettings):
    """`n` replies to each prompt, scored, and which of them become rows.

    Best of n: Stiennon et al. 2020 (arXiv 2009.01325, appendix G.3); pairs of the best and the worst: Yuan et al. 2024
    (arXiv 2401.10020).
    """

    n: Positive = field(default=8, metadata={"help": "Replies drawn to each prompt."})
    keep: Keep = field(
        default="best_worst",
        metadata={
            "help": "best_worst: a pair a prompt. best: its best reply. threshold: every reply that scores at least "
            "threshold. all: every reply with its score."
        },
    )
    margin: Annotated[float, Ge(0)] = field(
        default=0.0, metadata={"help": "best_worst: a pair's scores differ by more than this."}
    )
    threshold: float | None = field(
        default=None, metadata={"help": "threshold: the least score kept. all: replies from it on are labelled good."}
    )
    unfinished: Literal["drop", "keep"] = field(
        default="drop", metadata={"help": "What becomes of replies that did not end within max_new_tokens."}
    )
    max_new_tokens: Positive = field(default=64, metadata={"help": "Longest reply, EOS included."})
    temperature: Annotated[float, Gt(0)] = field(default=1.0, metadata={"help": "Divides the logits."})
    top_k: Annotated[int, Ge(0)] = field(default=0, metadata={"help": "0: all tokens."})
    top_p: Annotated[float, Interval(gt=0, le=1)] = field(default=1.0, metadata={"help": "1: all tokens."})
    batch_size: Positive | None = field(
        default=None,
        metadata={
            "help": "Replies drawn at once on one device; None: 32 to 128 on a CPU, what memory holds on a GPU. No "
            "part of what is drawn."
        },
    )
    reward_combination: Literal["sum", "ensemble"] = field(
        default="sum", metadata={"help": "Weighted sum, or mean minus ensemble_penalty times std."}
    )
    ensemble_penalty: Annotated[float, Ge(0)] = field(default=1.0, metadata={"help": "Lambda of the ensemble."})


def gives_rows(values: Mapping[str, Any]) -> tuple[RowKind, ...]:
    """The kinds of rows that a sampling stage with these settings writes, as later stages may read them.

    Every reply (`all`) is a labelled one where a threshold says which are good, and else for people to look at.
    """
    match values["keep"]:
        case "best_worst":
            return ("pair", "demo", "label", "prompt")
        case "best" | "threshold":
            return ("demo", "prompt")
        case _:
            return () if values["threshold"] is None else ("label",)
