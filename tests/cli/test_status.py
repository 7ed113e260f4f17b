"""`preftune status`: what the files of a run say of it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from preftune import stopping
from preftune.cli import status as status_
from preftune.cli.folder import RunFolder
from preftune.cli.status import Step, status_of
from preftune.stages.callbacks import StepFile

from .conftest import Shell
from .workshop import Workshop

RECIPE = """\
name: t
model: {base: "random:llama", dtype: float32}
data:
  demos: {path: demos.jsonl}
  pairs: {path: pairs.jsonl}
stages:
  sft: {data: demos}
  reward: {from: sft, data: pairs}
  ppo: {from: sft, reward: reward, data: demos}
  dpo: {from: sft, data: pairs}
eval: {prompts: demos, policies: [sft, dpo], reference: sft}
"""

XTERM = {"TERM": "xterm", "COLUMNS": "200", "LINES": "40"}


def at(seconds: float) -> str:
    """So many seconds ago, as run.json has it."""
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds")


def made(run: Path, stages: Mapping[str, Any], *, holder: int | None = None, host: str | None = None) -> Path:
    """A run's folder by hand, held by that process since a hundred seconds."""
    run.mkdir(exist_ok=True)
    (run / "recipe.yaml").write_text(RECIPE)
    (run / "run.json").write_text(json.dumps({"stages": stages}))
    if holder is not None:
        (run / ".lock.pid").write_text(f"{holder}\n{host or socket.gethostname()}\n{at(100)}\n")
    return run


def wrote(folder: Path, *log: Mapping[str, Any], **progress: float) -> None:
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log) + '{"step": 99')
    if progress:
        (folder / "progress.json").write_text(json.dumps(progress))


def steps(run: Path) -> dict[str, Step]:
    return {each.name: each for each in status_of(run).steps}


@pytest.fixture
def gone() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def ppo(tmp_path: Path) -> Path:
    """A run in the middle of PPO, held by the process above this one."""
    done = {"state": "done", "key": "k", "seconds": 41.26, "started": at(95)}
    failed = {"state": "failed", "seconds": 1.0, "started": at(200), "error": "out of\n memory"}
    running = {"state": "running", "seconds": 0.0, "started": at(40)}
    run = made(tmp_path / "run", {"sft": done, "dpo": failed, "ppo": running}, holder=os.getppid())
    last = {"step": 20, "train_runtime": 30.0, "train_loss": 2.5}
    wrote(run / "sft", {"step": 10, "loss": 3.0}, {"step": 20, "loss": 1.5, "eval_loss": 1.75}, last)
    row = {"objective/kl": 0.5, "objective/scores": 1.25, "rollout/length": 12.0}
    wrote(run / ".ppo.partial", {"step": 3, **row}, step=12, steps=72, began=2, seconds=20.0)
    return run


def test_every_state_is_told_with_step_time_and_metrics(ppo: Path) -> None:
    status = status_of(ppo)
    assert status.state == "at work" and status.holder is not None and status.holder.process == os.getppid()
    assert [(each.name, each.state) for each in status.steps] == [
        ("sft", "done"), ("reward", "to come"), ("ppo", "running"), ("dpo", "failed"), ("eval", "to come"),
    ]  # fmt: skip
    found = steps(ppo)
    assert found["sft"] == Step("sft", "done", 20, 20, 41.3, None, {"loss": 1.5, "eval_loss": 1.75})
    assert found["dpo"].error == "out of memory"
    assert found["ppo"].metrics == {"score": 1.25, "kl": 0.5, "length": 12.0}
    assert (found["ppo"].step, found["ppo"].steps) == (12, 72)
    # 10 steps in 20 seconds since it went on from step 2: 60 more take 120
    assert found["ppo"].left == 120.0
    assert found["ppo"].seconds == pytest.approx(40, abs=3)


def test_a_dead_process_is_an_interrupted_run(ppo: Path, gone: int) -> None:
    (ppo / ".lock.pid").write_text(f"{gone}\n")
    status, found = status_of(ppo), steps(ppo)
    assert status.state == "interrupted" and status.failed and str(gone) in status.line()
    assert found["ppo"].state == "interrupted" and found["sft"].state == "done"
    # how far it came stays, what would be left does not
    assert (found["ppo"].step, found["ppo"].steps, found["ppo"].seconds, found["ppo"].left) == (12, 72, 20.0, None)
    # the same where nothing tells who it was
    (ppo / ".lock.pid").unlink()
    assert status_of(ppo).state == "interrupted"


def test_what_an_earlier_run_left_running_is_not_said_to_run(ppo: Path) -> None:
    content = json.loads((ppo / "run.json").read_text())
    content["stages"]["ppo"]["started"] = at(500)
    (ppo / "run.json").write_text(json.dumps(content))
    assert status_of(ppo).state == "at work" and steps(ppo)["ppo"].state == "interrupted"


def test_a_process_of_another_machine_is_not_said_to_be_dead(ppo: Path, gone: int) -> None:
    (ppo / ".lock.pid").write_text(f"{gone}\nelsewhere.example\n{at(100)}\n")
    status = status_of(ppo)
    assert status.state == "at work" and "on elsewhere.example, which cannot be asked from here" in status.line()


def test_a_stage_that_loads_again_has_no_step_yet(ppo: Path) -> None:
    (ppo / ".ppo.partial" / "progress.json").unlink()
    found = steps(ppo)["ppo"]
    assert (found.state, found.step, found.steps, found.left) == ("running", None, None, None)


def test_a_loss_that_is_not_finite_is_not_replaced_by_an_older_one(tmp_path: Path) -> None:
    stopped = {"state": "stopped", "seconds": 3.0, "started": at(9), "error": "stopped by SIGTERM"}
    run = made(tmp_path / "run", {"sft": stopped})
    wrote(
        run / ".sft.partial", {"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, step=3, steps=9, began=0, seconds=1
    )
    status = status_of(run)
    assert status.state == "nothing at work" and not status.failed
    assert status.steps[0] == Step("sft", "stopped", 3, 9, 3.0, None, {}, "stopped by SIGTERM")


def test_the_command_writes_nothing_and_imports_nothing_heavy(ppo: Path) -> None:
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(ppo.rglob("*"))}
    # the process that holds the folder is ours
    (ppo / ".lock.pid").write_text(f"{os.getpid()}\n")
    before[ppo / ".lock.pid"] = ((ppo / ".lock.pid").stat().st_mtime_ns, (ppo / ".lock.pid").stat().st_size)
    command = [sys.executable, "-X", "importtime", "-m", "preftune.cli.main", "status", str(ppo)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "trl", "peft", "datasets"}
    assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(ppo.rglob("*"))} == before
    assert f"at work (process {os.getpid()})" in done.stdout
    assert all(word in done.stdout for word in ("12/72", "2 min 0 s", "score", "dpo: out of memory"))


def test_json_has_the_run_and_a_line_for_each_step(ppo: Path, shell: Shell) -> None:
    code, out, _ = shell("status", ppo, "--json")
    run, *rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and (run["state"], run["process"]) == ("at work", os.getppid())
    assert [row["stage"] for row in rows] == ["sft", "reward", "ppo", "dpo", "eval"]
    assert rows[2] | {"seconds": 0} == {
        "stage": "ppo", "state": "running", "step": 12, "steps": 72, "seconds": 0, "left": 120.0,
        "loss": None, "eval_loss": None, "score": 1.25, "kl": 0.5, "length": 12.0, "error": None,
    }  # fmt: skip


def test_what_is_no_run_is_refused(tmp_path: Path, shell: Shell) -> None:
    shell.refused("status", tmp_path, said="holds no run.json")
    shell.refused("status", tmp_path / "none", said="no such folder")
    (tmp_path / "run.json").write_text("[")
    shell.refused("status", tmp_path, said="run.json: cannot be read")


def test_watching_in_a_pipe_prints_what_changes_until_the_run_is_over(
    ppo: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = iter(["same", "step", "end"])

    def sleep(seconds: float) -> None:
        what = next(later)
        if what == "step":
            (ppo / ".ppo.partial" / "progress.json").write_text('{"step": 13, "steps": 72, "began": 2, "seconds": 22}')
        if what == "end":
            content = json.loads((ppo / "run.json").read_text())
            content["stages"]["ppo"] |= {"state": "done", "seconds": 50.0}
            (ppo / "run.json").write_text(json.dumps(content))
            (ppo / ".lock.pid").unlink()

    monkeypatch.setattr(status_, "time", SimpleNamespace(sleep=sleep))
    code, out, _ = shell("status", ppo, "--watch")
    lines = out.splitlines()
    assert code == 1  # dpo failed
    assert len(lines) == 6 + 1 + 2
    assert lines[6].startswith("ppo: running, 13/72, score 1.25, kl 0.5, length 12, for ")
    assert lines[6].endswith("about 1 min 58 s left")
    assert lines[7].endswith("nothing at work") and lines[8] == "ppo: done, 50.0 s"


def test_a_run_says_where_it_is_while_it_trains(shop: Workshop) -> None:
    """The chain with stages that look on themselves: held by this process, which its own look takes for gone."""
    seen = {}

    def during(name: str, output: Path) -> None:
        assert not (output / "progress.json").exists()
        (output / "progress.json").write_text("{}")
        holder = RunFolder(shop.path).holder()
        assert holder is not None
        seen[name] = (holder.process, holder.host, holder.started <= at(0))

    shop.during = during
    shop.run()
    assert set(seen.values()) == {(os.getpid(), socket.gethostname(), True)}
    assert not list(shop.path.rglob("progress.json"))
    status = status_of(shop.path)
    assert status.state == "nothing at work" and {each.state for each in status.steps} == {"done"}


def test_progress_is_written_now_and_then_and_kept_where_the_training_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, clock = tmp_path / "new" / "progress.json", [100.0]
    monkeypatch.setattr("preftune.stages.callbacks.time.monotonic", lambda: clock[0])
    said = StepFile(file)
    args, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerControl()
    state = TrainerState(global_step=4, max_steps=9)
    said.on_train_begin(args, state, control)
    for _ in range(2):
        clock[0] += 1.5
        state.global_step += 1
        said.on_step_end(args, state, control)
        if state.global_step == 5:
            assert json.loads(file.read_text())["step"] == 4
    assert json.loads(file.read_text()) == {"step": 6, "steps": 9, "began": 4, "seconds": 3.0}
    state.global_step = 7
    with monkeypatch.context() as asked:
        asked.setattr(stopping, "requested", lambda: 15)
        said.on_train_end(args, state, control)
    assert json.loads(file.read_text())["step"] == 7
    said.on_train_end(args, state, control)
    assert not file.exists()


@pytest.mark.slow
def test_a_real_run_is_watched_from_another_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "preftune.cli.main"]
    words = ["sft", "smoke", "stages.sft.train.max_steps=200", "--output-dir", str(run)]
    environment, quiet = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.DEVNULL
    training = subprocess.Popen([*command, *words], stdout=quiet, stderr=quiet, env=environment)
    seen: list[Step] = []
    killer = threading.Timer(300, training.kill)
    killer.start()
    while training.poll() is None and not (seen and seen[-1].left is not None):
        time.sleep(0.2)
        if (run / "run.json").is_file():
            seen += [each for each in status_of(run).steps if each.name == "sft"]
    assert training.poll() is None, "it ended before it was seen at work"
    assert status_of(run).state == "at work"
    assert seen[-1].state == "running" and seen[-1].steps == 200 and 0 < (seen[-1].step or 0) < 200
    training.kill()
    training.wait()
    killer.cancel()
    status = status_of(run)
    assert status.state == "interrupted" and status.steps[0].state == "interrupted"
    assert status.steps[0].steps == 200


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_watching_in_a_terminal_draws_anew_and_leaves_the_last_state(ppo: Path) -> None:
    import pty

    with subprocess.Popen(["sleep", "60"]) as holder:
        (ppo / ".lock.pid").write_text(f"{holder.pid}\n")
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "preftune.cli.main", "status", str(ppo), "--watch"]
        watching = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, **XTERM})
        os.close(theirs)
        shown = ""
        while (read := _read(ours)) is not None:
            shown += read
            if "12/72" in shown and holder.poll() is None:
                holder.kill()
                holder.wait()
        os.close(ours)
    assert watching.wait(timeout=30) == 1
    drawn, _, last = shown.partition("\x1b[?1049l")  # which leaves the screen of its own
    assert f"at work (process {holder.pid})" in drawn and "running" in drawn
    assert f"interrupted, its process {holder.pid} is gone" in last and "running" not in last


def _read(terminal: int) -> str | None:
    """The next of what a terminal shows; None once nobody writes to it any more."""
    try:
        return os.read(terminal, 1 << 16).decode(errors="replace") or None
    except OSError:
        return None
