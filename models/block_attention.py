"""Attention over the blocks of a prefix tree as matrix products, for the CPU.

There PyTorch's fused attention reaches a sixth of a matrix product's rate under a mask, forward and backward. A block
is small (a few hundred tokens), so its probabilities can be made whole and kept for the backward.

Legend of shape suffixes: N tokens, T tokens of a block, H query heads, K key-value heads, G = H / K, D head dimension.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST_BLOCK = 512
"""Tokens of a block beyond which its kept probabilities (H * T * T of them, a layer) would cost too much memory."""

Block = tuple[int, int]


def token_attention(query_BHD: Tensor, key_BKCD: Tensor, value_BKCD: Tensor, mask_BHC: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k' + mask) v of one query a row, C its columns: what a decode step needs. No gradient.

    Heads that share keys are the rows of one product. On a CPU in 16 bit the products are made one after the other, in
    about half the fused kernel's time; elsewhere the fused kernel makes them.

    Args:
        query_BHD, key_BKCD, value_BKCD: H query heads, K key-value heads.
        mask_BHC: additive, in the query's dtype, contiguous.

    Returns:
        [B, H, D]
    """
    b, k, c, d = key_BKCD.shape
    if query_BHD.device.type != "cpu" or query_BHD.dtype == torch.float32:
        query_BKGD, mask_BKGC = query_BHD.reshape(b, k, -1, d), mask_BHC.view(b, k, -1, c)
        out = F.scaled_dot_product_attention(query_BKGD, key_BKCD, value_BKCD, attn_mask=mask_BKGC, scale=scale)
        return out.reshape(query_BHD.shape)
    query, mask = query_BHD.reshape(b * k, -1, d), mask_BHC.view(b * k, -1, c)
    scores = torch.baddbmm(mask, query, key_BKCD.reshape(b * k, c, d).transpose(1, 2), alpha=scale)
    return torch.bmm(torch.softmax(scores, -1), value_BKCD.reshape(b * k, c, d)).view(query_BHD.shape)


def block_attention(
    query_HND: Tensor,
    key_KND: Tensor,
    value_KND: Tensor,
    blocks: Sequence[Block],
    masks: Sequence[Tensor],
    scale: float,
) -> Tensor:
    """softmax(scale * q k' + mask) v within each block.

    Args:
        blocks: (start, stop) of each block; together they are all N tokens.
        masks: additive [T, T] of each block, in the query's dtype.

    Returns:
        [N, H, D]
    """
    return _BlockAttention.apply(query_HND, key_KND, value_KND, tuple(blocks), tuple(masks), scale)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        query_HND: Tensor,
        key_KND: Tensor,
        value_KND: Tensor,
        blocks: tuple[Block, ...],
        masks: tuple[Tensor, ...],
        scale: float,
    ) -> Tensor:
        (h, n, d), k = query_HND.shape, key_KND.shape[0]
        out_NHD = query_HND.new_empty(n, h, d)
        probs: list[Tensor] = []
        for (start, stop), mask_TT in zip(blocks, masks, strict=True):
            t, span = stop - start, slice(start, stop)
            scores = torch.baddbmm(
                mask_TT.repeat(h // k, 1)[None],
                _grouped(query_HND[:, span], k),
                key_KND[:, span].transpose(1, 2),
                alpha=scale,
            )
            probs.append(torch.softmax(scores, -1))
            mixed = torch.bmm(probs[-1], value_KND[:, span])
            out_NHD[span] = mixed.view(h, t, d).transpose(0, 1)
        ctx.save_for_backward(query_HND, key_KND, value_KND, *probs)
        ctx.blocks, ctx.scale = blocks, scale
        return out_NHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query_HND, key_KND, value_KND, *probs = ctx.saved_tensors
        h, k = query_HND.shape[0], key_KND.shape[0]
        grad_query_HND, grad_key_KND, grad_value_KND = (
            torch.empty_like(each, memory_format=torch.contiguous_format) for each in (query_HND, key_KND, value_KND)
        )
        for (start, stop), prob in zip(ctx.blocks, probs, strict=True):
            span = slice(start, stop)
            grad = _grouped(grad_NHD[span].transpose(0, 1), k)
            grad_value_KND[:, span] = torch.bmm(prob.transpose(1, 2), grad)
            grad_prob = torch.bmm(grad, value_KND[:, span].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_prob, prob, -1, prob.dtype)
            grad_query_HND[:, span] = torch.bmm(grad_scores, key_KND[:, span]).view(h, stop - start, -1)
            grad_key_KND[:, span] = torch.bmm(grad_scores.transpose(1, 2), _grouped(query_HND[:, span], k))
        return grad_query_HND.mul_(ctx.scale), grad_key_KND.mul_(ctx.scale), grad_value_KND, None, None, None


def _grouped(heads_HTD: Tensor, k: int) -> Tensor:
    """[H, T, D] -> [K, G * T, D]: the query heads of one key-value head below one another."""
    h, t, d = heads_HTD.shape
    return heads_HTD.reshape(k, h // k * t, d)
