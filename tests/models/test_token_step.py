"""The lean decode step, the prefix-tree prefill and the laid-out weights against the models' own forward."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from preftune.models.adapters import AdapterSet
from preftune.models.base import Base
from preftune.models.batching import left_pad
from preftune.models.generate import sample
from preftune.models.loading import resolve_base
from preftune.models.lora import LoraSpec
from preftune.models.packing import packs_now, use_packed_forward
from preftune.models.prefill import prefill
from preftune.models.prepack import prepack, prepacked, prepacks
from preftune.models.token_step import TokenStep

SHAPE: dict[str, Any] = dict(
    vocab_size=300, hidden_size=48, intermediate_size=48, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, pad_token_id=0, eos_token_id=299, bos_token_id=1, max_position_embeddings=512,
)  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, head_dim=8),
    "llama with biases and scaled positions": LlamaConfig(
        **SHAPE,
        head_dim=8,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    ),
    "mistral": MistralConfig(**SHAPE, head_dim=8, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}
PROMPTS = [[5, 6, 7, 8, 9], [40], [90, 12, 33], [7] * 8, [5, 6, 7, 11], [5, 6, 7, 8, 9]]
NEW = 40  # more than the buffers' room to spare, twice


def build(name: str, dtype: torch.dtype = torch.float32, *, packed: bool = True) -> AdapterSet:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa").eval()
    for key, parameter in model.named_parameters():
        if "norm" in key:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif "embed" not in key:
            torch.nn.init.normal_(parameter, std=0.2)
    if packed:
        use_packed_forward(model.base_model)
    base = Base("x", resolve_base("random:llama").path, "local", "")
    return AdapterSet.create(model.to(dtype), base, LoraSpec(r=2, alpha=4))


def head_weight(adapters: AdapterSet) -> torch.Tensor:
    weight = adapters.lm_head.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def draw(adapters: AdapterSet, batch_size: int = 4, **changes):
    settings: dict[str, Any] = dict(max_new_tokens=NEW, temperature=0, seed=0, eos_token_id=-1, pad_token_id=0)
    return sample(adapters, None, PROMPTS, batch_size=batch_size, **(settings | changes))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_generate_token_by_token(name, packed):
    adapters = build(name, packed=packed)
    assert TokenStep.applies(adapters.backbone)
    ids, mask = left_pad(PROMPTS, 0, torch.device("cpu"))
    expected = adapters.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
    )[:, ids.size(1) :].tolist()
    assert len({tuple(row) for row in expected}) > 3
    for batch_size in (1, 4, 8):
        assert draw(adapters, batch_size).tokens == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_are_those_of_one_forward_over_the_whole_row(name):
    adapters = build(name)
    out = draw(adapters, temperature=0.8)
    for prompt, tokens, logps in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        with torch.no_grad(), adapters.using(None):
            logits = adapters.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / 0.8, -1).gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(logps), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_in_bf16_the_noise_is_that_of_the_models_own_forward(name, monkeypatch):
    """Both against fp32: the sampler's error is not larger than that of one plain bf16 forward."""
    low, exact = build(name, torch.bfloat16), build(name, torch.bfloat16)
    exact.model.float()
    out = draw(low, temperature=0.8)
    ours, theirs = [], []
    for prompt, tokens, logps in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        ids, at = torch.tensor([prompt + tokens]), torch.tensor(tokens)[:, None]
        with torch.no_grad():
            found = []
            for adapters in (low, exact):
                with adapters.using(None):
                    logits = adapters.model(ids).logits[0, len(prompt) - 1 : -1].float()
                found.append(torch.log_softmax(logits / 0.8, -1).gather(1, at).squeeze(1))
        ours.append((torch.tensor(logps) - found[1]).abs().mean())
        theirs.append((found[0] - found[1]).abs().mean())
    assert 0 < torch.stack(ours).mean() < 1.3 * torch.stack(theirs).mean()


def test_models_that_are_not_listed_or_have_hooks_keep_their_own_step():
    backbone = build("llama").backbone
    assert TokenStep.applies(backbone)
    handle = backbone.get_submodule("layers.0.mlp").register_forward_hook(lambda *_: None)
    assert not TokenStep.applies(backbone)
    handle.remove()
    config = MistralConfig(**SHAPE, head_dim=8, sliding_window=4)
    assert not TokenStep.applies(AutoModelForCausalLM.from_config(config).base_model)


def test_prefilled_prompts_share_their_beginnings(monkeypatch):
    """Six prompts of 26 tokens, two of them equal and one that begins as they do, are 18 tokens of a tree."""
    monkeypatch.setattr("preftune.models.packing.rounded", lambda tree: tree)
    backbone, lengths = build("llama").backbone, []
    assert packs_now(backbone, torch.device("cpu"))  # the probe's rows are not counted
    first = backbone.get_submodule("layers.0")
    plain = first.forward
    first.forward = lambda hidden, *args, **kwargs: (
        lengths.append(tuple(hidden.shape[:2])) or plain(hidden, *args, **kwargs)
    )
    with torch.no_grad():
        made = prefill(backbone, PROMPTS, 0, torch.device("cpu"))
    assert lengths == [(1, 5 + 1 + 3 + 8 + 1)]
    assert made.length_B.tolist() == [5, 1, 3, 8, 4]
    assert made.rows(PROMPTS).tolist() == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize("bias", [True, False])
def test_a_laid_out_weight_gives_the_same_product(bias):
    layer = torch.nn.Linear(24, 40, bias=bias, dtype=torch.bfloat16)
    if not prepacks(layer.weight):
        pytest.skip("no oneDNN with bf16 here")
    product = prepack(layer.weight, layer.bias)
    with torch.no_grad():
        for shape in ((5, 24), (2, 3, 24)):
            x = torch.randn(shape, dtype=torch.bfloat16)
            torch.testing.assert_close(product(x), layer(x), rtol=1e-2, atol=1e-2)


def test_laid_out_weights_are_gone_afterwards():
    """The forward of every layer is the one it had, and what the model says is bit for bit what it was."""
    adapters = build("qwen2", torch.bfloat16)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), adapters.using("default"):
        before = adapters.model(ids).logits
    with adapters.using(None), prepacked(adapters.backbone) as joint:
        assert len(joint) == (3 if prepacks(head_weight(adapters)) else 0)
    with torch.no_grad(), adapters.using("default"):
        assert torch.equal(adapters.model(ids).logits, before)
    assert not any("forward" in m.__dict__ for m in adapters.model.modules() if type(m) is torch.nn.Linear)


def test_every_weight_is_laid_out_once(monkeypatch):
    """A LoRA layer with its adapter merged into it, and not its base layer besides."""
    adapters = build("qwen2", torch.bfloat16)
    if not prepacks(head_weight(adapters)):
        pytest.skip("no oneDNN with bf16 here")
    laid_out = []
    monkeypatch.setattr(
        "preftune.models.prepack.prepack", lambda weight, bias=None: laid_out.append(weight.numel()) or prepack(weight)
    )
    with adapters.using(None), prepacked(adapters.backbone, "default"):
        pass
    linear = [m.weight.numel() for m in adapters.backbone.modules() if type(m) is torch.nn.Linear]
    factors = [
        m.weight.numel()
        for name, m in adapters.backbone.named_modules()
        if ".lora_" in name and isinstance(m, torch.nn.Linear)
    ]
    assert sum(laid_out) == sum(linear) - sum(factors)
