"""Stages whose reward is a server, in one process and in two: what is asked, what comes out, and how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..eval.chat_server import ChatServer

pytestmark = pytest.mark.slow

RECIPE = """\
name: t
model: {base: "random:llama", dtype: float32}
lora: {r: 2, alpha: 4}
checkpoints: {share: 0.1}
data:
  sums: {path: sums.jsonl}
stages:
  grpo:
    data: sums
    from: base
    num_generations: 2
    rollout_batch_size: 8
    total_episodes: 8
    max_new_tokens: 6
    reward: {kind: http, url: "URL", retries: 0, batch_size: 3}
  pairs:
    kind: sample
    data: sums
    from: base
    n: 3
    batch_size: 3
    keep: all
    max_new_tokens: 6
    reward: {kind: http, url: "URL", retries: 0, batch_size: 2}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    rows = [{"prompt": f"{place} + 1?", "answer": place + 1} for place in range(4)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(folder: Path, stage: str, name: str, *, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """One stage of the recipe in a run of that name, in so many processes."""
    options = ["--launch", "ddp", "--num-processes", str(processes)] if processes > 1 else []
    command = [sys.executable, "-m", "preftune.cli.main", "run", "t.yaml", "--only", stage, "--output-dir", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, *options], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def by_length(body, n):
    return 200, {}, {"scores": [len(each[-1]["content"]) for each in body["completions"]]}


def asked_about(server: ChatServer) -> list[str]:
    """Every reply that the server was asked about so far, with its prompt."""
    found = [
        json.dumps([prompt, completion])
        for body in server.bodies
        for prompt, completion in zip(body["prompts"], body["completions"], strict=True)
    ]
    server.bodies.clear()
    return sorted(found)


@pytest.mark.parametrize("stage", ["grpo", "pairs"])
def test_two_processes_ask_about_what_one_asks_and_learn_the_same(folder: Path, stage: str):
    asked = []
    with ChatServer(by_length) as server:
        (folder / "t.yaml").write_text(RECIPE.replace("URL", server.url))
        for processes in (1, 2):
            done = run(folder, stage, f"run{processes}", processes=processes)
            assert done.returncode == 0, done.stderr
            asked.append(asked_about(server))
    assert asked[0] == asked[1] and len(set(asked[0])) == len(asked[0]) > 6
    one, two = (folder / f"run{processes}" / stage for processes in (1, 2))
    if stage == "pairs":  # three replies a piece: one of the two processes has no prompt
        assert (one / "rows.jsonl").read_bytes() == (two / "rows.jsonl").read_bytes()
        return
    logs = [json.loads((place / "log.jsonl").read_text(encoding="utf-8").splitlines()[0]) for place in (one, two)]
    names = [name for name in logs[0] if name.startswith(("reward", "completions/", "frac_", "objective/", "num_"))]
    assert len(names) > 10 and logs[0]["reward"] > 0
    for name in names:
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("stage", ["grpo", "pairs"])
def test_a_server_that_fails_ends_all_processes_with_one_line(folder: Path, stage: str):
    with ChatServer(lambda body, n: (500, {}, "out of order") if n > 1 else by_length(body, n)) as server:
        (folder / "t.yaml").write_text(RECIPE.replace("URL", server.url))
        done = run(folder, stage, "run", processes=2)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "prompt" in last and "reply" in last and "answered 500 (out of order), after 0 retries" in last
    assert done.stderr.count("out of order") == 1 and "Traceback" not in done.stderr
    assert json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))["stages"][stage]["state"] == "failed"
    assert not (folder / "run" / stage / "lineage.json").exists()
