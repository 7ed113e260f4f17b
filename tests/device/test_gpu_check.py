"""`make gpu-check` rehearsed: every part of it, on the shadow device, to its end. Its figures say nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from preftune.benchmarks.gpu.works import works

pytestmark = pytest.mark.slow

TINY = ("--tiny", "--bases", "random:llama")


def check(device: Any, *words: str) -> "subprocess.CompletedProcess[str]":
    """In processes of its own, each of which has the shadow device (`sitecustomize.py`)."""
    settings = {
        "PYTHONPATH": str(Path(__file__).parent),
        "SHADOW_LIBRARY": str(device.library),
        # transformers' continuous batching takes nine tenths of what is free
        "SHADOW_GB": "2",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "preftune.benchmarks.gpu", *TINY, "--output", str(device.folder / "out"), *words]
    return subprocess.run(
        command, env={**os.environ, **settings}, cwd=device.folder, capture_output=True, text=True, check=False
    )


def test_the_check_runs_to_its_end_and_a_second_one_has_nothing_to_do(device: Any) -> None:
    done = check(device, "--seconds", "3000")
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (device.folder / "out").iterdir()
    assert file.name == "gpu_shadow_of_a_gpu.json"
    kept = json.loads(file.read_text())
    assert kept["failed"] == {}
    assert [*kept["found"]] == [key for work in works(["random:llama"], tiny=True) for key in work.keys]
    found = kept["found"]
    assert found["smoke chain: against the CPU"]["compared"] > 30
    assert [len(found[f"tests: {name}"]["passed"]) for name in ("decoding", "attention", "training")] == [5, 2, 1]
    assert found["llama, rollout, ours: 64 rows"]["decoder"] == "DeviceDecoder"
    assert [*found["llama, chain: ppo by phase"]] == ["rollout", "scores", "log-probs", "update"]
    again = check(device)
    assert again.returncode == 0 and again.stdout == done.stdout and " s] " not in again.stderr
    assert json.loads(file.read_text()) == kept
