"""A divided base, in a group of one process: that several give the same is shown in tests/cli/test_engines.py."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch._C._distributed_c10d import FileStore
from transformers import LlamaConfig, LlamaForCausalLM

from preftune.errors import UserError
from preftune.models.adapters import DEFAULT, AdapterSet
from preftune.models.base import Base
from preftune.models.logprobs import LmHead
from preftune.models.lora import LoraSpec
from preftune.models.quantised import QuantisedLinear, pack
from preftune.models.sharded import is_sharded, shard_base, whole_layers
from preftune.models.token_step import TokenStep

IDS = torch.tensor([[1, 5, 9, 3]])


@pytest.fixture
def group(tmp_path: Path) -> Generator[None]:
    torch.distributed.init_process_group("gloo", store=FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def llama(tied: bool) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    config = LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).requires_grad_(False).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_divided_base_computes_what_a_whole_one_does(group: None, tied: bool) -> None:
    whole, model = llama(tied), llama(tied)
    shard_base(model, model.model)
    assert is_sharded(model.model)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    expected = whole(input_ids=IDS)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected.logits)
        hidden = model.model(input_ids=IDS).last_hidden_state[0]
        # our head reads the weight beside its module
        ours = LmHead.of(head, model.config).logits(hidden)
    torch.testing.assert_close(ours, expected.logits[0])
    assert type(embed.weight.data).__name__ == type(head.weight.data).__name__ == "DTensor"
    assert (embed.weight is head.weight) is tied


def test_decoding_takes_the_steps_of_a_base_that_is_not_divided(group: None) -> None:
    model = llama(tied=True)
    assert TokenStep.applies(model.model)
    shard_base(model, model.model)
    assert not TokenStep.applies(model.model)  # what gathers its layers are hooks
    before = dict(model.model.layers[0]._forward_pre_hooks)
    with whole_layers(model.model):
        assert TokenStep.applies(model.model)
        weights = [model.model.embed_tokens.weight, model.lm_head.weight, model.model.layers[1].mlp.up_proj.weight]
        assert all(type(each) is torch.nn.Parameter and not hasattr(each, "to_local") for each in weights)
        with torch.no_grad():
            logits = model(input_ids=IDS).logits
    assert torch.equal(logits, llama(tied=True)(input_ids=IDS).logits)
    assert dict(model.model.layers[0]._forward_pre_hooks) == before and before
    assert hasattr(model.model.embed_tokens.weight, "to_local") and hasattr(model.lm_head.weight, "to_local")
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, logits)


@pytest.mark.checklist("Q6")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_q06_a_divided_packed_base_computes_what_a_whole_one_does(group: None, bits: str) -> None:
    """Forward and backward, bit for bit; what it holds of packed weights and their scales is a share of them."""
    whole, model = llama(True), llama(True)
    for each in (whole, model):
        pack(each, bits)
    shard_base(model, model.model)
    layer: Any = model.model.layers[1].mlp.up_proj
    assert isinstance(layer, QuantisedLinear)
    assert {type(each.data).__name__ for each in layer.parameters()} == {"DTensor"}
    found: list[torch.Tensor] = []
    for each in (whole, model):
        adapters = AdapterSet.create(each, Base("b", Path("b"), None, ""), LoraSpec(r=2, alpha=4))
        for name, parameter in adapters.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        out = adapters.model(input_ids=IDS).logits
        out.logsumexp(-1).sum().backward()
        grads = [parameter.grad for parameter in adapters.parameters(DEFAULT)]
        found += [out.detach(), *(grad for grad in grads if grad is not None)]
    half = len(found) // 2
    assert half == 29 and all(torch.equal(a, b) for a, b in zip(found[:half], found[half:], strict=True))


def test_a_base_that_is_packed_otherwise_is_refused(group: None) -> None:
    model = llama(True)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(24, 16, dtype=torch.int8), False)
    with pytest.raises(UserError, match="a base that is quantised so cannot be divided among processes"):
        shard_base(model, model.model)
