"""One evaluation in several processes: each does a share of the rows, and all of them have what all have found.

Every process runs the whole evaluation, in step with the others. What costs time is divided by rows (`shared_rows`):
forwards by whole batches, so that scores of the same replies are the same bits; replies, which are drawn together with
whoever is in flight, by neighbouring prompts, so that in 16 bits some may come out otherwise, as in other batches.
What is to happen once, as asking an endpoint or looking at a file that another one writes, the first process does for
all (`by_first`). Outside of `together` there is one process, and both are plain calls.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch

from .. import stopping
from ..errors import UserError
from ..progress import meter, silence
from ..stopping import Stopped

_T = TypeVar("_T")

_FOREVER = timedelta(days=365)
"""How long processes wait for each other: an endpoint may take hours to answer the first one. The launcher ends them
all when one of them fails."""


class _Processes:
    """Those of this evaluation, and this one's place among them."""

    rank: int = 0
    count: int = 1
    group: Any = None


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return _Processes.rank == 0


@contextmanager
def together() -> Generator[None]:
    """Within it the processes that a launcher has started do one evaluation among them. All of them enter and leave."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if state.num_processes > 1:
        # lists of numbers, on a GPU too: nothing of it needs the card's memory
        group = torch.distributed.new_group(backend="gloo", timeout=_FOREVER)
        _Processes.rank, _Processes.count, _Processes.group = state.process_index, state.num_processes, group
    silence(not is_first())
    try:
        yield
    finally:
        silence(False)
        _Processes.rank, _Processes.count, _Processes.group = 0, 1, None


def shared_rows(
    label: str,
    rows: int,
    work: Callable[[Sequence[int], Callable[[int], None]], list[_T]],
    batches: Iterable[Sequence[int]] | None = None,
) -> list[_T]:
    """What `work` finds for each of so many rows, in their order, with a meter of that label.

    Args:
        work: (the places of some rows, whom to tell how many are done) -> a result for each of them.
        batches: in which `work` computes the rows: a process does whole ones, so that a row's numbers are the same bits
            whoever does it. None: each does as many rows, and neighbours stay together.

    Raises:
        UserError, Stopped: in every process, where one of them was raised in any.
    """
    count = _Processes.count
    if count == 1:
        with meter(label, rows) as done:
            return work(range(rows), done)
    shares = _shares(rows, count, batches)
    own = shares[_Processes.rank]
    with meter(f"{label}, in the first of {count} processes", len(own)) as done:
        parts = _from_all(lambda: work(own, done) if own else [])
    found = {
        place: each for share, part in zip(shares, parts, strict=True) for place, each in zip(share, part, strict=True)
    }
    return [found[place] for place in range(rows)]


def by_first(work: Callable[[], _T]) -> _T:
    """What `work` gives in the first process, in all of them.

    Raises:
        UserError, Stopped: in every process, where one of them was raised in the first.
    """
    if _Processes.count == 1:
        return work()
    found, wrong = _tried(work) if is_first() else (None, None)
    said: list[Any] = [(found, _told(wrong))]
    torch.distributed.broadcast_object_list(said, src=0, group=_Processes.group)
    if wrong is not None:
        raise wrong
    given, told = said[0]
    if told is not None:
        raise _error(told)
    return given


def _shares(rows: int, count: int, batches: Iterable[Sequence[int]] | None) -> list[Sequence[int]]:
    """The places of each process' rows; with fewer rows, or batches, than processes some have none."""
    if batches is not None:
        every = list(batches)
        return [[place for batch in every[rank::count] for place in batch] for rank in range(count)]
    bounds = [rows * rank // count for rank in range(count + 1)]
    return [range(start, end) for start, end in pairwise(bounds)]


def _from_all(work: Callable[[], list[_T]]) -> list[list[_T]]:
    """What `work` gives in each process, on all of them."""
    found, wrong = _tried(work)
    said: list[Any] = [None] * _Processes.count
    torch.distributed.all_gather_object(said, (found, _told(wrong)), group=_Processes.group)
    if wrong is not None:
        raise wrong
    for _, told in said:
        if told is not None:
            raise _error(told)
    return [each for each, _ in said]


def _tried(work: Callable[[], _T]) -> tuple[_T | None, UserError | Stopped | None]:
    """What it gives, or what the others must hear of before it is raised: else they would wait for this process.

    A signal is heard in here alone, for the same reason.
    """
    try:
        with stopping.interruptible():
            return work(), None
    except (UserError, Stopped) as error:
        return None, error


def _told(error: UserError | Stopped | None) -> tuple[Any, ...] | None:
    if isinstance(error, Stopped):
        return Stopped, error.number, str(error)
    return None if error is None else (UserError, error.where, error.problem, error.remedy)


def _error(told: tuple[Any, ...]) -> UserError | Stopped:
    kind, *words = told
    return kind(*words)
