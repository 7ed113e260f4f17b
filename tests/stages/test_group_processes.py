"""GRPO and RLOO in two real processes against one, and runs that SIGKILL ended: `group_worker.py` makes them."""

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

WORKER = str(Path(__file__).with_name("group_worker.py"))
KINDS = ("grpo", "rloo")
CASES = ("dapo", "grpo", "bnpo", "entropy", "rloo")
"""What `group_worker.py` calls them."""


@pytest.fixture(scope="session")
def outcome(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("group-processes")
    return outcome_of(Path(WORKER), folder, ("alone", "together", "other"), in_two={"together"})


@pytest.mark.checklist("G13")
@pytest.mark.parametrize("case", CASES)
def test_g13_one_process_equals_two(outcome: Outcome, case: str) -> None:
    one = {name.partition(".")[2]: x for name, x in outcome.one.items() if name.startswith(f"{case}.")}
    own = [each[f"{case}.own"] for each in outcome.two]
    assert [len(each) for each in own] == [4, 4] and int(own[0].sum()) != int(own[1].sum())
    assert int(torch.cat(own).sum()) == float(one["tokens"]) == 39
    for each in outcome.two:
        two = {name: each[f"{case}.{name}"] for name in one}
        assert two["lengths"].tolist() == one["lengths"].tolist() and float(two["tokens"]) == 39
        torch.testing.assert_close(two["advantages"], one["advantages"], rtol=0, atol=5e-6)
        assert float(one["norm"]) > 0.02  # above the limit of 0.01: the clipping is part of what must not depend
        torch.testing.assert_close(two["norm"], one["norm"], rtol=1e-5, atol=0)
        torch.testing.assert_close(two["sums"], one["sums"], rtol=1e-5, atol=1e-5)
        assert torch.equal(two["largest"], one["largest"])
        torch.testing.assert_close(two["metrics"], one["metrics"], rtol=1e-5, atol=1e-5)
        largest = float(one["gradient"].abs().max())
        torch.testing.assert_close(two["gradient"], one["gradient"], rtol=0, atol=1e-5 * largest)


@pytest.mark.checklist("G13")
@pytest.mark.parametrize("kind", KINDS)
def test_g13_runs_of_one_and_of_two_go_on_as_each_other(outcome: Outcome, kind: str) -> None:
    first, second = outcome.found
    assert first[kind]["digests"] == second[kind]["digests"] == first[f"{kind} resumed"]["digests"]
    assert {name for name, digest in first[kind]["digests"].items() if digest != first[kind]["start"][name]} == {
        "default"
    }
    drawn = {it: [*first[kind]["texts"][it], *second[kind]["texts"][it]] for it in ("0", "1")}
    assert outcome.alone[kind]["texts"] == drawn
    expected = torch.tensor(outcome.alone[kind]["weights"])
    for each in (first[kind], outcome.alone[f"{kind} resumed"]):
        torch.testing.assert_close(torch.tensor(each["weights"]), expected, rtol=0, atol=2e-6)


def train(out: Path, kind: str, *kill: str) -> int:
    """Exit code of a training process; out/end.pt holds what it ended with."""
    command = [sys.executable, WORKER, "train", str(out), kind, *kill]
    return subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600).returncode


@pytest.mark.checklist("G12")
@pytest.mark.parametrize(("kind", "kill"), [("grpo", "step 7"), ("grpo", "saving 10"), ("rloo", "step 7")])
def test_g12_killed_and_resumed_equals_never_killed(base: Base, tmp_path: Path, kind: str, kill: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    assert train(whole, kind) == 0
    assert train(cut, kind, kill) == -signal.SIGKILL
    assert newest(cut, "worker", 1) == cut / "checkpoint-5"
    # between the two minibatches of the first of its passes, each of which holds two of the four groups
    assert (cut / "checkpoint-5" / "ppo_rollout.safetensors").is_file()
    assert train(cut, kind) == 0
    ends = [torch.load(folder / "end.pt") for folder in (whole, cut)]
    assert [end.pop("from") for end in ends] == [None, "checkpoint-5"]
    logs = [timeless(end.pop("logs")) for end in ends]
    assert logs[0] == logs[1] and len(logs[0]) == 3
    assert ends[0]["running"][0] == 24 and ends[0]["optimizer"]["state"]
    assert_same(ends[0], ends[1])
    assert rows(whole / "rollouts.jsonl") == rows(cut / "rollouts.jsonl")
