"""The evaluation under `--launch`: two real processes give what one gives, also where a signal came between."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.cli import main as cli

from ..eval.chat_server import ChatServer, Reply, completion

RECIPE = """\
name: t
model: {base: "random:llama", dtype: float32}
lora: {r: 4, alpha: 8}
data:
  demos: {path: demos.jsonl}
  pairs: {path: pairs.jsonl, held_out: 0.3}
stages:
  sft: {data: demos, train: {max_steps: 1, learning_rate: 1e-3}}
  reward: {from: sft, data: pairs, train: {max_steps: 2, learning_rate: 1e-2}}
  dpo: {from: sft, data: pairs, train: {max_steps: 1, learning_rate: 1e-2, per_device_train_batch_size: 2}}
  ppo:
    from: sft
    reward: reward
    data: demos
    rollout_batch_size: 4
    total_episodes: 8
    num_ppo_epochs: 1
    num_mini_batches: 1
    max_new_tokens: 6
    train: {learning_rate: 1e-2}
eval:
  prompts: demos
  policies: [base, sft, dpo, ppo]
  reference: sft
  max_new_tokens: 8
  temperature: 1.0
  batch_size: 4
  judges:
    - {kind: reward, stage: reward}
    - {kind: function, name: vowels, function: "shared_judge:vowels"}
    - {kind: endpoint, url: URL, model: far, concurrency: 1}
  over_optimisation: {gold: vowels, best_of: 3, prompts: 1}
"""
JUDGE = """\
import os

def vowels(completions, **_):
    with open(os.environ["ASKED"], "a") as file:
        file.write(os.environ.get("RANK", "alone") + "\\n")
    texts = [turns[-1]["content"] for turns in completions]
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in texts]
"""
LAUNCH = ("--launch", "fsdp2", "--num-processes", "2")
FILES = ("results.json", "samples.jsonl", "rewards.json", "overoptimisation.json")


def answer(body: dict[str, Any], n: int) -> Reply:
    """By the question alone."""
    return completion("AB"[len(json.dumps(body["messages"])) % 2])


def command(folder: Path, run: str, *words: str) -> list[str]:
    return ["run", str(folder / "t.yaml"), "--output-dir", str(folder / run), *words]


def alone(words: list[str]) -> int:
    """The exit code of a command in this process, with as many threads as each of several has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return cli.run_command(words)
    finally:
        torch.set_num_threads(threads)


def contents(run: Path) -> dict[str, Any]:
    """Of RUN/eval; what asking the endpoint has cost is not the same where answers are kept."""
    read = {name: (run / "eval" / name).read_text(encoding="utf-8") for name in FILES}
    found = {name: json.loads(f"[{','.join(text.splitlines())}]" if name.endswith("l") else text)
             for name, text in read.items()}  # fmt: skip
    for row in found["results.json"]:
        row.pop("usage", None)
    return found


@pytest.mark.slow
def test_two_processes_share_an_evaluation_that_a_signal_interrupts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "demos": [{"prompt": f"question {'x' * (i % 4)}{i}", "completion": "an answer"} for i in range(7)],
        "pairs": [{"prompt": f"question {i}", "chosen": "yes please", "rejected": "no"} for i in range(16)],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "shared_judge.py").write_text(JUDGE)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    with ChatServer(answer) as server:
        (tmp_path / "t.yaml").write_text(RECIPE.replace("URL", server.url))
        assert alone(command(tmp_path, "one")) == 0
        asked, questions = (tmp_path / "asked").read_text().split(), [json.dumps(each) for each in server.bodies]
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        shutil.rmtree(tmp_path / "two" / "eval")
        shutil.rmtree(tmp_path / "two" / "eval-cache")
        (tmp_path / "asked").unlink()
        server.bodies.clear()

        # 1. stopped while the endpoint is asked: what was drawn and answered is kept
        begun = [sys.executable, "-m", "preftune.cli.main", *command(tmp_path, "two", *LAUNCH)]
        process = subprocess.Popen(begun, stderr=subprocess.PIPE, text=True, env={**os.environ})

        def signalling(body: dict[str, Any], n: int) -> Reply:
            if n == 5:
                process.send_signal(signal.SIGTERM)
            return answer(body, n)

        server.respond = signalling
        _, err = process.communicate(timeout=120)
        assert process.returncode == 143, err
        assert "eval: stopped by SIGTERM; continue with: preftune run" in err and "Traceback" not in err
        assert not (tmp_path / "two" / "eval").exists()
        assert len(list((tmp_path / "two" / "eval-cache").glob("samples-*.json"))) == 4
        kept = len(server.bodies)

        # 2. the same command
        server.respond = answer
        capfd.readouterr()
        assert cli.run_command(command(tmp_path, "two", *LAUNCH)) == 0
        err = capfd.readouterr().err
    assert err.count("eval sft: 7 samples as drawn before") == 1  # one process speaks
    assert 0 < kept < len(questions)
    # nothing twice, whoever asked, but the question that was under way
    assert {json.dumps(each) for each in server.bodies} == set(questions)
    assert len(server.bodies) <= len(questions) + 1
    # the first process alone, before and after the signal
    assert (tmp_path / "asked").read_text().split() == ["0"] * (4 + len(asked))
    ours, theirs = contents(tmp_path / "two"), contents(tmp_path / "one")
    assert all(ours[name] == theirs[name] for name in FILES)  # to the bit
    assert {row["stage"] for row in theirs["rewards.json"]} == {"reward", "dpo"}
    kinds = {name for name in os.listdir(tmp_path / "two" / "eval-cache") if name.startswith("samples-")}
    assert kinds == {name for name in os.listdir(tmp_path / "one" / "eval-cache") if name.startswith("samples-")}
