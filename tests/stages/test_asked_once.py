"""What one process asks for all, with the others made up; `test_reward_processes.py` has real ones."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from preftune.errors import UserError
from preftune.stages.ppo.rewards import RewardSource, text_source
from preftune.stages.processes import Processes
from preftune.stages.scorers.replies import Replies

from ..eval.chat_server import ChatServer

FIRST = Replies(["p", "p"], ["one", "three"], {"answer": [1, 2]}, rows=[0, 0])
SECOND = Replies(["q"], ["seven!!"], {"answer": [3], "note": ["x"]}, rows=[4])


@dataclass(frozen=True)
class Made(Processes):
    """One of two processes, that asks for both where it is the first; `all` is what both have."""

    count: int = 2
    parts: tuple[Replies, ...] = (FIRST, SECOND)

    def gathered(self, found: list[Any]) -> list[Any]:
        assert found == [self.parts[self.rank]]
        return list(self.parts)

    def by_first(self, work: Any) -> Any:
        return work()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.checklist("W14")
def test_w14_the_first_process_asks_about_the_replies_of_all() -> None:
    with ChatServer(lambda body, n: (200, {}, [len(text) for text in body["completions"]])) as server:
        source = RewardSource("http", "remote", settings={"url": server.url})
        scores = [text_source(source, None, Made(rank)).scorer(mine) for rank, mine in enumerate((FIRST, SECOND))]
    assert scores == [[3.0, 5.0], [7.0]]
    told = {"prompts": ["p", "p", "q"], "completions": ["one", "three", "seven!!"],
            "columns": {"answer": [1, 2, 3], "note": [None, None, "x"]}}  # fmt: skip
    assert server.bodies == [told, told]


@pytest.mark.checklist("W14")
def test_w14_what_is_no_server_scores_its_own_replies_where_they_are() -> None:
    source = RewardSource("verifier", "length", settings={"check": "length", "unit": "characters", "max": 3})
    assert text_source(source, None, Made(1)).scorer(SECOND) == [0.0]
    assert text_source(source, None, Processes()).scorer(FIRST) == [1.0, 0.0]


@pytest.mark.checklist("W8")
def test_w08_the_firsts_error_is_told_to_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def broadcast(said: list[Any], src: int, group: Any) -> None:
        assert (src, group) == (0, "group")
        if told:
            said[:] = told
        told[:] = said

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)

    def fails() -> None:
        raise UserError("reward remote", "no score", "look at it")

    for rank, work in ((0, fails), (1, lambda: pytest.fail("the second does not ask"))):
        with pytest.raises(UserError, match="reward remote: no score; look at it"):
            Processes(rank, 2, "group").by_first(work)
    told.clear()
    assert [Processes(rank, 2, "group").by_first(lambda: "found") for rank in (0, 1)] == ["found", "found"]
