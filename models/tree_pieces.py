"""Attention over a prefix tree in pieces, for devices whose fused attention takes masks but no tree.

A piece is some hundred tokens, its keys are those and their ancestors, so masks grow with the tree's tokens and the
length of its rows, not with the square of its tokens. Keys and values are repeated for the heads that share them: with
a mask no fast kernel takes them unrepeated.

Legend of shape suffixes: N tokens, H query heads, K key-value heads, D head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .prefix_tree import Tree


def attention_in_pieces(
    query_1HND: Tensor,
    key_1KND: Tensor,
    value_1KND: Tensor,
    tree: Tree,
    window: int | None,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * q k') v over each token's ancestors within the window [1, H, N, D]."""
    group = query_1HND.size(1) // key_1KND.size(1)
    key_1HND, value_1HND = (each.repeat_interleave(group, 1) if group > 1 else each for each in (key_1KND, value_1KND))
    outputs: list[Tensor] = []
    for piece, index_C, mask in tree.pieces(window, query_1HND.dtype):
        span = slice(piece.start, piece.stop)
        keys, values = (each[:, :, span if index_C is None else index_C] for each in (key_1HND, value_1HND))
        outputs.append(
            F.scaled_dot_product_attention(
                query_1HND[:, :, span], keys, values, attn_mask=mask, dropout_p=dropout, scale=scale
            )
        )
    return torch.cat(outputs, dim=2)
