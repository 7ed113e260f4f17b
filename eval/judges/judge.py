"""What a judge is: anything that scores replies, or compares two policies' replies to the same prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

from transformers import PreTrainedTokenizerBase

from ...models.adapters import AdapterSet
from ..samples import Sample
from ..shared import by_first

_T = TypeVar("_T")


class Judge(Protocol):
    """Anything with a name that turns samples into scores; more is better."""

    @property
    def name(self) -> str: ...

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """One score per sample, in order; nan where the judge has none."""
        ...


@runtime_checkable
class PairJudge(Protocol):
    """Anything with a name that compares two policies' replies to the same prompts."""

    @property
    def name(self) -> str: ...

    def compare(self, policy: Sequence[Sample], other: Sequence[Sample]) -> list[float]:
        """What the first policy gets on each prompt: 1 win, 0.5 tie, 0 loss, or between; nan without a verdict."""
        ...


@runtime_checkable
class CheckingJudge(Protocol):
    """A judge that looks at all replies before it is asked about any."""

    def check(self, samples: Mapping[str, Sequence[Sample]]) -> None:
        """Raises UserError where it has nothing to say of these samples, policy -> its replies."""
        ...


@runtime_checkable
class PlacingJudge(Protocol):
    """A judge that reads two replies at once, one of them first."""

    @property
    def first_place(self) -> tuple[float, int]:
        """(share of verdicts that the first place won, number of verdicts)."""
        ...


@runtime_checkable
class SharingJudge(Protocol):
    """A judge whose rows the processes of an evaluation share, so that all of them ask it (see `shared.py`)."""

    shares_rows: ClassVar[bool]


def asked(judge: Judge | PairJudge, ask: Callable[[], _T]) -> _T:
    """What `ask` hears from a judge: by all processes where they share its rows, else by the first alone, once."""
    return ask() if isinstance(judge, SharingJudge) else by_first(ask)


@dataclass(frozen=True)
class JudgePlan:
    """A judge that was checked and not opened yet: `open(adapters, tokenizer)` makes it.

    `try_out()` looks at what takes longer, and raises a UserError: before anything trains it should be known.
    """

    name: str
    open: Callable[[AdapterSet, PreTrainedTokenizerBase], Judge | PairJudge]
    try_out: Callable[[], None] = lambda: None
