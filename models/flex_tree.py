"""Attention over a whole prefix tree at once with FlexAttention: for GPUs, where one kernel beats many small ones.

FlexAttention (Dong et al., arXiv 2412.05496) skips the squares of the score matrix that its block mask leaves empty, so
the tree needs no cutting into blocks and no prefix is repeated. Where it cannot be compiled, the log says so once, and
the packed forward goes on block by block.

Legend of shape suffixes: N tokens, H query heads, K key-value heads, D head dimension.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import seams

with seams.importing(seams.FLEX_ATTENTION):
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

logger = logging.getLogger(__name__)

_state = {"works": True}


def flex_applies(device: torch.device) -> bool:
    """Whether trees on this device are attended to in one piece."""
    return device.type == "cuda" and _state["works"]


def tree_block_mask(depth_N: Tensor, end_N: Tensor, window: int | None) -> BlockMask:
    """Which squares of the [N, N] score matrix hold a pair of a token and one of its ancestors within the window."""

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ancestor = (key <= query) & (query < end_N[key])
        return ancestor if not window else ancestor & (depth_N[query] - depth_N[key] < window)

    n = len(depth_N)
    return create_block_mask(seen, None, None, n, n, device=depth_N.device)


def flex_tree_attention(
    query_1HND: Tensor, key_1KND: Tensor, value_1KND: Tensor, mask: BlockMask, scale: float | None
) -> Tensor | None:
    """softmax(scale * q k') v under the mask [1, H, N, D]; None where FlexAttention does not run, from then on."""
    run = _compiled() if query_1HND.is_cuda else flex_attention
    try:
        out: Any = run(
            query_1HND,
            key_1KND,
            value_1KND,
            block_mask=mask,
            scale=scale,
            enable_gqa=query_1HND.shape[1] != key_1KND.shape[1],
        )
    except Exception as error:  # the compiler's own errors have no common class
        if isinstance(error, torch.OutOfMemoryError):
            raise
        _state["works"] = False
        logger.warning("FlexAttention does not run here (%s), the packed forward goes block by block", error)
        return None
    return out


@functools.cache
def _compiled() -> Callable[..., Any]:
    # every batch has another number of tokens
    return torch.compile(flex_attention, dynamic=True)
