"""Comparisons of two replies that others collected, as their tools write them.

A tool's format is one file beside this one with a function that reads a row as a `Comparison`, and its record in
`comparisons.py`. `eval winrate --annotations` counts them; as a stage's data the preferred reply is the chosen one.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

from ..errors import UserError
from ..values import is_number
from .rows import Message, RawRow, Unusable
from .spec import RowKind

NO_VERDICT = "a comparison without a verdict"
NO_PREFERENCE = "a tie of two replies"
NO_REPLIES = "a verdict without the two replies as text"


@dataclass(frozen=True)
class Comparison:
    """One judgement of two models' replies to one prompt.

    Attributes:
        prompt: what judgements of one prompt share.
        models: the names of the first and the second; None where the row does not say.
        preference: for the second, in [0, 1]: 1 it is better, 0 the first is; None: there is no verdict.
        talks: the conversations with the first's and the second's replies; None where they do not stand there as text.
    """

    prompt: Hashable
    models: tuple[str | None, str | None]
    preference: float | None
    talks: tuple[list[Message], list[Message]] | None = None

    def lengths(self) -> tuple[int, int] | None:
        """Characters that each model said; None where its replies do not stand there."""
        if self.talks is None:
            return None
        first, second = (
            sum(len(turn["content"]) for turn in talk if turn["role"] == "assistant") for talk in self.talks
        )
        return first, second


@dataclass(frozen=True)
class ComparedFormat:
    """A format of comparisons.

    Attributes:
        recognises: (raw row, kind) -> whether the row is of this format; the kind does not matter.
        read: (raw row, origin) -> the comparison. Raises UserError where a field holds something wrong.
        fields: what of the row a comparison holds; everything else stays beside it.
        baseline_first: whether the first model is the one that all others are compared with.
    """

    name: str
    recognises: Callable[[RawRow, RowKind | None], bool]
    read: Callable[[RawRow, str], Comparison]
    fields: frozenset[str]
    baseline_first: bool = False

    def as_ours(self, raw: RawRow, kind: RowKind, origin: str) -> RawRow:
        """The row with the preferred conversation as `chosen` and the other one as `rejected`; for prompts no verdict
        is needed.

        Raises:
            UserError: a field holds something wrong.
            Unusable: there is no verdict, or none for either reply, or the replies do not stand there.
        """
        found = self.read(raw, origin)
        if found.talks is None:
            raise Unusable(NO_REPLIES)
        first, second = found.talks
        rest = {name: value for name, value in raw.items() if name not in self.fields}
        if kind == "prompt":
            return rest | {"messages": first}
        if found.preference is None:
            raise Unusable(NO_VERDICT)
        if found.preference == 0.5:
            raise Unusable(NO_PREFERENCE)
        chosen, rejected = (second, first) if found.preference > 0.5 else (first, second)
        return rest | {"chosen": chosen, "rejected": rejected}


def said_nothing(value: object) -> bool:
    """Whether a field for a verdict holds none: null, NaN, an empty text, or a tool's word for a failure."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "error", "nan", "null", "none", "n/a")
    return value is None or (is_number(value) and math.isnan(value))


def read_name(raw: RawRow, field: str, origin: str) -> str | None:
    """A model's name, or None where the row has none."""
    value = raw.get(field)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise UserError(origin, f"{field} is {value!r}, expected a model's name", "correct the row")
    return value


def read_id(raw: RawRow, names: tuple[str, ...], otherwise: Hashable) -> Hashable:
    """The first of these fields that holds an id: a text or a whole number."""
    values = (raw.get(name) for name in names)
    usable = (value for value in values if isinstance(value, str | int) and not isinstance(value, bool) and value != "")
    return next(usable, otherwise)


def verdict(value: object, words: dict[str, float], origin: str, field: str) -> float | None:
    """The preference that a word stands for; None where it says nothing.

    Raises:
        UserError: it is another word.
    """
    if said_nothing(value):
        return None
    found = words.get(value.strip().lower()) if isinstance(value, str) else None
    if found is None:
        raise UserError(origin, f"{field} is {value!r}, expected one of {', '.join(words)}", "correct the row")
    return found


def both_orders(first: float | None, second: float | None) -> float | None:
    """One model's preference from two games in which the places were changed; None where either has no verdict, since
    one order alone carries the judge's favour for a place."""
    return None if first is None or second is None else (first + second) / 2


def has_fields(*groups: frozenset[str]) -> Callable[[RawRow, RowKind | None], bool]:
    """Recognises rows that have all fields of one of the groups."""
    return partial(_has_fields, groups)


def _has_fields(groups: tuple[frozenset[str], ...], raw: RawRow, kind: RowKind | None) -> bool:
    del kind
    return any(raw.keys() >= group for group in groups)
