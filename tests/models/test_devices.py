"""Which precision a device computes in."""

from typing import Any

import pytest
import torch

from preftune.models.base import Base
from preftune.models.devices import auto_dtype, device_name
from preftune.recipes.build import base_dtype, stage_job
from preftune.recipes.load import load_recipe

RECIPE = """\
name: t
model: {base: "random:llama"}
data: {demos: {path: quickstart/demos.jsonl}}
stages: {sft: {data: demos, train: {fp16: %s}}}
"""


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ({"avx512_f": True, "avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"neon": True, "bf16": True}, "bfloat16"),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, "float32"),
        ({}, "float32"),
    ],
)
def test_a_cpu_without_instructions_for_bfloat16_gets_float32(says: dict[str, Any], expected: str, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: says)
    assert auto_dtype() == expected


def test_before_torch_2_11_a_cpu_says_nothing_and_gets_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert auto_dtype() == "float32" and device_name() == "this CPU"


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_that_only_emulates_bfloat16_gets_float32(native: bool, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert auto_dtype() == ("bfloat16" if native else "float32")


@pytest.mark.parametrize(("fp16", "expected"), [("false", "bfloat16"), ("true", "float32")])
def test_auto_reaches_the_stage_and_fp16_means_a_float32_base(fp16: str, expected: str, tmp_path, monkeypatch):
    monkeypatch.setattr("preftune.models.devices.auto_dtype", lambda: "bfloat16")
    (tmp_path / "r.yaml").write_text(RECIPE % fp16)
    recipe = load_recipe(str(tmp_path / "r.yaml"), [])
    job = stage_job(recipe, "sft", Base("x", tmp_path, None, ""), tmp_path, tmp_path)
    assert base_dtype(recipe) == job.dtype == expected
