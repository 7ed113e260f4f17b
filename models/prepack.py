"""Weights laid out once as a CPU's matrix products want them, for as long as many small products use them.

A decode step multiplies a few rows with every weight of the model. From a weight in its plain layout the product first
makes the blocks that it works on, each time again; laid out beforehand a bf16 step takes about half the time.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from . import seams
from .fused_lora import use_fused_lora
from .heads import bias_of
from .lora import merged_weight

Product = Callable[[Tensor], Tensor]
Layer = tuple[nn.Module, nn.Linear]
"""What the model calls, and the linear layer that it stands for."""

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
"""Layers of an attention module that read the same input, by the names that transformers gives them."""


def prepacks(weight_OI: Tensor) -> bool:
    """Whether it is worth it and can be done: bf16 on a CPU with oneDNN. In fp32 the plain product is as fast, and its
    last digit is what everybody else's models give."""
    if weight_OI.device.type != "cpu" or weight_OI.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    seams.require(seams.ONEDNN_BF16)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepack(weight_OI: Tensor, bias_O: Tensor | None = None) -> Product:
    """`F.linear` with this weight, from a copy of it in blocks: x [..., I] -> [..., O]. It has no gradient."""
    seams.require(seams.ONEDNN_LINEAR)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), None)
    linear = torch.ops.mkldnn._linear_pointwise

    def product(x: Tensor) -> Tensor:
        return linear(x, packed, bias_O, "none", [], "")

    return product


@contextmanager
def prepacked(model: nn.Module, role: str | None = None) -> Generator[dict[nn.Module, Product], None, None]:
    """Within it the linear layers of the model that `prepacks` work from such copies, and no weight may change.

    LoRA layers whose adapters are switched off count as their base layer, or as that with the adapter `role` merged
    into it; those whose adapter runs stay as they are. Costs the memory of those weights once more. Yields, by
    attention module, the product of its query, key and value at once [..., their sizes together].
    """
    layers: list[nn.Module] = []
    joint: dict[nn.Module, Product] = {}
    try:
        # what a LoRA layer holds is laid out as the layer's own
        for parent in [module for module in model.modules() if not isinstance(module, LoraLayer)]:
            children = {name: (child, _linear(child)) for name, child in parent.named_children()}
            plain = {name: (child, linear) for name, (child, linear) in children.items() if linear is not None}
            for group in _groups(plain):
                whole, products = _together(group, role)
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


def merges_all(model: nn.Module, role: str) -> bool:
    """Whether `prepacked` merges that adapter wherever it stands."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and role in layer.lora_A]
    plain = [layer.get_base_layer() for layer in layers]
    return all(type(base) is nn.Linear and prepacks(base.weight) for base in plain)


def _linear(layer: nn.Module) -> nn.Linear | None:
    """The plain linear layer that this one is now."""
    if isinstance(layer, LoraLayer) and layer.disable_adapters and not layer.merged:
        layer = layer.get_base_layer()
    return layer if type(layer) is nn.Linear and prepacks(layer.weight) else None


def _groups(plain: dict[str, Layer]) -> list[list[Layer]]:
    """Layers of one parent; those that get the same input stand together."""
    joint = [plain[name] for name in ATTENTION_INPUTS if name in plain]
    if len(joint) < len(ATTENTION_INPUTS) or len({bias_of(linear) is None for _, linear in joint}) > 1:
        return [[layer] for layer in plain.values()]
    return [joint, *([layer] for name, layer in plain.items() if name not in ATTENTION_INPUTS)]


def _together(group: list[Layer], role: str | None) -> tuple[Product, list[Product]]:
    """One product for all of these layers, and one for each: whichever is called first with an input makes them all."""
    weights = [_weight(child, linear, role) for child, linear in group]
    if len(group) == 1:
        alone = prepack(weights[0], group[0][1].bias)
        return alone, [alone]
    biases: list[Tensor] = [bias for _, linear in group if (bias := bias_of(linear)) is not None]
    whole = prepack(torch.cat(weights), torch.cat(biases) if biases else None)
    sizes = [linear.out_features for _, linear in group]
    made: dict[str, Any] = {"of": None}

    def part(i: int) -> Product:
        def product(x: Tensor) -> Tensor:
            if made["of"] is not x:
                made["of"], made["parts"] = x, whole(x).split(sizes, -1)
            return made["parts"][i]

        return product

    return whole, [part(i) for i in range(len(group))]


def _weight(child: nn.Module, linear: nn.Linear, role: str | None) -> Tensor:
    if role is not None and isinstance(child, LoraLayer) and role in child.lora_A:
        return merged_weight(child, role)
    return linear.weight
