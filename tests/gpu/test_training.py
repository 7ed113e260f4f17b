"""Training on a card: the same bits twice where that is asked for, and adapters in fp32 on a base of 4 bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preftune.data.spec import DataSpec, SourceSpec
from preftune.models.loading import resolve_base
from preftune.models.lora import LoraSpec
from preftune.stages.job import StageJob
from preftune.stages.run import run_stage

RUN = "import sys; from preftune.cli.main import main; main()"
STAGES = ("sft", "reward", "ppo")


def test_deterministic_gives_the_same_bits_twice(tmp_path: Path) -> None:
    """Two processes at once, each with a stage of every way of making a gradient."""
    # a card made of CPU memory computes the same bits anyway
    stages = STAGES if torch.version.cuda else STAGES[:1]
    words = ["run", "smoke", "deterministic=true", "--until", stages[-1]]
    running = []
    for name in ("one", "two"):
        command = [sys.executable, "-W", "ignore", "-c", RUN, *words, "--output-dir", str(tmp_path / name)]
        with (tmp_path / f"{name}.log").open("w") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ)))
    codes = [each.wait(300) for each in running]
    assert codes == [0, 0], "".join((tmp_path / f"{name}.log").read_text()[-1500:] for name in ("one", "two"))
    for stage in stages:
        one, two = (load_file(tmp_path / name / stage / "adapter_model.safetensors") for name in ("one", "two"))
        assert one.keys() == two.keys()
        assert not [key for key in one if not torch.equal(one[key], two[key])], stage


def test_adapters_on_a_base_of_4_bits_are_fp32(tmp_path: Path) -> None:
    if torch.version.cuda is None:
        pytest.skip("bitsandbytes has no kernels for this CUDA device")
    pytest.importorskip("bitsandbytes")
    job = StageJob(
        name="sft",
        kind="sft",
        base=resolve_base("random:llama"),
        dtype="bfloat16",
        quantization="4bit",
        lora=LoraSpec(r=8, alpha=16),
        data=DataSpec((SourceSpec("quickstart/demos.jsonl"),), max_length=256, overflow="truncate", limit=16),
        train={"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no"},
        output_dir=tmp_path / "sft",
    )
    metrics = run_stage(job)
    assert 0 < metrics["train_loss"] < 20 if "train_loss" in metrics else metrics["train_seconds"] > 0
    saved = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    assert {each.dtype for each in saved.values()} == {torch.float32}
    # a change below bf16's rounding shows that they were trained in fp32, not saved in it
    moved = torch.cat([each.flatten() for key, each in saved.items() if "lora_B" in key])
    assert moved.abs().max() > 0 and not torch.equal(moved, moved.to(torch.bfloat16).float())
