"""An adapter merged into its base is base + adapter, rounded once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from preftune.errors import UserError
from preftune.files import ADAPTER_CONFIG
from preftune.models.base import Base
from preftune.models.lora import LoraSpec, lora_layers, lora_state
from preftune.models.merging import merge_adapter
from preftune.models.reward_model import create_reward_model, save_reward_model

from .conftest import IDS, logits


def tied(base: Base) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    assert model.config.tie_word_embeddings
    return model


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
        step = torch.finfo(torch.bfloat16).eps * tensor.abs()
        assert bool(((rounded[name].float() - tensor).abs() <= step).all()), name
    # what the adapter does not change is rounded to the nearest
    assert torch.equal(rounded["model.embed_tokens.weight"], exact["model.embed_tokens.weight"].bfloat16())


MERGEABLE = {
    "DoRA": LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "ranks of its own": LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"q_proj": 2}, task_type="CAUSAL_LM"),
    "tied head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    "tied embedding": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM"),
    "both": LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"),
    "whole modules": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "IA3": IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
}


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`", "ignore:Model with"
)
@pytest.mark.parametrize("kind", MERGEABLE)
def test_whatever_peft_can_merge_is_merged_exactly_even_into_tied_weights(base: Base, tmp_path: Path, kind: str):
    model: Any = get_peft_model(tied(base), MERGEABLE[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(tied(base), str(tmp_path / "adapter")).eval()(IDS).logits
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_what_cannot_be_merged_is_refused(base: Base, tmp_path: Path):
    model: Any = get_peft_model(tied(base), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="PREFIX_TUNING adapter, which PEFT cannot merge"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_cost_is_measured_on_the_rows_that_are_given(make, tmp_path: Path):
    make().save("default", tmp_path / "adapter")
    rows = [(row, [-100, *row[1:]]) for row in IDS.tolist()]
    costs = {}
    for dtype in ("float32", "bfloat16"):
        costs[dtype] = merge_adapter(tmp_path / "adapter", tmp_path / dtype, dtype, rows).cost
    for cost in costs.values():
        assert cost is not None and cost.tokens == 12
    assert costs["float32"].difference < 1e-5 < costs["bfloat16"].difference
    assert costs["float32"].exact == costs["bfloat16"].exact
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16", dtype=torch.bfloat16).eval()
        logps = model(IDS).logits.float().log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])
    assert costs["bfloat16"].merged == pytest.approx(-float(logps.mean()), rel=1e-3)


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
