"""One sampling stage in several processes: each draws and scores a share of the prompts, the first writes."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from ... import stopping

_T = TypeVar("_T")
_LONG = timedelta(days=7)
"""Processes wait for each other; the launcher ends them all when one of them fails."""


@dataclass(frozen=True)
class Processes:
    """Those of this stage, and this one's place among them."""

    rank: int = 0
    count: int = 1
    group: Any = None

    def share(self, rows: int) -> range:
        """The places of this process' rows among so many; neighbours stay together."""
        return range(rows * self.rank // self.count, rows * (self.rank + 1) // self.count)

    def gathered(self, found: list[_T]) -> list[_T]:
        """What each found of its share, in the order of the rows, in all of them."""
        if self.count == 1:
            return found
        parts: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(parts, found, group=self.group)
        return [each for part in parts for each in part]

    def by_first(self, work: Callable[[], _T]) -> _T:
        """What the first finds, in all of them."""
        if self.count == 1:
            return work()
        said: list[Any] = [work() if self.rank == 0 else None]
        torch.distributed.broadcast_object_list(said, src=0, group=self.group)
        return said[0]

    def asked_to_stop(self) -> int | None:
        """The signal that asked any of them to stop; the same answer in all."""
        return max(self.gathered([stopping.requested() or 0])) or None


@contextmanager
def processes() -> Generator[Processes]:
    """Those that a launcher has started, or this one alone."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if state.num_processes == 1:
        yield Processes()
        return
    group = torch.distributed.new_group(backend="gloo", timeout=_LONG)
    yield Processes(state.process_index, state.num_processes, group)
