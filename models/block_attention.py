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

from . import seams

LONGEST_BLOCK = 512
"""Tokens of a block beyond which its kept probabilities (H * T * T of them, a layer) would cost too much memory."""

Run = tuple[int, int, int]
"""start, stop and length: blocks of `length` tokens, one after the other, with the same mask. They are one product."""


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
    query_HND: Tensor, key_KND: Tensor, value_KND: Tensor, runs: Sequence[Run], masks: Sequence[Tensor], scale: float
) -> Tensor:
    """softmax(scale * q k' + mask) v within each block.

    Args:
        runs: the blocks; together they are all N tokens.
        masks: additive [T, T] of each run's blocks, in the query's dtype.

    Returns:
        [N, H, D]
    """
    return _BlockAttention.apply(query_HND, key_KND, value_KND, tuple(runs), tuple(masks), scale)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]: autograd's own takes any arguments
        ctx: Any,
        query_HND: Tensor,
        key_KND: Tensor,
        value_KND: Tensor,
        runs: tuple[Run, ...],
        masks: tuple[Tensor, ...],
        scale: float,
    ) -> Tensor:
        (h, n, d), k = query_HND.shape, key_KND.shape[0]
        out_NHD = query_HND.new_empty(n, h, d)
        probs: list[Tensor] = []
        for (start, stop, t), mask_TT in zip(runs, masks, strict=True):
            span = slice(start, stop)
            scores = torch.baddbmm(
                mask_TT.repeat(h // k, 1)[None],
                _batched(query_HND[:, span], k, t),
                _batched(key_KND[:, span], k, t).transpose(1, 2),
                alpha=scale,
            )
            probs.append(torch.softmax(scores, -1))
            mixed = torch.bmm(probs[-1], _batched(value_KND[:, span], k, t))
            out_NHD[span] = mixed.view(-1, h, t, d).transpose(1, 2).reshape(-1, h, d)
        seams.require(seams.SOFTMAX_BACKWARD)
        ctx.save_for_backward(query_HND, key_KND, value_KND, *probs)
        ctx.runs, ctx.scale = runs, scale
        return out_NHD

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: autograd's own takes any arguments
        ctx: Any, grad_NHD: Tensor
    ) -> tuple[Tensor | None, ...]:
        query_HND, key_KND, value_KND, *probs = ctx.saved_tensors
        k = key_KND.shape[0]
        grad_query_HND, grad_key_KND, grad_value_KND = (
            torch.empty_like(each, memory_format=torch.contiguous_format) for each in (query_HND, key_KND, value_KND)
        )
        for (start, stop, t), prob in zip(ctx.runs, probs, strict=True):
            span = slice(start, stop)
            grad = _batched(grad_NHD[span].transpose(0, 1), k, t)
            query, key, value = (_batched(each[:, span], k, t) for each in (query_HND, key_KND, value_KND))
            _unbatch(torch.bmm(prob.transpose(1, 2), grad), grad_value_KND[:, span], t)
            grad_prob = torch.bmm(grad, value.transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_prob, prob, -1, prob.dtype)
            _unbatch(torch.bmm(grad_scores, key), grad_query_HND[:, span], t)
            _unbatch(torch.bmm(grad_scores.transpose(1, 2), query), grad_key_KND[:, span], t)
        return grad_query_HND.mul_(ctx.scale), grad_key_KND.mul_(ctx.scale), grad_value_KND, None, None, None


def _batched(heads_HND: Tensor, k: int, t: int) -> Tensor:
    """[H, blocks * T, D] -> [blocks * K, G * T, D]: the query heads of one key-value head below one another."""
    h, n, d = heads_HND.shape
    if n == t:
        return heads_HND.reshape(k, h // k * t, d)
    return heads_HND.reshape(h, n // t, t, d).transpose(0, 1).reshape(n // t * k, h // k * t, d)


def _unbatch(batched: Tensor, into_HND: Tensor, t: int) -> None:
    """The reverse, into a part of a tensor."""
    h, n, d = into_HND.shape
    into_HND.unflatten(1, (n // t, t)).copy_(batched.view(n // t, h, t, d).transpose(0, 1))
