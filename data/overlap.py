"""Evaluation prompts that stand in training data: what is measured on them is memory, not skill."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .report import Tally
from .rows import Row, prompt_key
from .spec import DataSpec
from .split import prompt_position


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one way of reading data.

    placed: (key, where it comes from) of every row. trained: the keys of those that a stage trains on; held-out prompts
    are not among them.
    """

    placed: list[tuple[str, str]]
    trained: frozenset[str]

    @classmethod
    def of(cls, rows: Iterable[Row], spec: DataSpec) -> "PromptSet":
        """From the rows that were read for `spec`."""
        placed, trained = [], set()
        for row in rows:
            key = prompt_key(row.prompt)
            placed.append((key, row.origin))
            if prompt_position(row, spec.seed) >= spec.held_out:
                trained.add(key)
        return cls(placed, frozenset(trained))


def overlaps(evaluated: PromptSet, trained: Mapping[str, Iterable[PromptSet]]) -> dict[str, Tally]:
    """By the name of the training data: the evaluation rows whose prompt is trained on, where there are any."""
    found: dict[str, Tally] = {}
    for name, sets in trained.items():
        keys = frozenset().union(*(each.trained for each in sets))
        for key, origin in evaluated.placed:
            if key in keys:
                found.setdefault(name, Tally()).add(origin)
    return found


def overlap_words(name: str, tally: Tally, evaluated: PromptSet) -> str:
    """As a line for people."""
    total = len(evaluated.placed)
    return f"{tally.count} of {total} prompts stand in the training data {name} as well ({', '.join(tally.origins)})"
