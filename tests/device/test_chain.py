"""The smoke chain on the shadow device: it ends, and its numbers are the CPU's."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from preftune.benchmarks.gpu.smoke import SAME_LOGS, measured, stored
from preftune.models.tiny import byte_tokenizer

pytestmark = pytest.mark.slow

TRAINED = ("sft", "reward", "dpo", "ipo", "kto", "ppo", "grpo", "rloo")
CHECKPOINTING = [f"stages.{name}.train.gradient_checkpointing=true" for name in TRAINED]
DECIDED = ("win_rate", "ci_low", "ci_high", "ties", "accuracy")
"""Numbers that jump where a rounded one passes another."""


def differences(one: dict[str, float], other: dict[str, float], tolerance: float) -> list[str]:
    """Where the two are further apart than that, absolutely and as a share."""
    assert one.keys() == other.keys()
    return [
        f"{place}: {number} and {other[place]}"
        for place, number in one.items()
        if not math.isclose(number, other[place], rel_tol=tolerance, abs_tol=tolerance)
    ]


def on_the_cpu(folder: Path, *words: str) -> Path:
    command = [sys.executable, "-c", "from preftune.cli.main import main; main()", "run", "smoke", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output-dir", "cpu"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "cpu"


def on_the_device(device: Any, *words: str, **environment: str) -> tuple[Path, str]:
    done = device.run("run", "smoke", *words, "--output-dir", "gpu", **environment)
    assert done.code == 0, done.err
    assert done.report["launches"] > 10_000
    return device.folder / "gpu", done.err


def test_the_chain_in_float32_has_the_cpus_numbers(device: Any) -> None:
    there, said = on_the_device(device, *SAME_LOGS)
    assert "FlexAttention does not run" not in said
    here = on_the_cpu(device.folder, *SAME_LOGS)
    found = measured(there)
    assert len(found) > 200
    assert differences(measured(here), found, 2e-4) == []
    # what a real card is held against
    assert differences(stored(), measured(here), 2e-4) == []


def test_the_chain_in_bfloat16_with_checkpointing_has_the_cpus_numbers_to_its_rounding(device: Any) -> None:
    _tiny_qwen3(device.folder / "base")
    words = ("model.base=base", "model.dtype=bfloat16", *SAME_LOGS, *CHECKPOINTING)
    there, said = on_the_device(device, *words)
    assert "FlexAttention does not run" not in said
    here = on_the_cpu(device.folder, *words)
    ours, theirs = (
        {place: number for place, number in measured(run).items() if not any(each in place for each in DECIDED)}
        for run in (there, here)
    )
    assert differences(ours, theirs, 0.01) == []


def test_a_chain_that_sees_two_gpus_uses_one_and_says_how_to_use_both(device: Any) -> None:
    there, said = on_the_device(device, SHADOW_N="2", SHADOW_BACKEND="eager")
    assert said.count("2 GPUs are visible") == 1
    assert "--launch" in said
    assert (there / "report.html").exists()


def _tiny_qwen3(folder: Path) -> None:
    tokenizer: Any = byte_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
