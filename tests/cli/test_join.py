"""Two launchers on one machine, as two machines with a shared folder: whatever is killed, the same bits come out."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

REWARDS = """\
def longer(prompts, completions, **_):
    return [float(len(text)) for text in completions]

def wrong_on_the_second(prompts, completions, **_):
    import os
    return longer(prompts, completions)[int(os.environ["RANK"]):]
"""
RECIPE = """\
name: two
model: {base: random:llama, dtype: float32}
lora: {r: 4, alpha: 8}
checkpoints: {share: 0.1}
data:
  demos: {path: demos.jsonl}
stages:
  sft: {data: demos, train: {max_steps: 24, per_device_train_batch_size: 2, learning_rate: 1e-3}}
  ppo: {from: sft, data: demos, reward: {function: "longer_rewards:longer"}, rollout_batch_size: 4, total_episodes: 24,
        num_ppo_epochs: 1, num_mini_batches: 2, max_new_tokens: 8}
"""


class Two:
    """The commands of two machines, each in a process group of its own."""

    def __init__(self, folder: Path, **changed: Any) -> None:
        folder.mkdir()
        self.folder, self.run = folder, folder / "run"
        (folder / "longer_rewards.py").write_text(REWARDS)
        (folder / "two.yaml").write_text(RECIPE)
        rows = [{"prompt": f"question {place}?", "completion": f"answer {place}."} for place in range(16)]
        (folder / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config = {"distributed_type": "MULTI_CPU", "use_cpu": True, "num_machines": 2, "num_processes": 2,
                  "main_process_ip": "127.0.0.1", "main_process_port": port, **changed}  # fmt: skip
        for rank in range(2):
            (folder / f"node{rank}.yaml").write_text(yaml.safe_dump(config | {"machine_rank": rank}))
        self.processes: list[subprocess.Popen[bytes]] = []

    def lead(self, *overrides: str) -> subprocess.Popen[bytes]:
        return self._start(0, "run", self.folder / "two.yaml", *overrides, "--output-dir", self.run)

    def join(self) -> subprocess.Popen[bytes]:
        return self._start(1, "join", self.run)

    def said(self, rank: int) -> str:
        return (self.folder / f"said{rank}").read_text()

    def end(self, *processes: subprocess.Popen[bytes]) -> list[int]:
        """Their exit codes."""
        return [each.wait(timeout=240) for each in processes]

    def close(self) -> None:
        for each in self.processes:
            if each.poll() is None:
                os.killpg(each.pid, signal.SIGKILL)
                each.wait()

    def until(self, what: str, run: Callable[[], bool]) -> None:
        """Wait for that."""
        began = time.monotonic()
        while not run():
            assert time.monotonic() - began < 180, f"no {what}: {self.said(0)} {self.said(1)}"
            time.sleep(0.05)

    def has_checkpoint(self, stage: str) -> bool:
        return any((self.run / f".{stage}.partial" / "checkpoints").glob("checkpoint-*/manifest.json"))

    def adapters(self) -> dict[str, bytes]:
        return {each: (self.run / each / "adapter_model.safetensors").read_bytes() for each in ("sft", "ppo")}

    def left(self) -> list[str]:
        """Processes of this run that are still there."""
        found = []
        for each in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = each.read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(self.run) in words and "pytest" not in words:
                found.append(words.replace("\0", " "))
        return found

    def process(self, rank: int) -> int:
        """The process number of one that trains."""
        for each in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words, around = each.read_bytes().decode().split("\0"), each.with_name("environ").read_bytes()
            except OSError:
                continue
            if "process" in words and str(self.run) in words and f"\0RANK={rank}\0".encode() in b"\0" + around:
                return int(each.parent.name)
        raise AssertionError(f"no process {rank}: {self.left()}")

    def _start(self, rank: int, *words: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "preftune.cli.main", *map(str, words)]
        with (self.folder / f"said{rank}").open("ab") as said:
            process = subprocess.Popen(
                [*command, "--launch", str(self.folder / f"node{rank}.yaml")],
                stdout=said,
                stderr=said,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                cwd=self.folder,
                start_new_session=True,
            )
        self.processes.append(process)
        return process


@pytest.fixture
def two(tmp_path: Path) -> Generator[Callable[..., Two]]:
    made: list[Two] = []

    def make(name: str, **changed: Any) -> Two:
        made.append(Two(tmp_path / name, **changed))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_whichever_machine_is_killed_the_same_bits_come_out(two: Callable[..., Two]) -> None:
    whole = two("whole")
    assert whole.end(whole.join(), whole.lead()) == [0, 0], whole.said(0) + whole.said(1)
    assert "machine 0 is awaited" in whole.said(1) and whole.said(1).endswith("the run is done\n")

    killed = two("killed")
    lead, join = killed.lead(), killed.join()
    killed.until("checkpoint of sft", lambda: killed.has_checkpoint("sft"))
    os.killpg(join.pid, signal.SIGKILL)
    join = killed.join()
    killed.until("checkpoint of ppo", lambda: killed.has_checkpoint("ppo"))
    os.killpg(lead.pid, signal.SIGKILL)
    lead = killed.lead()
    assert killed.end(lead, join) == [0, 0], killed.said(0) + killed.said(1)
    said = killed.said(0) + killed.said(1)
    assert "Traceback" not in said and "Connection closed" not in said
    assert "sft: machine 1 is lost; it goes on from its last checkpoint once that is back" in said
    assert re.search(r"sft: continues after step \d+", said) and re.search(r"ppo: continues after step \d+", said)
    assert killed.adapters() == whole.adapters()
    assert killed.left() == []


def test_a_killed_process_is_started_again_so_often_then_ends_the_run_in_a_line(two: Callable[..., Two]) -> None:
    pair = two("pair", max_restarts=1)
    lead, join = pair.lead(), pair.join()
    pair.until("checkpoint", lambda: pair.has_checkpoint("sft"))
    os.kill(pair.process(0), signal.SIGKILL)
    pair.until("another start", lambda: "sft: continues after step" in pair.said(0))
    assert "sft: on machine 0, process 0 was ended by SIGKILL; it goes on from its last checkpoint" in pair.said(0)
    os.kill(pair.process(1), signal.SIGKILL)
    began = time.monotonic()
    assert pair.end(lead, join) == [1, 1]
    assert time.monotonic() - began < 30
    ended = "sft: on machine 1, process 1 was ended by SIGKILL; the same command goes on"
    assert pair.said(0).splitlines()[-1] == ended
    dated = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
    assert [dated.sub("", line) for line in pair.said(1).splitlines()] == [
        f"{pair.run}: machine 0 is awaited (preftune run RECIPE --output-dir {pair.run} --launch FILE)",
        f"{pair.run}: machine 1 of 2 takes part",
        f"{pair.run}: the run failed, machine 0 says why",
    ]
    assert "Traceback" not in pair.said(0) + pair.said(1) and pair.left() == []
    # the same commands go on, and a signal to one of them stops both with a checkpoint
    lead, join = pair.lead(), pair.join()
    pair.until("step", lambda: pair.said(0).count("sft: continues after step") == 2)
    join.send_signal(signal.SIGTERM)
    assert pair.end(lead, join) == [143, 143], pair.said(0) + pair.said(1)
    assert re.search(r"sft: stopped by SIGTERM .*; continue with: preftune run ", pair.said(0).splitlines()[-1])
    assert pair.said(1).splitlines()[-1].startswith("stopped by SIGTERM; continue with: preftune join ")


def test_a_users_mistake_on_another_machine_is_said_once_by_the_first(two: Callable[..., Two]) -> None:
    pair = two("pair", distributed_type="FSDP", fsdp_config={"fsdp_version": 2})
    changed = ("stages.ppo.from=base", "stages.ppo.reward={function: 'longer_rewards:wrong_on_the_second'}")
    lead, join = pair.lead("--only", "ppo", *changed), pair.join()
    assert pair.end(lead, join) == [2, 1], pair.said(0) + pair.said(1)
    both = pair.said(0) + pair.said(1)
    assert both.count("wrong_on_the_second returned") == 1 and "wrong_on_the_second returned" in pair.said(0)
    assert "the frozen base is divided among 2 processes" in both
    assert pair.said(1).splitlines()[-1] == f"{pair.run}: the run failed, machine 0 says why"
