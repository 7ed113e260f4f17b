"""The benchmark that kills a chain: it must see what is not the same, and look past what the clock says."""

import json
from pathlib import Path

import pytest

from preftune.benchmarks.chaos import differences, repeated


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs that differ in their times and in their folder alone."""
    for number, name in enumerate(("whole", "other"), 1):
        stage = tmp_path / name / "sft"
        stage.mkdir(parents=True)
        (stage / "adapter_model.safetensors").write_bytes(b"weights")
        (stage / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, "train_runtime": number}) + "\n")
        said = {"steps": 1, "train_seconds": number, "data": {f"{tmp_path / name}/a.jsonl": 3}, "from": str(stage)}
        (stage / "metrics.json").write_text(json.dumps(said | {"data": 3}))
    return tmp_path / "whole", tmp_path / "other"


def test_times_and_places_make_no_difference(runs: tuple[Path, Path]) -> None:
    assert differences(*runs) == []


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("sft/adapter_model.safetensors", "weightz", "other bits: sft/adapter_model.safetensors"),
        ("sft/log.jsonl", '{"step": 1, "loss": 2.5}\n', "other numbers: sft/log.jsonl"),
        ("sft/log.jsonl", '{"step": 1, "loss": 2.0}\n' * 2, "other numbers: sft/log.jsonl"),
        ("sft/metrics.json", '{"steps": 2}', "other numbers: sft/metrics.json"),
        (".sft.left", "", "only in one of them: .sft.left"),
    ],
)
def test_what_is_not_the_same_is_seen(runs: tuple[Path, Path], file: str, text: str, said: str) -> None:
    (runs[1] / file).write_text(text)
    assert differences(*runs) == [said]


def test_steps_that_are_in_no_checkpoint_are_counted(tmp_path: Path) -> None:
    partial = tmp_path / ".sft.partial"
    (partial / "checkpoints" / "checkpoint-10").mkdir(parents=True)
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, 13)]
    (partial / "log.jsonl").write_text("".join(lines) + '{"step": 1')
    assert repeated(tmp_path) == {"sft": 2}
