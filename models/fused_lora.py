"""A LoRA layer in as few passes over memory as it can be: y = x W' + (scaling * x A') B', gradients by hand.

PEFT's own forward casts the input to the adapter's dtype, makes the update as a matrix of the output's size, scales it
and adds it: four passes over activations that the base's product has just written. Here the update is added by the
product itself, and only the thin [N, r] matrix is scaled. W is frozen, so its gradient is never made; a packed one is
unpacked for each product and never kept.

Legend of shape suffixes: N tokens, I input size, O output size, R rank.
"""

import types
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import seams
from .heads import bias_of
from .quantised import QuantisedLinear

with seams.importing(seams.LORA_LAYER):
    from peft.tuners.lora.layer import Linear as LoraLinear
with seams.importing(seams.FAKE_TENSORS):
    from torch._subclasses.fake_tensor import FakeTensor


def use_fused_lora(model: nn.Module) -> None:
    """Give every LoRA layer on a plain frozen `nn.Linear`, or a packed one, the fused forward. Calling it twice changes
    nothing.

    Which adapter is active is looked at on each call; whatever is more than one plain LoRA in one dtype goes to PEFT's
    own forward: several active adapters, dropout, DoRA and other variants, merged weights.
    """
    for module in model.modules():
        if isinstance(module, LoraLinear):
            seams.require(seams.LORA_LAYER, module)
        if type(module) is LoraLinear and _takes(module.get_base_layer()):
            module.forward = types.MethodType(_forward, module)


def _takes(base: nn.Module) -> bool:
    return type(base) is nn.Linear or isinstance(base, QuantisedLinear)


def _forward(self: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base = cast(nn.Linear, self.get_base_layer())
    if self.disable_adapters and not self.merged:
        return base(x)
    fused = None if args or kwargs else _parts(self, x)
    if fused is None:
        return LoraLinear.forward(self, x, *args, **kwargs)
    a_RI, b_OR, scaling, dtype = fused
    weight = base if isinstance(base, QuantisedLinear) else base.weight.to(dtype)
    y_NO = _FusedLora.apply(
        x.reshape(-1, x.shape[-1]).to(dtype), weight, base.bias, a_RI.to(dtype), b_OR.to(dtype), scaling
    )
    return y_NO.view(*x.shape[:-1], -1)


def _parts(layer: LoraLinear, x: Tensor) -> tuple[Tensor, Tensor, float, torch.dtype] | None:
    """A, B, scaling and the dtype to compute in; None where PEFT's own forward is needed."""
    names = layer.active_adapters
    if layer.merged or len(names) != 1 or names[0] not in layer.lora_A:
        return None
    name = names[0]
    dropout = layer.lora_dropout[name]
    if name in layer.lora_variant or (dropout.training and getattr(dropout, "p", 0.0) > 0):
        return None
    down, up = cast(nn.Linear, layer.lora_A[name]), cast(nn.Linear, layer.lora_B[name])
    base, a_RI, b_OR = cast(nn.Linear, layer.get_base_layer()), down.weight, up.weight
    weight, packed = base.weight, isinstance(base, QuantisedLinear)
    # ZeRO-3 brings a weight back when its own module is called, and FSDP's shards are no plain tensors
    parts = (a_RI, b_OR) if packed else (weight, a_RI, b_OR)
    if weight.requires_grad or hasattr(weight, "ds_id") or not all(_plain(each) for each in parts):
        return None
    if bias_of(down) is not None or bias_of(up) is not None:
        return None
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    elif x.dtype == (base.dtype if packed else weight.dtype) == a_RI.dtype == b_OR.dtype:
        dtype = x.dtype
    else:
        return None
    return a_RI, b_OR, layer.scaling[name], dtype


def _plain(tensor: Tensor) -> bool:
    # a plan's tensors have no content, and the shapes of plain ones
    return type(tensor) in (Tensor, nn.Parameter, FakeTensor) and tensor.is_floating_point()


class _FusedLora(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]: autograd's own takes any arguments
        ctx: Any,
        x_NI: Tensor,
        weight: Tensor | QuantisedLinear,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
    ) -> Tensor:
        down_NR = torch.mm(x_NI, a_RI.t()).mul_(scaling)
        packed = isinstance(weight, QuantisedLinear)
        weight_OI = weight.unpacked().to(x_NI.dtype) if packed else weight
        y_NO = torch.nn.functional.linear(x_NI, weight_OI, bias_O)
        ctx.save_for_backward(x_NI, None if packed else weight_OI, a_RI, b_OR, down_NR)
        # the layer and not its weight: where that is divided among processes, it is gathered again in the backward
        ctx.layer, ctx.scaling = weight if packed else None, scaling
        return y_NO.addmm_(down_NR, b_OR.t())

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: autograd's own takes any arguments
        ctx: Any, grad_NO: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, a_RI, b_OR, down_NR = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        grad_down_NR = torch.mm(grad_NO, b_OR).mul_(ctx.scaling)
        grad_a_RI = torch.mm(grad_down_NR.t(), x_NI) if needs_a else None
        grad_b_OR = torch.mm(grad_NO.t(), down_NR) if needs_b else None
        grad_x_NI = None
        if needs_x:
            weight_OI = weight_OI if ctx.layer is None else ctx.layer.unpacked().to(grad_NO.dtype)
            grad_x_NI = torch.mm(grad_NO, weight_OI).addmm_(grad_down_NR, a_RI)
        return grad_x_NI, None, None, grad_a_RI, grad_b_OR, None
