"""A model with five tokens, so that everything it can say can be listed."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from preftune.models.adapters import AdapterSet
from preftune.models.base import Base
from preftune.models.lora import LoraSpec


@pytest.fixture
def five_tokens(tmp_path) -> AdapterSet:
    """A random model over the tokens 0 to 4 with two different adapters: `default` and `other`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    adapters = AdapterSet.create(model, Base("five", tmp_path, None, "0" * 64), LoraSpec(r=4, alpha=8), parent=None)
    shake(adapters, "default", seed=1)
    adapters.copy("other")
    shake(adapters, "other", seed=2)
    return adapters


def shake(adapters: AdapterSet, name: str, seed: int) -> None:
    """Gives an adapter a random change from the base."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.parameters(name):
        parameter.data.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
