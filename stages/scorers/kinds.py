"""The kinds of what scores one reply, one record each: a recipe's `reward:` and its `judges:` read them.

Imports no torch. A source is a mapping (an *entry*) with a `kind`, the fields of that kind and an optional `name`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .http_formats import FORMATS

Entry = Mapping[str, Any]
_SERVER = ("api_key_env", "concurrency", "retries", "timeout", "cache")
_IDLE = ("concurrency", "retries", "timeout", "cache", "price_per_million", "batch_size")
"""How a source is asked, which changes no score."""

_VERIFIER = (
    *("check", "column", "value", "extract", "ignore_case", "ignore_punctuation", "tolerance", "relative_tolerance"),
    *("percent", "decimal", "pattern", "full", "schema", "fenced", "unit", "min", "max", "values", "tags"),
)


@dataclass(frozen=True)
class ScorerKind:
    """What a recipe may say of one kind of source.

    Attributes:
        name: its `kind` in a recipe.
        fields: what an entry may have besides `kind` and `name`.
        called: the name of one whose entry has none.
        bounds: the lowest and the highest score that it can give.
        columns: the data's columns that it reads in every row; None: it says so itself.
    """

    name: str
    fields: tuple[str, ...]
    called: Callable[[Entry], object]
    bounds: tuple[float, float] = (-math.inf, math.inf)
    columns: Callable[[Entry], list[str]] = lambda entry: []

    def counted(self, entry: Entry) -> dict[str, Any]:
        """What of an entry can change a score."""
        return {key: value for key, value in entry.items() if key not in _IDLE}


def _column(key: str) -> Callable[[Entry], list[str]]:
    return lambda entry: [entry[key]] if isinstance(entry.get(key), str) else []


KINDS: dict[str, ScorerKind] = {
    kind.name: kind
    for kind in (
        ScorerKind("reward", ("stage", "adapter"), lambda entry: entry.get("stage", "reward")),
        ScorerKind("model", ("model", "batch_size"), lambda entry: entry.get("model")),
        ScorerKind("function", ("function",), lambda entry: str(entry.get("function")).partition(":")[2]),
        ScorerKind("verifier", _VERIFIER, lambda entry: entry.get("check"), (0.0, 1.0), _column("column")),
        ScorerKind("rubric", ("checks",), lambda entry: "rubric", (0.0, 1.0)),
        ScorerKind(
            "http",
            ("url", "format", "column", "batch_size", *_SERVER),
            lambda entry: entry.get("url"),
            columns=_column("column"),
        ),
        ScorerKind(
            "endpoint",
            (
                *("url", "model", "mode", "criteria", "criteria_column", "prompt", "parameters", *_SERVER),
                "price_per_million",
            ),
            lambda entry: entry.get("model"),
            (1.0, 10.0),
            _column("criteria_column"),
        ),
    )
}

IMPLIED = {"stage": "reward", "model": "model", "function": "function"}
"""A field that says by itself, in `reward:`, which kind is meant."""

HTTP_FORMATS = tuple(FORMATS)


def entry_kind(entry: Entry) -> str | None:
    """The kind that an entry has or implies; None where it does neither."""
    named = entry.get("kind")
    if named is not None:
        return str(named)
    implied = [kind for field, kind in IMPLIED.items() if entry.get(field) is not None]
    return implied[0] if len(implied) == 1 else None


def reward_name(entry: Entry) -> str:
    """What a source of a reward is called: as the entry says, or by its kind."""
    kind = KINDS.get(entry_kind(entry) or "")
    return str(entry.get("name") or (None if kind is None else kind.called(entry)))
