"""Weights laid out once as a CPU's matrix products want them, for as long as many small products use them.

A decode step multiplies a few rows with every weight of the model. From a weight in its plain layout the product first
makes the blocks that it works on, each time again; laid out beforehand a bf16 step takes about half the time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .fused_lora import use_fused_lora

Product = Callable[[Tensor], Tensor]
Layer = tuple[nn.Module, nn.Linear]
"""What the model calls, and the linear layer that it stands for."""

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
"""Layers of an attention module that read the same input, by the names that transformers gives them."""


def prepacks(weight_OI: Tensor) -> bool:
    """Whether it is worth it and can be done: bf16 on a CPU with oneDNN. In fp32 the plain product is as fast, and its
    last digit is what everybody else's models give."""
    return (
        weight_OI.device.type == "cpu"
        and weight_OI.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def prepack(weight_OI: Tensor, bias_O: Tensor | None = None) -> Product:
    """`F.linear` with this weight, from a copy of it in blocks: x [..., I] -> [..., O]. It has no gradient."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), None)
    linear, dtype = torch.ops.mkldnn._linear_pointwise, weight_OI.dtype

    def product(x: Tensor) -> Tensor:
        if x.dtype != dtype:
            return F.linear(x, weight_OI, bias_O)
        return linear(x, packed, bias_O, "none", [], "")

    return product


@contextmanager
def prepacked(model: nn.Module) -> Iterator[dict[nn.Module, Product]]:
    """Within it the linear layers of the model that `prepacks` work from such copies, and no weight may change.

    LoRA layers whose adapters are switched off count as their base layer; those whose adapter runs stay as they are.
    Costs the memory of those weights once more. Yields, by attention module, the product of its query, key and value
    at once [..., their sizes together].
    """
    layers: list[nn.Module] = []
    joint: dict[nn.Module, Product] = {}
    try:
        for parent in list(model.modules()):
            children = {name: (child, _linear(child)) for name, child in parent.named_children()}
            plain = {name: (child, linear) for name, (child, linear) in children.items() if linear is not None}
            for group in _groups(plain):
                whole, products = _together([linear for _, linear in group])
                if len(group) > 1:
                    joint[parent] = whole
                for (child, _), product in zip(group, products, strict=True):
                    child.forward = product
                    layers.append(child)
        yield joint
    finally:
        for layer in layers:
            layer.__dict__.pop("forward")
            if isinstance(layer, LoraLayer):
                use_fused_lora(layer)


def _linear(layer: nn.Module) -> nn.Linear | None:
    """The plain linear layer that this one is now."""
    if isinstance(layer, LoraLayer) and layer.disable_adapters and not layer.merged:
        layer = layer.get_base_layer()
    return layer if type(layer) is nn.Linear and prepacks(layer.weight) else None


def _groups(plain: dict[str, Layer]) -> list[list[Layer]]:
    """Layers of one parent; those that get the same input stand together."""
    joint = [plain[name] for name in ATTENTION_INPUTS if name in plain]
    if len(joint) < len(ATTENTION_INPUTS) or len({linear.bias is None for _, linear in joint}) > 1:
        return [[layer] for layer in plain.values()]
    return [joint, *([layer] for name, layer in plain.items() if name not in ATTENTION_INPUTS)]


def _together(linears: list[nn.Linear]) -> tuple[Product, list[Product]]:
    """One product for all of these layers, and one for each: whichever is called first with an input makes them all."""
    if len(linears) == 1:
        alone = prepack(linears[0].weight, linears[0].bias)
        return alone, [alone]
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    weights: list[Tensor] = [linear.weight for linear in linears]
    whole = prepack(torch.cat(weights), torch.cat(biases) if biases else None)
    sizes = [linear.out_features for linear in linears]
    made: dict[str, Any] = {"of": None}

    def part(i: int) -> Product:
        def product(x: Tensor) -> Tensor:
            if made["of"] is not x:
                made["of"], made["parts"] = x, whole(x).split(sizes, -1)
            return made["parts"][i]

        return product

    return whole, [part(i) for i in range(len(linears))]
