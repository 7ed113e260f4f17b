"""Replies that are to be scored by what they say, and what becomes of one that a source has no score for."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

from ...data.rows import Message
from ...errors import UserError

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

PromptText = str | list[Message]
"""A prompt as the data have it: text, or messages."""
OnFailure = Literal["stop", "skip"] | float
"""What becomes of a reply that a source fails to score: the stage stops; the reply has no score of this source; or it
gets that number."""

LARGEST = 3.4e38
"""Scores are fp32."""
_SHOWN = 60


@dataclass(frozen=True)
class Replies:
    """Replies to prompts, one of each for every element.

    prompts: as the data had them. texts: the replies without special tokens. columns: every other column of the data,
    a list with an element a reply. prompt_ids, reply_ids: token ids, EOS included where it was reached; empty where
    nothing was tokenised. rows: places of the prompts in the data, from 0, for messages.
    """

    prompts: Sequence[PromptText]
    texts: Sequence[str]
    columns: Mapping[str, Sequence[object]] = field(default_factory=dict)
    prompt_ids: Sequence[Sequence[int]] = ()
    reply_ids: Sequence[Sequence[int]] = ()
    rows: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def completions(self) -> list[PromptText]:
        """In the prompts' own form: text, or a list with one assistant message."""
        return [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(self.prompts, self.texts, strict=True)
        ]

    def row(self, place: int) -> dict[str, object]:
        """The columns of one reply."""
        return {name: values[place] for name, values in self.columns.items()}

    def take(self, places: Sequence[int]) -> "Replies":
        """Those at the given places, in that order."""

        def some(values: Sequence[_T]) -> Sequence[_T]:
            return [values[place] for place in places] if len(values) else values

        columns = {name: some(values) for name, values in self.columns.items()}
        ids = some(self.prompt_ids), some(self.reply_ids)
        return Replies(some(self.prompts), some(self.texts), columns, *ids, rows=some(self.rows))

    @classmethod
    def joined(cls, parts: "Sequence[Replies]") -> "Replies":
        """All of them, one part after the other; None where a part has no such column."""

        def every(values: Iterable[Sequence[_T]]) -> list[_T]:
            return [each for part in values for each in part]

        names = dict.fromkeys(name for part in parts for name in part.columns)
        return cls(
            every(part.prompts for part in parts),
            every(part.texts for part in parts),
            {name: every(part.columns.get(name, [None] * len(part)) for part in parts) for name in names},
            every(part.prompt_ids for part in parts),
            every(part.reply_ids for part in parts),
            every(part.rows for part in parts),
        )

    def named(self, place: int) -> str:
        """A reply for a message: "prompt 3 ('Add 2 and ...'), reply 'It is 4'"."""
        prompt = self.prompts[place]
        said = prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) if prompt else ""
        number = f" {self.rows[place] + 1}" if len(self.rows) else ""
        return f"prompt{number} ({_short(said)}), reply {_short(self.texts[place])}"


class TextScorer(Protocol):
    """Scores replies by their text and the data's columns; needs no model of the run's."""

    def __call__(self, replies: Replies) -> list[float]:
        """One score a reply, finite, or NaN where the source does not apply to it."""
        ...


class Failures:
    """What a source's failures of one batch come to.

    Args:
        where: the source's place, for errors.
        on_failure: as the recipe says.
    """

    def __init__(self, where: str, on_failure: OnFailure = "stop") -> None:
        self.where, self.on_failure = where, on_failure

    def stop_at(self, replies: Replies, place: int, why: str, remedy: str) -> None:
        """Raise the error of one reply, where that is what the recipe wants."""
        if self.on_failure == "stop":
            raise UserError(self.where, f"{replies.named(place)}: {why}", remedy)

    def settled(
        self, replies: Replies, scores: Sequence[float | None], why: Mapping[int, str], remedy: str
    ) -> list[float]:
        """The scores, with the recipe's word in place of those that failed.

        Args:
            scores: of all replies; what stands at a failed place is not looked at.
            why: place of each reply that failed -> what is wrong, in words.

        Raises:
            UserError: one failed and the recipe wants to stop there; or all of them did, whatever it says: a source
                that scores nothing teaches nothing.
        """
        if not why:
            return [math.nan if each is None else each for each in scores]
        first = min(why)
        self.stop_at(replies, first, why[first], remedy)
        if len(why) == len(replies):
            said = f"none of {len(replies)} replies has a score; {replies.named(first)}: {why[first]}"
            raise UserError(self.where, said, remedy)
        filled = math.nan if self.on_failure == "skip" else float(self.on_failure)
        meant = "have no score of it" if self.on_failure == "skip" else f"count as {filled:g}"
        logger.warning(
            "%s: %d of %d replies failed and %s; %s: %s",
            self.where, len(why), len(replies), meant, replies.named(first), why[first],
        )  # fmt: skip
        return [filled if place in why else math.nan if each is None else each for place, each in enumerate(scores)]


def wrong_score(score: object) -> str | None:
    """What is wrong with a score that came from outside, in words; None: it is a finite number."""
    if isinstance(score, bool) or not isinstance(score, int | float):
        shown = repr(score)
        return f"the score is {shown if len(shown) <= 40 else f'a {type(score).__name__}'}, expected a number"
    # an integer beyond all floats is not converted
    return None if -LARGEST <= score <= LARGEST else f"the score is {str(score)[:40]}, expected a finite number"


def filled_in(text: str, columns: Mapping[str, object], harmless: Callable[[str], str]) -> str:
    """A text with `{column}` as that column of the row says; other braces stay."""
    for name, value in columns.items():
        text = text.replace(f"{{{name}}}", harmless(str(value)))
    return text


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "...")
