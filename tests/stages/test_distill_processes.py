"""Distillation in two real processes against one, and runs that SIGKILL ended: `distill_worker.py` makes them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from preftune.models.base import Base
from preftune.stages.checkpoints import newest

from .test_ppo_distributed import Outcome, outcome_of
from .test_ppo_resume import assert_same, rows, timeless

pytestmark = pytest.mark.slow

WORKER = str(Path(__file__).with_name("distill_worker.py"))


@pytest.fixture(scope="session")
def outcome(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("distill-processes")
    return outcome_of(Path(WORKER), folder, ("alone", "together", "other"), in_two={"together"})


@pytest.mark.checklist("T9")
def test_t09_one_process_equals_two(outcome: Outcome) -> None:
    one = outcome.one
    own = [each["own"] for each in outcome.two]
    assert [len(each) for each in own] == [4, 4] and int(own[0].sum()) != int(own[1].sum())
    assert int(torch.cat(own).sum()) == float(one["tokens"]) == 39
    for two in outcome.two:
        assert two["lengths"].tolist() == one["lengths"].tolist() and float(two["tokens"]) == 39
        assert float(one["norm"]) > 0.02  # above the limit of 0.01: the clipping is part of what must not depend
        torch.testing.assert_close(two["norm"], one["norm"], rtol=1e-5, atol=0)
        torch.testing.assert_close(two["sums"], one["sums"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(two["metrics"], one["metrics"], rtol=1e-5, atol=1e-5)
        largest = float(one["gradient"].abs().max())
        torch.testing.assert_close(two["gradient"], one["gradient"], rtol=0, atol=1e-5 * largest)


@pytest.mark.checklist("T9")
def test_t09_runs_of_one_and_of_two_go_on_as_each_other(outcome: Outcome) -> None:
    first, second = outcome.found
    assert first["whole"]["digests"] == second["whole"]["digests"] == first["resumed"]["digests"]
    changed = {name for name, x in first["whole"]["digests"].items() if x != first["whole"]["start"][name]}
    assert changed == {"default"}
    drawn = {it: [*first["whole"]["texts"][it], *second["whole"]["texts"][it]] for it in ("0", "1", "2", "3")}
    assert outcome.alone["whole"]["texts"] == drawn
    expected = torch.tensor(outcome.alone["whole"]["weights"])
    for each in (first["whole"], outcome.alone["resumed"]):
        torch.testing.assert_close(torch.tensor(each["weights"]), expected, rtol=0, atol=2e-6)
        assert each["held"] == pytest.approx(outcome.alone["whole"]["held"], rel=1e-4)


def train(out: Path, *kill: str) -> int:
    """Exit code of a training process; out/end.pt holds what it ended with."""
    command = [sys.executable, WORKER, "train", str(out), *kill]
    return subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600).returncode


@pytest.mark.checklist("T8")
@pytest.mark.parametrize(("kill", "kept"), [("step 4", 3), ("saving 6", 3), ("step 7", 6)])
def test_t08_killed_and_resumed_equals_never_killed(base: Base, tmp_path: Path, kill: str, kept: int) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    assert train(whole) == 0
    assert train(cut, kill) == -signal.SIGKILL
    assert newest(cut, "worker", 1) == cut / f"checkpoint-{kept}"
    # 3 steps: between the two of the student's own rollout; 6: before the fourth rollout, its own again
    assert (cut / f"checkpoint-{kept}" / "ppo_rollout.safetensors").is_file() == (kept == 3)
    assert train(cut) == 0
    ends = [torch.load(folder / "end.pt") for folder in (whole, cut)]
    assert [end.pop("from") for end in ends] == [None, f"checkpoint-{kept}"]
    logs = [timeless(end.pop("logs")) for end in ends]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    assert ends[0]["optimizer"]["state"]
    assert_same(ends[0], ends[1])
    assert rows(whole / "rollouts.jsonl") == rows(cut / "rollouts.jsonl")
