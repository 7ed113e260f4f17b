"""An adapter merged into its base is base + adapter, rounded once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from preftune.errors import UserError
from preftune.files import ADAPTER_CONFIG
from preftune.models.base import Base
from preftune.models.lora import LoraSpec, lora_layers, lora_state
from preftune.models.merging import merge_adapter
from preftune.models.reward_model import create_reward_model, save_reward_model

from .conftest import IDS, logits


def test_the_merged_model_computes_what_the_adapter_does(make, base: Base, tmp_path: Path):
    adapters = make()
    adapters.save("default", tmp_path / "adapter")
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert (merged.base.sha256, merged.dtype) == (base.sha256, "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits(adapters, "default"), rtol=1e-5, atol=1e-5)
    assert "_name_or_path" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


def test_the_sum_is_rounded_once(make, tmp_path: Path):
    make().save("default", tmp_path / "adapter")
    for dtype in ("float32", "bfloat16"):
        assert merge_adapter(tmp_path / "adapter", tmp_path / dtype, dtype).dtype == dtype
    exact, rounded = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "bfloat16"))
    assert exact.keys() == rounded.keys()
    for name, tensor in exact.items():
        assert torch.equal(rounded[name], tensor.bfloat16()), name


def test_a_reward_adapter_becomes_a_classifier(base: Base, tokenizer, tmp_path: Path):
    made = create_reward_model(base, tokenizer, LoraSpec(r=2, alpha=4))
    for name, parameter in lora_state(lora_layers(made), "default").items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_reward_model(made, base, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())["task_type"] == "SEQ_CLS"
    merge_adapter(tmp_path / "adapter", tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[:1]).logits, made(IDS[:1]).logits, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_names_no_base_is_refused(make, tmp_path: Path):
    make().save("default", tmp_path / "adapter")
    file = tmp_path / "adapter" / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="names no base"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
