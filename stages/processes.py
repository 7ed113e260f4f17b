"""Several processes of one stage: how they share rows, and what one of them does for all."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from .. import stopping
from ..errors import UserError

_T = TypeVar("_T")
_LONG = timedelta(days=7)
"""Processes wait for each other; the launcher ends them all when one of them fails."""


@dataclass(frozen=True)
class Processes:
    """Those of this stage, and this one's place among them."""

    rank: int = 0
    count: int = 1
    group: Any = None

    @classmethod
    def all(cls) -> "Processes":
        """Those that a launcher has started, or this one alone. All of them call it, as they would a collective."""
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        if state.num_processes == 1:
            return cls()
        group = torch.distributed.new_group(backend="gloo", timeout=_LONG)
        return cls(state.process_index, state.num_processes, group)

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
        """What the first finds, in all of them.

        Raises:
            UserError: in every process, where it was raised in the first: none is left to wait for the others.
        """
        if self.count == 1:
            return work()
        wrong: UserError | None = None
        said: list[Any] = [None, None]
        if self.rank == 0:
            try:
                said[0] = work()
            except UserError as error:
                wrong = error
                said[1] = (error.where, error.problem, error.remedy)
        torch.distributed.broadcast_object_list(said, src=0, group=self.group)
        if said[1] is not None:
            raise wrong or UserError(*said[1])
        return said[0]

    def asked_to_stop(self) -> int | None:
        """The signal that asked any of them to stop; the same answer in all."""
        return max(self.gathered([stopping.requested() or 0])) or None
