"""Reward models of architectures for which transformers has no sequence classifier."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    FalconH1Config,
    Llama4TextConfig,
    MambaConfig,
)

from preftune.models.adapters import AdapterSet
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import LoraSpec, lora_layers, lora_state
from preftune.models.reward_model import create_reward_model, save_reward_model
from preftune.models.tiny import byte_tokenizer
from preftune.models.tokens import load_tokenizer, prepare_model

HEADS = {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (CohereConfig, HEADS),
        # its output has no field for a cache that the general head would know
        (MambaConfig, {"state_size": 4}),
        # it names its decoder by a prefix that is another class'
        (Llama4TextConfig, HEADS | {"intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 16}),
    ],
)
def test_a_decoder_without_a_classifier_gets_one_that_plain_peft_loads(kind: Any, settings: Any, tmp_path: Path):
    tokenizer: Any = byte_tokenizer()
    config = kind(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **settings,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = resolve_base(str(tmp_path / "base"))
    tokenizer = load_tokenizer(base)
    made = create_reward_model(base, tokenizer, LoraSpec(r=2, alpha=4)).eval()
    for name, parameter in lora_state(lora_layers(made), "default").items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_reward_model(made, base, tmp_path / "reward")
    ids = torch.tensor([[20, 21, 22, 23]])
    plain = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=1, dtype=torch.float32)
    prepare_model(plain, tokenizer)
    alone = AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "reward"), num_labels=1)
    beside = AdapterSet.create(load_model(base), base, LoraSpec(r=2, alpha=4))
    beside.load("reward", tmp_path / "reward")
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(plain, str(tmp_path / "reward")).eval()(ids).logits
        torch.testing.assert_close(made(ids).logits, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.eval()(ids).logits, wanted, rtol=0, atol=1e-5)
        found = beside.heads["reward"](beside.hidden("reward", ids, torch.ones_like(ids)))[:, -1:]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_buffers_that_a_decoder_fills_for_its_layers_are_filled(tmp_path: Path):
    """Falcon-H1's multipliers are not among the stored weights."""
    tokenizer: Any = byte_tokenizer()
    sizes: dict[str, Any] = {
        **HEADS,
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16, "mamba_d_ssm": 32},
        **{"mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1},
        "ssm_multipliers": [0.5, 2.0, 3.0, 0.25, 0.75],
    }
    config = FalconH1Config(**sizes)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = resolve_base(str(tmp_path))
    buffers = dict(load_model(base, task="reward").named_buffers())
    wanted = {name: each for name, each in load_model(base).named_buffers() if "mup_vector" in name}
    assert len(wanted) == 2
    for name, each in wanted.items():
        torch.testing.assert_close(buffers[name], each, rtol=0, atol=0)
