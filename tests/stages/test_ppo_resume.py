"""PPO runs that SIGKILL ended, continued by a fresh process: nothing may differ from a run that was never killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune import stopping
from preftune.errors import UserError
from preftune.models.base import Base
from preftune.models.decoder import Decoder
from preftune.stages.callbacks import Clock, LogFile, keep_rows
from preftune.stages.checkpoints import Continuing, newest, remove_older, seal
from preftune.stages.job import CheckpointPlan
from preftune.stages.ppo.files import SampleLog
from preftune.stopping import Stopped

from .tiny_ppo import trainer

WORKER = Path(__file__).with_name("ppo_worker.py")


def train(out: Path, *kill: str) -> int:
    """Exit code of a training process; out/end.pt holds what it ended with."""
    command = [sys.executable, str(WORKER), "train", str(out), *kill]
    return subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600).returncode


def rows(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def timeless(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The iterations' logs without what the clock says."""
    clock = ("time/", "step_time", "rollout/tokens_per_second")
    return [{k: x for k, x in log.items() if not k.startswith(clock)} for log in logs if "rollout/length" in log]


def assert_same(one: Any, two: Any) -> None:
    """Equal bit for bit, tensors in nested dictionaries and lists included."""
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    else:
        assert one == two


@pytest.fixture(scope="session")
def whole(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted: 3 iterations of 4 steps, saved after steps 5 and 10."""
    out = tmp_path_factory.mktemp("whole")
    assert train(out) == 0
    return out


@pytest.mark.slow
@pytest.mark.checklist("P23")
@pytest.mark.parametrize(
    ("kill", "left"),
    [
        # two steps after a checkpoint that fell between the minibatches of an epoch
        ("step 7", {"checkpoint-5"}),
        # all but the last file of the next one is written, and only one is to be kept
        ("saving 10", {"checkpoint-5"}),
    ],
)
def test_p23_killed_and_resumed_equals_never_killed(whole: Path, tmp_path: Path, kill: str, left: set[str]) -> None:
    assert train(tmp_path, kill) == -signal.SIGKILL
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == left
    assert newest(tmp_path, "worker", 1) == tmp_path / "checkpoint-5"
    assert (tmp_path / "checkpoint-5" / "ppo_rollout.safetensors").is_file()
    assert train(tmp_path) == 0

    ends = [torch.load(folder / "end.pt") for folder in (whole, tmp_path)]
    assert [end.pop("from") for end in ends] == [None, "checkpoint-5"]
    logs = [timeless(end.pop("logs")) for end in ends]
    assert logs[0] == logs[1] and len(logs[0]) == 3
    # the controller has moved, and the scale has seen all 24 scores
    assert ends[0]["kl_coef"] != 0.05 and ends[0]["running"][0] == 24
    assert ends[0]["optimizer"]["state"] and ends[0]["trainables"]
    assert_same(*ends)

    texts = [rows(folder / "rollouts.jsonl") for folder in (whole, tmp_path)]
    assert texts[0] == texts[1] and [row["iteration"] for row in texts[0]] == [0] * 8 + [1] * 8 + [2] * 8
    assert timeless(rows(whole / "log.jsonl")) == timeless(rows(tmp_path / "log.jsonl"))


def checkpoint(folder: Path, step: int, *, complete: bool = True) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir()
    (made / "trainables").write_text(f"of {step}")
    if complete:
        seal(made, processes=1, asked=True)
    return made


@pytest.mark.checklist("P23")
def test_p23_only_complete_checkpoints_count(tmp_path: Path) -> None:
    assert newest(tmp_path / "none", "ppo", 1) is None and newest(tmp_path, "ppo", 1) is None
    checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20, complete=False)
    (tmp_path / "checkpoint-30.bak").mkdir()
    assert newest(tmp_path, "ppo", 1) == tmp_path / "checkpoint-10"
    with pytest.raises(UserError, match=r"checkpoint-10 is of 1 processes and this run has 2; launch 1, or .*--force"):
        newest(tmp_path, "ppo", 2)
    assert newest(tmp_path, "ppo", None) == tmp_path / "checkpoint-10"
    # a file that is not what was written
    (tmp_path / "checkpoint-10" / "trainables").write_text("of 11")
    assert newest(tmp_path, "ppo", 1) == tmp_path / "checkpoint-9"


@pytest.mark.parametrize(("limit", "left"), [(None, {2, 4, 6}), (0, {2, 4, 6}), (2, {2, 6}), (1, {2}), (5, {2, 4, 6})])
def test_the_oldest_checkpoints_go_and_never_the_one_just_written(tmp_path: Path, limit: int | None, left: set) -> None:
    for step in (4, 6):
        checkpoint(tmp_path, step)
    # another run's came further, but this one is the newest; the clock has no say
    last = checkpoint(tmp_path, 2)
    os.utime(last, (3, 3))
    remove_older(last, limit)
    assert {int(path.name.partition("-")[2]) for path in tmp_path.iterdir()} == left


def test_rows_of_the_steps_to_come_go_and_so_does_one_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "rollouts.jsonl"
    log = SampleLog(file, every=1)
    # JSON leaves these line ends as they are; `str.splitlines` breaks at every one of them
    texts = ["a\u2028b", "c\x85d", "e\nf\r"]
    for iteration, text in enumerate(texts):
        log.write(iteration, [{"completion": text, "score": 1.0}])
    with file.open("a", encoding="utf-8") as lines:
        lines.write('{"iteration": 1, "comple')
    log.start(2)
    assert [(row["iteration"], row["completion"]) for row in rows(file)] == [(0, texts[0]), (1, texts[1])]
    log.write(2, [{"completion": texts[2], "score": 1.0}])
    assert [row["completion"] for row in rows(file)] == texts
    keep_rows(file, lambda row: False)
    assert file.read_text() == ""


def ended_run(folder: Path, *, stop_at: int | None = None) -> Any:
    """A trainer that has run in the folder, from a checkpoint where it holds one.

    Args:
        stop_at: SIGTERM comes while that iteration is being drawn.
    """
    plan = CheckpointPlan(share=None, minutes=None)
    made = trainer(folder / "checkpoints", callbacks=[LogFile(folder / "log.jsonl"), Clock(), Continuing("ppo", plan)])
    found = newest(folder / "checkpoints", "ppo", 1)
    true, steps = Decoder._step, [0]

    def step(self: Any) -> bool:
        steps[0] += 1
        if made.loop.iteration == stop_at and steps[0] > 3:
            signal.raise_signal(signal.SIGTERM)
        return true(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "_step", step)
        made.train(None if found is None else str(found))
    return made


def test_a_signal_does_not_wait_for_a_rollout_to_be_drawn(tmp_path: Path) -> None:
    """Drawing is left off, and drawn again from its beginning: what comes out is the same."""
    whole = ended_run(tmp_path / "whole")
    said = "ppo: stopped by SIGTERM at step 4 of 8, with a checkpoint"
    with pytest.raises(Stopped, match=said), stopping.signals(), stopping.deferred():
        ended_run(tmp_path / "stopped", stop_at=1)
    kept = newest(tmp_path / "stopped" / "checkpoints", "ppo", 1)
    assert kept is not None and kept.name == "checkpoint-4"
    again = ended_run(tmp_path / "stopped")
    assert_same(*({name: p.detach() for name, p in each.trainables.items()} for each in (whole, again)))
    logs = [timeless(rows(tmp_path / name / "log.jsonl")) for name in ("whole", "stopped")]
    assert logs[0] == logs[1] and len(logs[0]) == 2
    assert again.episodes == whole.episodes == 16 and again.tokens == whole.tokens


def test_a_signal_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    said = "at step 0 of 8, without a checkpoint: it starts anew"
    with pytest.raises(Stopped, match=said), stopping.signals(), stopping.deferred():
        ended_run(tmp_path, stop_at=0)
    assert newest(tmp_path / "checkpoints", "ppo", 1) is None
