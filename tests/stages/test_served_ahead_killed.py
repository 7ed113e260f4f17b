"""Runs that SIGKILL ended while a server drew ahead for them, continued by a fresh process and a fresh server."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from preftune.models.base import Base
from preftune.stages.checkpoints import newest

from .served import Served, ask_at_once
from .test_ppo_resume import assert_same, timeless
from .test_served_ahead import drawers

WORKER = Path(__file__).with_name("served_ahead_worker.py")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_at_once(monkeypatch)


def run(folder: Path, server: Served, save_steps: int, *kill: int) -> int:
    """Exit code of a training process."""
    command = [sys.executable, str(WORKER), str(folder), server.url, str(save_steps), *map(str, kill)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=False, env=environment, timeout=300).returncode


@pytest.fixture(scope="module")
def whole(base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """The folder of a run that nothing interrupted, and who drew what."""
    folder = tmp_path_factory.mktemp("whole")
    with Served(base.path) as server:
        assert run(folder, server, 100) == 0
        return folder, drawers(server)


@pytest.mark.slow
@pytest.mark.checklist("V18")
@pytest.mark.parametrize(
    ("save_steps", "kill", "kept"),
    [
        # at an iteration's end, after an evaluation by the newest policy; the next one takes what is drawn
        pytest.param(4, 10, "step-4", id="between"),
        # between two minibatches, while the next replies are drawn
        pytest.param(5, 7, "step-4", id="within"),
    ],
)
def test_v18_killed_and_resumed_equals_never_killed(
    base: Base, tmp_path: Path, whole: tuple[Path, dict[int, str]], save_steps: int, kill: int, kept: str
) -> None:
    with Served(base.path) as server:
        assert run(tmp_path / "cut", server, save_steps, kill) == -signal.SIGKILL
    found = newest(tmp_path / "cut", "worker", 1)
    assert found is not None
    said = json.loads((found / "ppo_ahead.json").read_text())
    assert f"step-{said['step']}" == kept and (found / "ppo_ahead" / "adapter_model.safetensors").is_file()
    shutil.rmtree(tmp_path / "cut" / "served")  # what the checkpoint holds is enough
    with Served(base.path) as server:
        assert run(tmp_path / "cut", server, save_steps) == 0
        again = drawers(server)
    assert set(again) < set(whole[1]) and again == {seed: whole[1][seed] for seed in again}
    ends = [torch.load(folder / "end.pt") for folder in (whole[0], tmp_path / "cut")]
    assert [end.pop("from") for end in ends] == [None, found.name]
    logs = [timeless(end.pop("logs")) for end in ends]
    assert logs[0] == logs[1] and [log["rollout/staleness"] for log in logs[0]] == [0, 4, 4, 4]
    assert_same(*ends)
