"""Evaluation prompts that stand in training data: what is measured on them is memory, not skill."""

from array import array
from collections.abc import Iterable, Mapping

import numpy as np

from .report import Tally
from .rows import Row
from .seen import number_of
from .spec import DataSpec
from .split import prompt_position


class PromptSet:
    """The prompts of one way of reading data, in 8 bytes each.

    Args:
        spec: which prompts are held out: a stage does not train on those.
        named: keep where each comes from; for the prompts of an evaluation, which are those held out if any are.

    Attributes:
        rows: how many there are.
    """

    def __init__(self, spec: DataSpec, *, named: bool = False) -> None:
        self._seed, self._held_out, self._named = spec.seed, spec.held_out, named
        self.rows = 0
        self._keys, self._trained = array("Q"), array("Q")
        self._origins: list[str] = []

    @classmethod
    def of(cls, rows: Iterable[Row], spec: DataSpec) -> "PromptSet":
        """From the rows that were read for `spec`, with their places."""
        made = cls(spec, named=True)
        for row in rows:
            made.add(row)
        return made

    def add(self, row: Row) -> None:
        number = number_of(row.key)
        self.rows += 1
        held = self._held_out > 0 and prompt_position(row, self._seed) < self._held_out
        if self._named and held == (self._held_out > 0):
            self._keys.append(number)
            self._origins.append(row.origin)
        if not held:
            self._trained.append(number)

    @property
    def trained_rows(self) -> int:
        """How many of the rows are not held out."""
        return len(self._trained)

    def __len__(self) -> int:
        """Of named ones: how many are evaluated on."""
        return len(self._origins)

    def trained_in(self, others: "Iterable[PromptSet]") -> Tally:
        """Those of these prompts, with their places, that are trained on in one of the others."""
        trained = np.concatenate([np.frombuffer(each._trained, np.uint64) for each in others])
        tally = Tally()
        for place in np.flatnonzero(np.isin(np.frombuffer(self._keys, np.uint64), trained)):
            tally.add(self._origins[place])
        return tally


def overlaps(evaluated: PromptSet, trained: Mapping[str, Iterable[PromptSet]]) -> dict[str, Tally]:
    """By the name of the training data: the evaluation rows whose prompt is trained on, where there are any."""
    found = {name: evaluated.trained_in(list(sets)) for name, sets in trained.items()}
    return {name: tally for name, tally in found.items() if tally.count}


def overlap_words(name: str, tally: Tally, evaluated: PromptSet) -> str:
    """As a line for people."""
    total = len(evaluated)
    return f"{tally.count} of {total} prompts stand in the training data {name} as well ({', '.join(tally.origins)})"
