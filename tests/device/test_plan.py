"""What `plan` says a step holds on a GPU, against what it holds on the shadow device: real shapes, a few layers."""

from typing import Any

import pytest

pytestmark = pytest.mark.slow

SHAPES = ("qwen3-1.7b", "llama-3.2-3b", "llama-3.1-8b")
ROWS, WIDTH, LAYERS, VOCABULARY = 3, 96, 2, 4096


def _config(name: str) -> Any:
    from preftune.models.tiny import RandomSpec

    config = RandomSpec.read(f"random:{name}?layers={LAYERS}").config()
    # a real vocabulary would take most of the time and memory here
    config.vocab_size = VOCABULARY
    return config


def _rows() -> list[list[int]]:
    return [[7 + n] * WIDTH for n in range(ROWS)]


def held(name: str, quantised: bool, checkpointing: bool) -> int:
    """Bytes at the peak of a forward and backward, weights and adapter included."""
    from pathlib import Path

    import shadow
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    from preftune.models.adapters import DEFAULT, AdapterSet
    from preftune.models.base import Base
    from preftune.models.batching import right_pad
    from preftune.models.lora import LoraSpec
    from preftune.models.packing import use_packed_forward

    class Unpacked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, packed: Any, out: int) -> Any:
            ctx.save_for_backward(packed)
            ctx.out = out
            return nn.functional.linear(x.to(torch.bfloat16), unpacked(packed, out))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0] @ unpacked(ctx.saved_tensors[0], ctx.out), None, None

    def unpacked(packed: Any, out: int) -> Any:
        return torch.zeros(out, packed.numel() * 2 // out, dtype=torch.bfloat16, device=packed.device)

    class FourBit(nn.Linear):
        """Half a byte a weight, unpacked for each product, as bitsandbytes does."""

        def __init__(self, linear: Any) -> None:
            nn.Module.__init__(self)
            self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
            half = torch.zeros(linear.weight.numel() // 2, dtype=torch.uint8, device=linear.weight.device)
            self.weight = nn.Parameter(half, requires_grad=False)

        def forward(self, input: Any) -> Any:
            return Unpacked.apply(input, self.weight, self.out_features)

    before = shadow.peak_bytes()
    model = AutoModelForCausalLM.from_config(_config(name), dtype=torch.bfloat16).requires_grad_(False)
    if quantised:
        for parent in list(model.model.layers.modules()):
            for key, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, key, FourBit(child))
    model = model.cuda()
    use_packed_forward(model.base_model)
    adapters = AdapterSet.create(model, Base("x", Path(), None, ""), LoraSpec(r=16))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapters.model.train()
    ids, mask = right_pad(_rows(), 0, torch.device("cuda"))
    head = adapters.head

    def step() -> None:
        with adapters.using(DEFAULT), torch.autocast("cuda", dtype=torch.bfloat16):
            hidden = adapters.backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            flat = hidden.flatten(0, 1)
            targets = torch.zeros(len(flat), dtype=torch.long, device="cuda")
            logps = head.token_logprobs(flat, targets)[0]
            del hidden, flat
            logps.sum().backward()

    step()  # which also tries what is fastest
    adapters.model.zero_grad()
    shadow.reset_peak()
    step()
    return shadow.peak_bytes() - before


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("quantised", "checkpointing"), [(False, False), (False, True), (True, False)], ids=["bf16", "again", "4bit"]
)
def test_a_plan_is_within_15_percent_of_the_peak(device, name: str, quantised: bool, checkpointing: bool) -> None:
    import torch

    from preftune.models.cost import ADAPTER_BYTES, sizes
    from preftune.models.lora import LoraSpec
    from preftune.models.rehearsal import Batch, Build, policy_step, rehearsed

    # without a compiler, so that attention takes the memory of a kernel and not of its mathematics
    real = device.call(held, {"SHADOW_BACKEND": "none"}, name=name, quantised=quantised, checkpointing=checkpointing)
    config, quantization = _config(name), "4bit" if quantised else None
    size = sizes(config, LoraSpec(r=16), "bfloat16", quantization)
    batch = Batch.of(_rows(), ROWS * WIDTH, packed=True, device="cuda")
    build = Build(config, LoraSpec(r=16), torch.bfloat16, quantization, "cuda", checkpointing)
    (parts,) = rehearsed(build, [policy_step(batch, trl=False)])
    assert size.weight_bytes + size.adapter * ADAPTER_BYTES + parts.total() == pytest.approx(real, rel=0.15)
