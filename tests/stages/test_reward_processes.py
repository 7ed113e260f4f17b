"""Servers as rewards in two real processes: each reply is asked about once, and a failure is everybody's."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from preftune.stages.scorers.replies import Replies

from ..eval.chat_server import ChatServer
from .asking_worker import asked, replies
from .test_ppo_distributed import CONFIG

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("asking_worker.py")


class Outcome(NamedTuple):
    """found: what each of two processes got. bodies: what the server was asked, by the path."""

    found: list[dict[str, Any]]
    bodies: dict[str, list[dict[str, Any]]]


def respond(body: dict[str, Any], n: int) -> Any:
    """A reply's length, and no number for one that is bad; `server.paths` says whether that is asked."""
    del n
    return 200, {}, {"scores": [len(text) for text in body["completions"]]}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("asking")
    (folder / "config.yaml").write_text(CONFIG)
    with ChatServer(respond) as server:
        server.respond = lambda body, n: (
            (200, {}, {"scores": [None if text == "bad" else len(text) for text in body["completions"]]})
            if server.paths[n - 1].endswith("refusing")
            else respond(body, n)
        )
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "config.yaml")]
        command += ["--multi_gpu", str(WORKER), str(folder), server.url]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, timeout=300)
        bodies: dict[str, list[dict[str, Any]]] = {}
        for path, body in zip(server.paths, server.bodies, strict=True):
            bodies.setdefault(path.rpartition("/")[2], []).append(body)
    found = [json.loads((folder / f"found{place}.json").read_text(encoding="utf-8")) for place in range(2)]
    return Outcome(found, bodies)


def whole() -> Replies:
    return Replies.joined([replies(place, 2) for place in range(2)])


@pytest.mark.checklist("W14")
def test_w14_two_processes_get_what_one_gets_and_each_reply_is_asked_about_once(outcome: Outcome) -> None:
    lengths = [float(len(text)) for text in whole().texts]
    for name in ("scores", "kept", "kept before"):
        assert [*outcome.found[0][name], *outcome.found[1][name]] == lengths
    assert outcome.found[0]["nothing"] == lengths[:4] and outcome.found[1]["nothing"] == []
    # eight replies, none of them equal in text and columns: asked in memory, then kept on disk, then not asked again
    told: Counter[str] = Counter()
    for body in outcome.bodies["lengths"]:
        for place, text in enumerate(body["completions"]):
            told[json.dumps([text, {name: values[place] for name, values in body["columns"].items()}])] += 1
    # the last four are those of the first process alone, without the other's column
    assert sorted(told.values(), reverse=True) == [2] * 8 + [1] * 4
    sizes = [len(body["completions"]) for body in outcome.bodies["lengths"]]
    assert sorted(sizes[:3]) == [2, 3, 3] and sizes[3] == 8


@pytest.mark.checklist("W8")
def test_w08_a_failure_in_one_process_is_the_same_in_all(outcome: Outcome) -> None:
    first, second = outcome.found
    assert first["stop"] == second["stop"] and "\n" not in first["stop"]
    assert first["stop"].startswith("reward remote: prompt 8 ('q'), reply 'bad': ")
    assert None not in first["skip"] and second["skip"][3] is None and None not in second["skip"][:3]
    # one of the two has none: not the whole of what was asked
    assert (first["number"], second["number"]) == ([4.0], [-1.0])


@pytest.mark.checklist("W14")
def test_w14_one_process_asks_the_same(outcome: Outcome) -> None:
    with ChatServer(respond) as server:
        assert asked(f"{server.url}/lengths", None, None, whole()) == [float(len(text)) for text in whole().texts]
    assert sorted(map(json.dumps, server.bodies)) == sorted(map(json.dumps, outcome.bodies["lengths"][:3]))
