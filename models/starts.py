"""Where a LoRA starts that does not start with B = 0: with a part of the base's own weights, that base unchanged.

PiSSA (Meng et al., arXiv 2404.02948) trains the principal components of each weight W, OLoRA (Büyükakyüz, arXiv
2406.01775) the first columns of its QR decomposition: W = W' + s B0 A0, where PEFT writes W' into the base. Here the
base is every role's, so W stays, and the adapter holds what is taken out of it beside what trains:

    W' + s B A = W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]

That is a plain LoRA of twice the rank at the same scaling, whose second half does not move: its gradient is nothing.
What is trained is the method's own, and what is saved loads anywhere.

Legend of shape suffixes: O output size, I input size, R rank.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from . import seams
from .altering import PLACE
from .sharded import in_full

with seams.importing(seams.CONV1D):
    from transformers.pytorch_utils import Conv1D

_HELD = "_preftune_held"
"""The attribute of a parameter of which a half does not train."""


def components(weight_OI: Tensor, r: int, scaling: float, start: str) -> tuple[Tensor, Tensor]:
    """The part of a weight that trains: A0 [R, I] and B0 [O, R], fp32, with scaling * B0 @ A0 taken out of it.

    R is `r`, or the weight's shorter side where that is less.

    Args:
        start: pissa (by a full SVD), pissa_niter_N (by a randomised one, with N subspace iterations) or olora.
    """
    weight = weight_OI.float()
    r = min(r, *weight.shape)
    if start == "olora":
        q_OK, r_KI = torch.linalg.qr(weight)
        return r_KI[:r], q_OK[:, :r]
    if start == "pissa":
        u_OK, s_K, vh_KI = torch.linalg.svd(weight, full_matrices=False)
        u_OR, s_R, vh_RI = u_OK[:, :r], s_K[:r], vh_KI[:r]
    else:
        u_OR, s_R, v_IR = torch.svd_lowrank(weight, r, niter=int(start.rpartition("_")[2]))
        vh_RI = v_IR.t()
    root_R = (s_R / scaling).sqrt()
    return root_R[:, None] * vh_RI, u_OR * root_R


@torch.no_grad()
def start_within(layers: Mapping[str, Any], adapter: str, start: str) -> None:
    """Put an adapter of doubled rank at such a start; its second halves do not train from here on.

    Where a weight has fewer components than the rank asks for, the rest starts as plain LoRA does.

    Args:
        layers: every layer that carries adapters, by its name.
        start: as of `components`.

    Raises:
        UserError: a layer that is no linear one, or a quantised one.
    """
    for path, layer in layers.items():
        base = layer.get_base_layer()
        if not isinstance(base, (nn.Linear, Conv1D)) or not base.weight.is_floating_point():
            what = "quantised" if isinstance(base, nn.Linear) else f"a {type(base).__name__}, no linear layer"
            raise UserError(PLACE, f"{start} takes weights apart, and {path} is {what}", "leave it out")
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        half = len(down) // 2
        weight = in_full(base.weight)
        weight_OI = weight if isinstance(base, nn.Linear) else weight.t()
        a_RI, b_OR = components(weight_OI, half, layer.scaling[adapter], start)
        found = len(a_RI)
        up.zero_()
        down[half:].zero_()
        down[:found], down[half : half + found] = a_RI, a_RI
        up[:, :found], up[:, half : half + found] = b_OR, -b_OR
        _hold(down, half, 0)
        _hold(up, half, 1)


def _hold(parameter: nn.Parameter, first: int, dim: int) -> None:
    """From index `first` on along a dimension the parameter gets no gradient."""

    def trained(gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        kept.narrow(dim, 0, first).copy_(gradient.narrow(dim, 0, first))
        return kept

    parameter.register_hook(trained)
    setattr(parameter, _HELD, True)


_DRAWN_ROW = 1 / math.sqrt(3)
"""The length of a row of A as PEFT draws it: uniform in +-1/sqrt(I)."""


def settled(tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The adapter of such a start as an adapter like any other: the same change of each weight at the same rank, in a
    basis in which nothing is added and taken away again, which 16 bits could not hold.

    A's rows are orthogonal and of the length that plain LoRA's are drawn with, so that a stage which goes on from it
    learns as one that goes on from plain LoRA; B is the change.

    Args:
        tensors: the adapter's, by name, in full. parameters: the same as they train.
    """
    found = dict(tensors)
    for name in [name for name in tensors if name in parameters and hasattr(parameters[name], _HELD)]:
        if "lora_A" not in name:
            continue
        other = name.replace("lora_A", "lora_B")
        a_RI, b_OR = tensors[name], tensors[other]
        left_OK, left_KR = torch.linalg.qr(b_OR.detach().double())
        right_IK, right_KR = torch.linalg.qr(a_RI.detach().double().t())
        u_KK, s_K, vh_KK = torch.linalg.svd(left_KR @ right_KR.t(), full_matrices=False)
        a, b = torch.zeros_like(a_RI), torch.zeros_like(b_OR)
        a[: len(s_K)] = vh_KK @ right_IK.t() * _DRAWN_ROW
        b[:, : len(s_K)] = left_OK @ u_KK * s_K / _DRAWN_ROW
        found[name], found[other] = a, b
    return found


def check_decay(parameters: Iterable[nn.Parameter], weight_decay: float, where: str) -> None:
    """Weights of which a half does not train must not decay: an optimiser would shrink both halves.

    Raises:
        UserError: they would.
    """
    if weight_decay and any(hasattr(each, _HELD) for each in parameters):
        raise decays(weight_decay, where)


def decays(weight_decay: float, where: str) -> UserError:
    """The error of such a decay."""
    said = f"is {weight_decay:g}, and would shrink what this start of an adapter takes out of the base"
    return UserError(where, said, "use 0, or init_lora_weights: true")
