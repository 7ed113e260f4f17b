"""A decode step on a CPU in bf16 whose matrix products are PyTorch's and whose other operations are kernels of ours.

Legend of shape suffixes: B rows, E hidden size, D head dimension.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .prepack import Product, prepacks
from .row_cache import RowCache
from .token_kernels import TokenKernels, token_kernels
from .token_step import Past, TokenStep


class CompiledStep(TokenStep):
    """The same step, see `token_kernels.cpp` for how it rounds.

    Args:
        backbone: one for which `TokenStep.applies` is true, and `kernels_for` finds some.
    """

    def __init__(self, backbone: PreTrainedModel, joint: Mapping[nn.Module, Product], kernels: TokenKernels) -> None:
        super().__init__(backbone, joint)
        self.kernels = kernels
        parts: Any = backbone
        before = [each for layer in parts.layers for each in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.norms = [(each.weight.detach(), each.variance_epsilon) for each in (*before, parts.norm)]
        heads = [layer.self_attn for layer in parts.layers]
        self.head_norms = [(_weight(each, "q_norm"), _weight(each, "k_norm")) for each in heads]

    def __call__(self, ids_B: Tensor, length_B: Tensor, cache: Past) -> Tensor:
        """As `TokenStep`, of a `RowCache`."""
        assert isinstance(cache, RowCache)
        x_BE = self.embed(ids_B)
        cos_B1D, sin_B1D = (each.contiguous() for each in self.turning(x_BE, length_B))
        first_B = cache.stop + 1 - length_B
        y_BE, kernels = torch.empty_like(x_BE), self.kernels
        kernels.add_norm(x_BE, None, *self.norms[0], y_BE)
        for i, layer in enumerate(self.layers):
            mixed_BS = kernels.attention(
                layer.qkv(y_BE),
                (cos_B1D, sin_B1D),
                self.head_norms[i],
                self.norms[0][1],
                cache.buffers(i),
                first_B,
                cache.stop,
                layer.scale,
            )
            kernels.add_norm(x_BE, layer.out(mixed_BS), *self.norms[2 * i + 1], y_BE)
            gated = kernels.gated(layer.gate(y_BE), layer.up(y_BE))
            kernels.add_norm(x_BE, layer.down(gated), *self.norms[2 * i + 2], y_BE)
        return y_BE


def _weight(attention: Any, name: str) -> Tensor | None:
    return getattr(attention, name).weight.detach() if hasattr(attention, name) else None


def step_for(backbone: PreTrainedModel, joint: Mapping[nn.Module, Product]) -> TokenStep | None:
    """The fastest step of ours that this decoder's layers agree with; None: its own forward."""
    if not TokenStep.applies(backbone):
        return None
    kernels = kernels_for(backbone)
    return TokenStep(backbone, joint) if kernels is None else CompiledStep(backbone, joint, kernels)


def kernels_for(backbone: PreTrainedModel) -> TokenKernels | None:
    """Kernels for this decoder: where its weights are laid out for small products, and every norm is of one kind."""
    parts, config = cast(Any, backbone), backbone.config
    attention, weights = parts.layers[0].self_attn, (parts.embed_tokens.weight, parts.norm.weight)
    norms = {(m.variance_epsilon, m.weight.dtype) for m in backbone.modules() if hasattr(m, "variance_epsilon")}
    if len(norms) > 1 or config.hidden_act != "silu" or not all(prepacks(each) for each in weights):
        return None
    groups, normed = attention.num_key_value_groups, hasattr(attention, "q_norm")
    return token_kernels(attention.head_dim, groups, config.hidden_size, normed=normed)
