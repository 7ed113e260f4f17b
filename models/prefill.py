"""The first forward of a decode: prompts go in, keys, values and last states come out.

Prompts are laid out as a prefix tree where the backbone takes one (`packing.py`), so that equal prompts and a common
system turn are computed once; elsewhere as left-padded rows, each distinct prompt once.

Legend of shape suffixes: B distinct prompts, P prompt positions, N distinct tokens, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .batching import TokenIds, left_pad
from .packing import forward_tree, packs_now
from .prefix_tree import build_tree

APART = 64
"""Tokens of an attention block after which rows that share nothing with it make their own: without a backward, small
blocks cost less than what a larger one masks."""


@dataclass(frozen=True)
class Prefilled:
    """Prompts, ready to be decoded.

    Attributes:
        cache: keys and values, of the tree's tokens or of left-padded rows.
        index_BP: where each left-padded position's token lies in the tree; None: there is none.
        last_BH: the hidden state of each prompt's last token.
        length_B: tokens of each prompt.
        row: where each prompt stands among them.
    """

    cache: DynamicCache
    index_BP: Tensor | None
    last_BH: Tensor
    length_B: Tensor
    row: dict[tuple[int, ...], int]

    def rows(self, prompts: Sequence[TokenIds]) -> Tensor:
        """Where these prompts stand [their number]."""
        return torch.tensor([self.row[tuple(each)] for each in prompts], device=self.length_B.device)

    def layer(self, index: int, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, heads, width, D] of a layer: the last `width` positions of left-padded prompts."""
        found: Any = self.cache.layers[index]
        if self.index_BP is None:
            return found.keys[rows, :, -width:], found.values[rows, :, -width:]
        index_BP = self.index_BP[rows, -width:]
        return found.keys[0][:, index_BP].transpose(0, 1), found.values[0][:, index_BP].transpose(0, 1)


def prefill(
    backbone: PreTrainedModel, prompts: Sequence[TokenIds], pad_token_id: int, device: torch.device
) -> Prefilled:
    """Run the backbone over prompts."""
    row: dict[tuple[int, ...], int] = {}
    for prompt in prompts:
        row.setdefault(tuple(prompt), len(row))
    ids_BP, mask_BP = left_pad(list(row), pad_token_id, device)
    # a plain cache keeps every position, of layers with a sliding window too
    cache = DynamicCache()
    index_BP = None
    # Elsewhere than on a CPU the padding costs little, and each tree's attention would be compiled anew.
    if device.type == "cpu" and packs_now(backbone, device):
        tree = build_tree(ids_BP, mask_BP, apart_tokens=APART)
        hidden_NH = forward_tree(backbone, tree, past_key_values=cache, use_cache=True)
        index_BP, last_BH = tree.index_BL, hidden_NH[tree.index_BL[:, -1]]
    else:
        output = backbone(
            input_ids=ids_BP,
            attention_mask=mask_BP,
            position_ids=(mask_BP.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        last_BH = output.last_hidden_state[:, -1]
    return Prefilled(cache, index_BP, last_BH, mask_BP.sum(-1), row)
