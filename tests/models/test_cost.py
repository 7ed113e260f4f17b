"""What a model costs, against numbers counted by hand."""

import math

import pytest
from transformers import AutoConfig, GPT2Config, LlamaConfig

from preftune.models.base import Base
from preftune.models.cards import CARDS, card_named, room
from preftune.models.cost import (
    adapter_parameters,
    is_paged,
    kv_bytes,
    optimiser_bytes,
    rows_at_once,
    sizes,
    training_flops,
)
from preftune.models.lora import LoraSpec
from preftune.models.outline import outline
from preftune.models.tiny import RandomSpec

# random:llama: 264 tokens (tied), hidden 128, 4 layers, 2 of 4 heads hold keys and values, inner 384
LINEAR = 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384)
EMBEDDING, NORMS = 264 * 128, 4 * 2 * 128 + 128


def test_a_model_is_counted_from_its_config(base: Base):
    found = sizes(AutoConfig.from_pretrained(base.path), LoraSpec(r=16), "bfloat16")
    assert found.parameters == LINEAR + EMBEDDING + NORMS
    assert (found.decoder, found.head) == (LINEAR + NORMS, EMBEDDING)
    assert found.weight_bytes == 2 * found.parameters
    assert found.adapted_bytes == 2 * LINEAR
    assert found.linear_bytes == 2 * (LINEAR + EMBEDDING)
    assert found.largest_layer_bytes == 2 * (LINEAR // 4 + 2 * 128)
    # keys and values of 2 heads of 32 in 4 layers
    assert found.kv_bytes == 2 * 4 * 2 * 32 * 2 == kv_bytes(AutoConfig.from_pretrained(base.path), 2)


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


def test_a_quantised_base_keeps_its_embedding_norms_and_head():
    config = RandomSpec.read("random:llama").config()
    rest = EMBEDDING + NORMS
    assert sizes(config, LoraSpec(), "bfloat16", "8bit").weight_bytes == LINEAR + 2 * rest
    # nf4: a byte a block of 64 for its scale, and 4 for 256 of these
    four = LINEAR * (0.5 + 1 / 64 + 4 / (64 * 256))
    assert sizes(config, LoraSpec(), "float32", "4bit").weight_bytes == round(four + 4 * rest)


def test_flops_and_optimisers_by_hand(base: Base):
    found = sizes(AutoConfig.from_pretrained(base.path), LoraSpec(), "float32")
    assert training_flops(found, tokens=50, passes=3) == 300 * (LINEAR + NORMS)
    assert training_flops(found, 50, 3, scored=10, head_passes=2) == 300 * (LINEAR + NORMS) + 40 * EMBEDDING
    assert [optimiser_bytes(name) for name in ("adamw_torch_fused", "paged_adamw_8bit", "sgd")] == [8, 2, 0]
    # by the numbers that each keeps of a parameter: one, three, two of half a byte
    assert [optimiser_bytes(name) for name in ("lion_8bit", "ademamix", "adamw_torch_4bit")] == [1, 12, 1]
    assert is_paged("paged_adamw_32bit") and not is_paged("adamw_bnb_8bit")


def test_cards_are_found_as_people_write_them():
    assert card_named("RTX 4090") == card_named("NVIDIA GeForce RTX-4090") == card_named("rtx-4090")
    assert len({card.name for card in CARDS}) == len(CARDS)
    with pytest.raises(Exception, match="did you mean 'rtx-4090'"):
        card_named("rtx 4080")
    assert 0.9 * 24e9 < room(24 * 10**9) < 23e9
    # what a plan says of 24, 48 and 80 GB holds for each card that is sold with so many
    for size, names in (
        (24, ("rtx-3090", "rtx-4090", "a10g", "l4")),
        (48, ("a6000", "l40s")),
        (80, ("a100-80gb", "h100")),
    ):
        assert all(size * 10**9 <= card_named(name).memory < 1.08 * size * 10**9 for name in names)


def test_an_outline_needs_a_config_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    found = outline("random:llama-3.1-8b")
    assert found.tokenizer is not None and found.config.num_hidden_layers == 32
    assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file()) < 1e6
    found.config.save_pretrained(tmp_path / "bare")
    assert outline(str(tmp_path / "bare")).tokenizer is None
    large = sizes(outline(str(tmp_path / "bare")).config, LoraSpec(r=8), "bfloat16")
    assert math.isclose(large.weight_bytes, 16.06e9, rel_tol=0.001)


@pytest.mark.parametrize(
    ("layers", "heads", "columns", "rows"),
    [
        (30, 3, 192, 128),  # SmolLM2-135M: 23,040 bytes a token
        (32, 8, 256, 64),  # Llama 3 8B: 131,072 bytes a token, so 2^31 / 2^17 / 256
        (32, 8, 1024, 32),  # 16 would be in 2 GiB
    ],
)
def test_a_cpu_decodes_as_many_rows_as_two_gibibytes_hold_from_32_to_128(
    layers: int, heads: int, columns: int, rows: int
):
    config = LlamaConfig(num_hidden_layers=layers, num_key_value_heads=heads, head_dim=64 if heads == 3 else 128)
    assert rows_at_once(config, 2, columns) == rows
