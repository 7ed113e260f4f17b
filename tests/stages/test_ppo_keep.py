"""Policies that a PPO run keeps on its way: which, whole or not at all, and the same ones after a resume."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from preftune.models.adapters import AdapterSet
from preftune.models.lineage import adapter_sha256
from preftune.stages.ppo.files import POLICIES, forget_policies, keep_policy, kept_policies

from .tiny_ppo import TOKENIZER, tiny, tiny_model, trainer

IDS = torch.tensor([TOKENIZER.encode("hello there")])


class Watch(TrainerCallback):
    """The policy after every optimiser step: its hash, and its logits on a text; stops the run after `stop` steps."""

    def __init__(self, stop: int = 0) -> None:
        self.adapters: AdapterSet | None = None
        self.digests: dict[int, str] = {}
        self.logits: dict[int, torch.Tensor] = {}
        self.stop = stop

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.adapters is not None
        step = state.global_step
        self.digests[step] = self.adapters.digest("default")
        hidden = self.adapters.hidden("default", IDS, torch.ones_like(IDS))
        self.logits[step] = self.adapters.lm_head(hidden)
        control.should_training_stop |= step == self.stop


def watched(folder: Path, stop: int = 0, resume: Path | None = None, **options: Any) -> tuple[Watch, dict[int, Path]]:
    """A run of three iterations of four steps: what it saw and what it kept."""
    watch = Watch(stop)
    made = trainer(folder, callbacks=[watch], total_episodes=24, learning_rate=1e-2, **options)
    watch.adapters = made.adapters
    made.train(None if resume is None else str(resume))
    return watch, kept_policies(folder / POLICIES)


@pytest.mark.parametrize("value", ["separate", "shared"])
def test_a_kept_policy_is_the_policy_of_that_step_for_plain_peft(tmp_path: Path, value: str) -> None:
    watch, kept = watched(tmp_path, keep_every=1, value=value)
    # the last policy, of step 12, is the run's result
    assert list(kept) == [4, 8]
    assert sorted(each.name for each in (tmp_path / POLICIES).iterdir()) == ["step-4", "step-8"]
    for step, folder in kept.items():
        if value == "separate":
            assert adapter_sha256(folder) == watch.digests[step] != watch.digests[step + 1]
        alone = PeftModel.from_pretrained(tiny_model(), folder).eval()
        with torch.no_grad():
            assert torch.allclose(alone(input_ids=IDS).logits, watch.logits[step], atol=1e-5)
            assert not torch.allclose(alone(input_ids=IDS).logits, watch.logits[step + 4], atol=1e-3)


def test_how_often(tmp_path: Path) -> None:
    cases: tuple[tuple[str, dict[str, Any], list[int]], ...] = (
        ("second", {"keep_every": 2}, [8]),
        ("too rare", {"keep_every": 3}, []),
        ("never", {}, []),
        # its last policy, though the run was to be longer
        ("stopped", {"keep_every": 1, "stop": 8}, [4]),
        ("elsewhere", {"keep_every": 1, "policies_dir": str(tmp_path / "here")}, []),
    )
    for name, options, steps in cases:
        _, kept = watched(tmp_path / name, **options)
        assert list(kept) == steps, name
    assert list(kept_policies(tmp_path / "here")) == [4, 8]
    assert not (tmp_path / "never" / POLICIES).exists()
    with pytest.raises(ValueError, match="keep_every is 0, expected at least 1 or none"):
        trainer(tmp_path, keep_every=0)


def test_a_resumed_run_keeps_the_same_policies(tmp_path: Path) -> None:
    options = {"keep_every": 1, "save_strategy": "steps", "save_steps": 5}
    _, whole = watched(tmp_path, **options)
    expected = {step: adapter_sha256(folder) for step, folder in whole.items()}
    assert list(expected) == [4, 8]
    # as a kill after step 8 leaves it, where the last checkpoint is of step 5: a later policy, and half of another
    keep_policy(tiny(seed=9, strength=1.0), tmp_path / POLICIES, 8)
    keep_policy(tiny(seed=9, strength=1.0), tmp_path / POLICIES, 10)
    (tmp_path / POLICIES / ".step-12.77").mkdir()
    assert adapter_sha256(whole[8]) != expected[8]
    times = whole[4].stat().st_mtime_ns
    _, again = watched(tmp_path, resume=tmp_path / "checkpoint-5", **options)
    assert {step: adapter_sha256(folder) for step, folder in again.items()} == expected
    assert sorted(each.name for each in (tmp_path / POLICIES).iterdir()) == ["step-4", "step-8"]
    assert again[4].stat().st_mtime_ns == times
    # from the start nothing of an earlier run is left
    _, fresh = watched(tmp_path, keep_every=2)
    assert list(fresh) == [8]


def test_a_policy_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = AdapterSet.save

    def cut_off(self: AdapterSet, name: str, folder: Path) -> None:
        true(self, name, folder)
        raise KeyboardInterrupt(signal.SIGINT)

    monkeypatch.setattr(AdapterSet, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        keep_policy(tiny(), tmp_path, 4)
    assert kept_policies(tmp_path) == {} and not list(tmp_path.iterdir())
    # what a kill leaves, which nothing can tidy up
    (tmp_path / ".step-4.123").mkdir()
    assert kept_policies(tmp_path) == {}
    forget_policies(tmp_path, after=9)
    assert not list(tmp_path.iterdir())
