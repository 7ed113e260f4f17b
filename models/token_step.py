"""One decode step of a Llama-like decoder: one token a row, nothing that only training or long inputs need.

A step of a small model is bound by the number of operations, on a CPU as on a GPU. transformers' forward spends about
as many again on modules, masks and separate heads as the arithmetic needs. Here query, key and value are one product,
their rotation is one, and attention goes by groups of heads. Arithmetic and weights are the model's own; the tests hold
it against the model's forward. Decoders that are not listed keep theirs.

Legend of shape suffixes: B rows, C columns of the cache, E hidden size, H query heads, K key-value heads, D head
dimension.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import seams
from .block_attention import token_attention

LLAMA_LIKE = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Decoders of transformers whose layers are norm, attention with rotary positions, norm, gated MLP; Qwen3 also norms
each query and key head."""

Product = Callable[[Tensor], Tensor]


class _Norm(Protocol):
    weight: Tensor
    variance_epsilon: float


class _Attention(Protocol):
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    scaling: float
    head_dim: int
    num_key_value_groups: int


class _Mlp(Protocol):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: Callable[[Tensor], Tensor]


class _DecoderLayer(Protocol):
    self_attn: _Attention
    mlp: _Mlp
    input_layernorm: _Norm
    post_attention_layernorm: _Norm


class _LlamaLike(Protocol):
    """What the listed decoders are made of; the seam decoder-parts says that this is all."""

    embed_tokens: nn.Module
    rotary_emb: nn.Module
    norm: _Norm
    layers: Sequence[_DecoderLayer]


class Past(Protocol):
    """Keys and values of the rows: `RowCache`, `StaticCache`."""

    def mask(self, length_B: Tensor, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of one more token a row, the last of its `length` [B, C]."""
        ...

    def put(self, index: int, keys_BHD: Tensor, values_BHD: Tensor) -> tuple[Tensor, Tensor]:
        """Write that token's keys and values into a layer; all that the mask speaks of [B, H, C, D]."""
        ...


class TokenStep:
    """A decoder's step.

    Args:
        backbone: one for which `applies` is true.
        joint: products of query, key and value at once, by attention module, where they are at hand.
    """

    def __init__(self, backbone: PreTrainedModel, joint: Mapping[nn.Module, Product]) -> None:
        seams.require(seams.DECODER_PARTS, backbone)
        parts = cast(_LlamaLike, backbone)
        self.embed, self.rotary, self.norm = parts.embed_tokens, parts.rotary_emb, _norm(parts.norm)
        self.layers = [_Layer(layer, joint) for layer in parts.layers]
        self.heads = backbone.config.num_attention_heads

    @staticmethod
    def applies(backbone: PreTrainedModel) -> bool:
        """Whether this decoder is known here, sees all columns in every layer, and has no hooks that must run."""
        seams.require(seams.HOOK_MARK)
        seams.require(seams.MODULE_HOOKS, backbone)
        hooked = any(
            hasattr(m, "_hf_hook")
            or m._forward_hooks  # pyright: ignore[reportPrivateUsage]  # seam module-hooks
            or m._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]  # seam module-hooks
            for m in backbone.modules()
        )
        # PyTorch's FSDP2 gives a divided module a class of its own
        return type(backbone).__name__.removeprefix("FSDP") in LLAMA_LIKE and sees_everything(backbone) and not hooked

    def __call__(self, ids_B: Tensor, length_B: Tensor, cache: Past) -> Tensor:
        """Last hidden states [B, E] of one more token a row, whose keys and values go into the cache.

        Args:
            length_B: tokens of each row, these included.
        """
        x_BE = self.embed(ids_B)
        cos_B1D, signed_B1D = self.turning(x_BE, length_B)
        mask_BC = cache.mask(length_B, x_BE.dtype)
        mask_BHC = mask_BC[:, None].expand(-1, self.heads, -1).contiguous()
        for index, layer in enumerate(self.layers):
            x_BE = layer(x_BE, cos_B1D, signed_B1D, mask_BHC, cache, index)
        return self.norm(x_BE)

    def turning(self, x_BE: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, 1, D] of the newest tokens' positions. rotate_half negates the half that it moves to the
        front; here the sine carries the sign."""
        cos_B1D, sin_B1D = self.rotary(x_BE[:, None], position_ids=length_B[:, None] - 1)
        half = sin_B1D.shape[-1] // 2
        return cos_B1D, torch.cat([-sin_B1D[..., :half], sin_B1D[..., half:]], dim=-1)


class _Layer:
    def __init__(self, layer: _DecoderLayer, joint: Mapping[nn.Module, Product]) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm, self.output_norm = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        parts = [_product(each) for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.qkv = joint.get(cast(nn.Module, attention)) or (
            lambda x_BE: torch.cat([part(x_BE) for part in parts], dim=-1)
        )
        self.norms = [_norm(getattr(attention, name)) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        self.out, self.scale, self.dim = _product(attention.o_proj), attention.scaling, attention.head_dim
        self.gate, self.up, self.down = (_product(each) for each in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.activation = mlp.act_fn
        self.groups = attention.num_key_value_groups

    def __call__(
        self, x_BE: Tensor, cos_B1D: Tensor, sin_B1D: Tensor, mask_BHC: Tensor, cache: Past, index: int
    ) -> Tensor:
        b, d = len(x_BE), self.dim
        qkv_BHD = self.qkv(self.input_norm(x_BE)).view(b, -1, d)
        kv_heads = qkv_BHD.size(1) // (self.groups + 2)
        turning_BHD, value_BKD = qkv_BHD[:, :-kv_heads], qkv_BHD[:, -kv_heads:]
        if self.norms:
            query, key = turning_BHD[:, :-kv_heads], turning_BHD[:, -kv_heads:]
            turning_BHD = torch.cat([self.norms[0](query), self.norms[1](key)], dim=1)
        swapped_BHD = torch.cat([turning_BHD[..., d // 2 :], turning_BHD[..., : d // 2]], dim=-1)
        turned_BHD = torch.addcmul(turning_BHD * cos_B1D, swapped_BHD, sin_B1D)
        keys_BKCD, values_BKCD = cache.put(index, turned_BHD[:, -kv_heads:], value_BKD)
        query_BHD = turned_BHD[:, :-kv_heads]
        mixed_BHD = token_attention(query_BHD, keys_BKCD, values_BKCD, mask_BHC, self.scale)
        x_BE = x_BE + self.out(mixed_BHD.reshape(b, -1))
        y_BE = self.output_norm(x_BE)
        return x_BE + self.down(self.activation(self.gate(y_BE)) * self.up(y_BE))


def sees_everything(backbone: PreTrainedModel) -> bool:
    """Whether every layer attends to all earlier tokens, through an attention function that takes a mask ready made."""
    text = backbone.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    window = getattr(text, "sliding_window", None) if not kinds else None
    return kinds <= {"full_attention"} and not window


def _norm(module: _Norm) -> Callable[[Tensor], Tensor]:
    """Root-mean-square norm as Llama has it: in fp32, rounded, then times the weight."""
    weight, eps = module.weight, module.variance_epsilon

    def norm(x: Tensor) -> Tensor:
        return weight * F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype)

    return norm


def _product(layer: nn.Module) -> Product:
    """What the layer's call comes to; a forward that was put in its place spares the module's own call."""
    return layer.__dict__.get("forward") or layer
