"""The estimates of `preftune plan`, against numbers counted by hand."""

from typing import Any

import pytest
from transformers import AutoConfig, GPT2Config

from preftune.models.base import Base
from preftune.models.cost import (
    activation_bytes,
    adapter_parameters,
    parameters_in,
    training_bytes,
    training_flops,
    weight_bytes,
)
from preftune.models.lora import LoraSpec


def test_weights_are_counted_from_the_files(base: Base):
    # random:llama: 264 tokens (tied), hidden 128, 4 layers, 2 of 4 heads hold keys and values, inner 384
    attention = 2 * 128 * 128 + 2 * 128 * 64
    block = attention + 3 * 128 * 384 + 2 * 128
    assert parameters_in(base.path.glob("*.safetensors")) == 264 * 128 + 4 * block + 128
    assert parameters_in([]) == 0


@pytest.mark.parametrize(
    ("lora", "a_block"),
    [
        # q, o: 128 + 128; k, v: 128 + 64; gate, up, down: 128 + 384
        (LoraSpec(r=16), 2 * 256 + 2 * 192 + 3 * 512),
        (LoraSpec(r=16, target_modules=["q_proj", "v_proj"]), 256 + 192),
        (LoraSpec(r=16, target_modules="down_proj"), 512),
    ],
)
def test_an_adapter_of_a_llama_is_rank_times_inputs_and_outputs(base: Base, lora: LoraSpec, a_block: int):
    assert adapter_parameters(AutoConfig.from_pretrained(base.path), lora) == 16 * 4 * a_block


def test_an_adapter_of_another_architecture_is_counted_as_well():
    # GPT-2's blocks: c_attn d -> 3d, c_proj d -> d, c_fc d -> 4d, c_proj 4d -> d
    config = GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        assert adapter_parameters(config, LoraSpec(r=2)) == 2 * 3 * 32 * (4 + 2 + 5 + 5)


def test_flops_and_bytes_by_hand():
    assert training_flops(1_000, tokens=50, passes=3) == 300_000
    shape: dict[str, Any] = {"rows": 2, "tokens": 10, "hidden_size": 8, "layers": 3}
    assert activation_bytes(**shape, dtype="float32") == 2 * 10 * 8 * 3 * 16 * 4
    assert activation_bytes(**shape, dtype="bfloat16") == 2 * 10 * 8 * 3 * 16 * 2
    assert activation_bytes(**shape, dtype="bfloat16", gradient_checkpointing=True) == 1536
    # the base in 16 bits, and fp32 weight, gradient and two moments of each trained parameter
    assert training_bytes(base=2_000, adapter=10, activations=7) == 2_000 + 160 + 7


def test_a_quantised_base_keeps_its_embedding_norms_and_head(base: Base):
    config = AutoConfig.from_pretrained(base.path)
    linear = 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384)
    rest = 264 * 128 + 4 * 2 * 128 + 128
    assert weight_bytes(config, linear + rest, "bfloat16", None) == 2 * (linear + rest)
    assert weight_bytes(config, linear + rest, "bfloat16", "8bit") == linear + 2 * rest
    assert weight_bytes(config, linear + rest, "float32", "4bit") == linear // 2 + 4 * rest
