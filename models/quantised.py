"""A base in 4 or 8 bits: frozen linear layers whose packed weights are unpacked for each product.

bitsandbytes packs and unpacks them; the product is ours, one for a GPU and a CPU, for training and for decoding. Its
own layers compute otherwise where nothing trains: on a CPU in 4 bits they round the scales to bfloat16, for good, and
in 8 bits they round the inputs as well, by what the batch's other rows hold. A policy would not be its reference at its
first step then, nor a reply's log-probs those that it was drawn with. Unpacked before each product, a quantised base is
an ordinary base with other weights, and what holds of any base holds of it.

Legend of shape suffixes: I input size, O output size, P packed bytes, B blocks of 64 weights, S blocks of 256 scales.
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import UserError
from . import seams
from .heads import bias_of


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose `weight` is packed. All that it holds are parameters, so that whatever moves, hashes
    or divides a model's parameters finds it.

    Attributes:
        weight: the packed weights, in whatever shape.
        dtype: that they unpack to: the one that they had before.
    """

    dtype: torch.dtype

    def __init__(self, shape: tuple[int, int], weight: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        (self.out_features, self.in_features), self.dtype = shape, dtype
        self.weight = _frozen(weight)
        self.register_parameter("bias", bias)

    def unpacked(self) -> Tensor:
        """The weights [O, I]."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return _Product.apply(input if low is None else input.to(low), self)

    def plain(self) -> nn.Linear:
        """An ordinary layer with the weights unpacked."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight = _frozen(self.unpacked())
        made.register_parameter("bias", cast("nn.Parameter | None", self.bias))
        return made


class FourBitLinear(QuantisedLinear):
    """4 bits a weight and a scale for each block of them (QLoRA, arXiv 2305.14314, section 3: NormalFloat and double
    quantisation).

    Attributes:
        weight: two weights a byte [P, 1].
        absmax: each block's scale [B]: its place in `scale_code`, in blocks of `scale_block` with a scale of their own,
            `scale_absmax` [S], less their mean, `offset` [1]; or, without those, itself.
    """

    def __init__(self, layer: Any) -> None:
        packed = layer.weight
        state = packed.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            said = "its 4-bit layers have computed without training, for which bitsandbytes has rounded their scales"
            raise UserError("model", said, "pass the model as it was loaded, before its first forward")
        super().__init__((layer.out_features, layer.in_features), packed.data, layer.bias, state.dtype)
        self.block, self.code, self.absmax = int(state.blocksize), str(state.quant_type), _frozen(state.absmax)
        self.nested = state.state2 is not None
        if self.nested:
            self.scale_block: int = state.state2.blocksize
            self.scale_code, self.scale_absmax = _frozen(state.state2.code), _frozen(state.state2.absmax)
            self.offset = _frozen(state.offset.reshape(1))

    def unpacked(self) -> Tensor:
        unpack = torch.ops.bitsandbytes
        absmax_B: Tensor = self.absmax
        if self.nested:
            absmax_B = unpack.dequantize_blockwise(
                absmax_B, self.scale_absmax, self.scale_code, self.scale_block, torch.float32
            )
            absmax_B = absmax_B + self.offset
        count = self.out_features * self.in_features
        # as one row: of rows that do not end with a block its kernel for CPUs (0.50) takes the wrong scales
        row = unpack.dequantize_4bit(self.weight, absmax_B, self.block, self.code, (count,), self.dtype)
        return row.view(self.out_features, self.in_features)


class EightBitLinear(QuantisedLinear):
    """A signed byte a weight and a scale for each row (LLM.int8(), arXiv 2208.07339, section 2.1, vector-wise); inputs
    stay as they are.

    Attributes:
        weight: [O, I].
        absmax: each row's largest weight [O], fp32, which is 127.
    """

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        packed, state = layer.weight, layer.state
        super().__init__((layer.out_features, layer.in_features), packed.data, layer.bias, dtype)
        # from the first forward on it lies in the state
        self.absmax = _frozen((packed.SCB if packed.SCB is not None else state.SCB).float())

    def unpacked(self) -> Tensor:
        return (self.weight * (self.absmax / 127)[:, None]).to(self.dtype)


class _Product(torch.autograd.Function):
    """x W' + b, of which the unpacked W is not kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]: autograd's own takes any arguments
        # the layer and not its weight: where that is divided among processes, it is gathered again in the backward
        ctx.layer = layer
        bias = bias_of(layer)
        return F.linear(x, layer.unpacked().to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]: autograd's own takes any arguments
        return grad @ ctx.layer.unpacked().to(grad.dtype), None


def hold_packed(model: nn.Module) -> bool:
    """Put ours in the place of bitsandbytes' linear layers, wherever they are in the model, with the weights that they
    hold; nothing is copied. Whether there were any.

    A transformers model loses its marks of a quantised one: by them libraries would round adapters to 16 bits, and
    refuse to move what moves like any other model.

    Raises:
        UserError: bitsandbytes has changed the weights already, in a forward.
    """
    # where it has not been imported, no model has layers of its
    library: Any = sys.modules.get("bitsandbytes")
    if library is None:
        return False
    kinds: tuple[type, type] = (library.nn.Linear4bit, library.nn.Linear8bitLt)
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)

    def ours(layer: Any) -> QuantisedLinear:
        seams.check(seams.PACKED_WEIGHTS, layer)
        return FourBitLinear(layer) if isinstance(layer, kinds[0]) else EightBitLinear(layer, dtype)

    if not _replace(model, kinds, ours):
        return False
    for each in model.modules():
        if isinstance(each, PreTrainedModel):
            _unmark(each)
    return True


def pack(model: PreTrainedModel, bits: str) -> None:
    """Quantise a model in memory as `load_model` does one that it reads: nf4 with double quantisation, or int8.

    Args:
        bits: "4bit" or "8bit".

    Raises:
        ImportError: bitsandbytes is not there.
    """
    library: Any = importlib.import_module("bitsandbytes").nn
    head = model.get_output_embeddings()

    def packed(linear: nn.Linear) -> nn.Module:
        inputs, outputs, device = linear.in_features, linear.out_features, linear.weight.device
        if bits == "4bit":
            made = library.Linear4bit(inputs, outputs, bias=False, quant_type="nf4", device="meta")
            made.weight = library.Params4bit(linear.weight.data, quant_type="nf4", module=made).to(device)
        else:
            made = library.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False, device="meta")
            weight = linear.weight.data.cpu()
            made.weight = library.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
        made.bias = linear.bias
        return made

    _replace(model, nn.Linear, lambda each: each if each is head else packed(each))
    hold_packed(model)


def unpack(model: nn.Module) -> None:
    """Put ordinary layers in the place of quantised ones: the same model, in the memory that it has unpacked."""
    _replace(model, QuantisedLinear, lambda layer: layer.plain())


def is_quantised(model: nn.Module) -> bool:
    """Whether some of its layers are packed."""
    return any(isinstance(each, QuantisedLinear) for each in model.modules())


def _replace(model: nn.Module, kinds: type | tuple[type, ...], made: Callable[[Any], nn.Module]) -> int:
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    chosen = [each for each in found if isinstance(each[2], kinds)]
    new: dict[int, nn.Module] = {}
    for parent, name, child in chosen:
        if id(child) not in new:
            new[id(child)] = made(child).train(child.training)
        setattr(parent, name, new[id(child)])
    return len(chosen)


def _unmark(model: Any) -> None:
    seams.require(seams.QUANTIZER_MARKS)
    model.hf_quantizer, model.is_quantized = None, False
    marks = ["is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"]
    if len({str(each) for each in (getattr(model, "hf_device_map", None) or {}).values()}) == 1:
        marks.append("hf_device_map")  # it is on one device, as other models are
    for name in marks:
        model.__dict__.pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
