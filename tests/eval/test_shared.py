"""An evaluation's rows among several processes: threads here, real processes in `cli/test_shared_evaluation.py`."""

import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from preftune.errors import UserError
from preftune.eval import shared
from preftune.eval.judges.judge import asked
from preftune.eval.shared import by_first, is_first, shared_rows
from preftune.models.batching import token_batches
from preftune.stopping import Stopped


class Together:
    """As many threads as processes, each with a place of its own, and collectives among them."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.given = count, [None] * count
        self.barrier = threading.Barrier(count, timeout=20)
        self.here = threading.local()
        monkeypatch.setattr(shared, "_Processes", self.here)
        collectives = SimpleNamespace(all_gather_object=self.gather, broadcast_object_list=self.broadcast)
        monkeypatch.setattr(shared, "torch", SimpleNamespace(distributed=collectives))
        # what a process hears of signals is one for all of its threads
        monkeypatch.setattr(shared, "stopping", SimpleNamespace(interruptible=nullcontext))

    def gather(self, everybodys: list[Any], own: Any, group: Any) -> None:
        self.given[self.here.rank] = own
        self.barrier.wait()
        everybodys[:] = self.given
        self.barrier.wait()

    def broadcast(self, own: list[Any], src: int, group: Any) -> None:
        everybodys = [None] * self.count
        self.gather(everybodys, own[0], group)
        own[0] = everybodys[src]

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What each of them gives, or raises."""
        found: list[Any] = [None] * self.count

        def one(rank: int) -> None:
            self.here.rank, self.here.count, self.here.group = rank, self.count, None
            try:
                found[rank] = work(rank)
            except BaseException as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(30)
        return found


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Together:
    return Together(3, monkeypatch)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("rows", [8, 3, 2, 1, 0])
def test_every_row_is_done_once_and_all_stand_in_their_order(three: Together, rows: int, batched: bool) -> None:
    done: list[list[int]] = [[], [], []]
    lengths = [5, 9, 1, 9, 2, 7, 7, 3][:rows]

    def work(rank: int) -> list[int]:
        def squares(places, told) -> list[int]:
            done[rank] += places
            told(len(places))
            return [place * place for place in places]

        return shared_rows("squares", rows, squares, token_batches(lengths, 20) if batched else None)

    assert three.run(work) == [[place * place for place in range(rows)]] * 3
    assert sorted(place for each in done for place in each) == list(range(rows))
    if not batched:  # neighbours stay together: replies to one prompt are drawn by one process
        assert [place for each in done for place in each] == list(range(rows))
        assert max(map(len, done)) - min(map(len, done)) <= 1
        return
    # what a process batches of its rows are whole batches of all rows: the same forwards, to the bit
    alone = [set(batch) for batch in token_batches(lengths, 20)]
    found = [{rows_[i] for i in batch} for rows_ in done for batch in token_batches([lengths[i] for i in rows_], 20)]
    assert len(found) == len(alone) and all(batch in alone for batch in found)


def test_a_mistake_or_a_signal_in_one_process_is_raised_in_all(three: Together) -> None:
    def failing(rank: int) -> Any:
        def work(places, told) -> list[int]:
            if rank == 1:
                raise UserError("there", "wrong", "put it right")
            return list(places)

        return shared_rows("rows", 6, work)

    def stopped(rank: int) -> Any:
        def work(places, told) -> list[int]:
            if rank == 2:
                raise Stopped(signal.SIGTERM)
            return list(places)

        return shared_rows("rows", 6, work)

    assert [str(each) for each in three.run(failing)] == ["there: wrong; put it right"] * 3
    found = three.run(stopped)
    assert [(type(each), each.number) for each in found] == [(Stopped, signal.SIGTERM)] * 3


def test_what_is_to_happen_once_happens_in_the_first_process(three: Together) -> None:
    happened: list[int] = []

    def once(rank: int) -> Any:
        return by_first(lambda: happened.append(rank) or "found")

    assert three.run(once) == ["found"] * 3 and happened == [0]
    assert three.run(lambda _: is_first()) == [True, False, False]

    def wrong() -> None:
        raise UserError("there", "wrong", "put it right")

    assert [str(each) for each in three.run(lambda _: by_first(wrong))] == ["there: wrong; put it right"] * 3


def test_a_judge_is_asked_once_unless_it_shares_its_rows(three: Together) -> None:
    heard: list[str] = []
    far: Any = SimpleNamespace(name="far")
    ours: Any = SimpleNamespace(name="ours", shares_rows=True)
    three.run(lambda _: [asked(judge, lambda judge=judge: heard.append(judge.name)) for judge in (far, ours)])
    assert sorted(heard) == ["far", "ours", "ours", "ours"]


def test_alone_nothing_is_divided() -> None:
    assert is_first() and by_first(lambda: 1) == 1
    assert shared_rows("rows", 3, lambda places, _: list(places), [[2], [1, 0]]) == [0, 1, 2]
