"""What it takes to train a LoRA adapter, estimated before anything runs: parameters, FLOPs and memory."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModelForCausalLM
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig

from . import seams
from .lora import LoraSpec
from .quiet import quiet_transformers

with seams.importing(seams.CONV1D):
    from transformers.pytorch_utils import Conv1D

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of one number of that dtype."""

_QUANTIZED = {"4bit": 0.5, "8bit": 1.0}
"""Bytes of a quantised weight; the scales of its blocks are some hundredths of that."""

_ADAPTER_BYTES = 16
"""Of one trained parameter: fp32 weight, gradient, and AdamW's two moments."""

_KEPT = 16
"""Vectors of the hidden size that the backward pass keeps of each token and block, the residual stream included."""


def weight_bytes(config: PreTrainedConfig, parameters: int, dtype: str, quantization: str | None) -> int:
    """Bytes of a frozen base: quantised linear layers, and embeddings, norms and head in `dtype`.

    Args:
        parameters: of the base.
    """
    if quantization is None:
        return parameters * BYTES[dtype]
    with torch.device("meta"), quiet_transformers():
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = (each for each in model.modules() if isinstance(each, (torch.nn.Linear, Conv1D)) and each is not head)
    small = min(sum(each.weight.numel() for each in linear), parameters)
    return round(small * _QUANTIZED[quantization]) + (parameters - small) * BYTES[dtype]


def parameters_in(files: Iterable[Path]) -> int:
    """The number of weights in safetensors files, read from their headers alone."""
    total = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def adapter_parameters(config: PreTrainedConfig, lora: LoraSpec) -> int:
    """The number of weights in a LoRA adapter for a model of that architecture: r * (inputs + outputs) a linear layer.

    Counted in PEFT's own adapter on a model without memory (torch's meta device), so it holds for every architecture
    and every choice of target modules.
    """
    with torch.device("meta"), quiet_transformers():
        model = AutoModelForCausalLM.from_config(config)
        adapted = PeftModelForCausalLM(model, lora.config(model, "CAUSAL_LM"))
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def training_flops(parameters: int, tokens: float, passes: float) -> float:
    """FLOPs of taking `tokens` through a model that many times: 2 a parameter, token and pass (arXiv 2001.08361).

    Args:
        passes: a forward is one; the backward through a frozen model, which only carries gradients to the adapter's
            layers, is another one.
    """
    return 2 * parameters * tokens * passes


def activation_bytes(
    *, rows: int, tokens: int, hidden_size: int, layers: int, dtype: str, gradient_checkpointing: bool = False
) -> int:
    """Bytes that the forward keeps for the backward.

    Args:
        rows: sequences in one micro-batch; a pair is two.
        tokens: of each.
        gradient_checkpointing: a tenth is kept then, and the rest is computed a second time.
    """
    kept = rows * tokens * hidden_size * layers * _KEPT * BYTES[dtype]
    return kept // 10 if gradient_checkpointing else kept


def training_bytes(*, base: int, adapter: int, activations: int) -> int:
    """Bytes in use while an adapter is trained: the frozen base, the adapter with its optimiser, the activations.

    Args:
        base: its bytes (`weight_bytes`).
        adapter: its parameters, held in fp32 with gradient and AdamW's state.
        activations: see `activation_bytes`.
    """
    return base + adapter * _ADAPTER_BYTES + activations
