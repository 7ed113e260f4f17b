"""The prefix tree of a batch: its distinct tokens, who sees whom, and the blocks in which attention runs.

Legend of shape suffixes: B rows, L padded positions, N distinct tokens, T tokens of a block.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..data.template import common_prefix
from .block_attention import Run
from .flex_tree import tree_block_mask

BLOCK_TOKENS, BLOCK_ROWS = 448, 4
"""At most so many tokens, and about so many rows, make one attention block: smaller ones repeat more prefixes, larger
ones mask more. For rows of 200 tokens 384 to 512 tokens measured best, for rows of 65 256 to 320."""


ROUND_TO = 32
"""On a CPU the number of tokens is a multiple of this: for every new number oneDNN compiles each product anew (some
milliseconds, some memory that it keeps), which costs more than a few tokens too many."""


@dataclass(frozen=True)
class Tree:
    """The distinct tokens of a batch in depth-first order.

    Attributes:
        ids_N: token ids.
        depth_N: position of each token in the rows that hold it.
        end_N: index after the last descendant: j is i's ancestor or i itself when j <= i < end[j].
        blocks: (start, stop) of each attention block; no token's ancestors lie outside its block.
        index_BL: where each padded position's token lies (0 where there is padding).
        mask_BL: the batch's attention mask, boolean.
        masks: what was already made: masks by block, window and dtype; the runs.
        attended: the sliding window (None: there is none) of every attention layer that this tree has reached.
    """

    ids_N: Tensor
    depth_N: Tensor
    end_N: Tensor
    blocks: tuple[tuple[int, int], ...]
    index_BL: Tensor
    mask_BL: Tensor
    masks: dict[Any, Any] = field(default_factory=dict)
    attended: list[int | None] = field(default_factory=list)

    def mask(self, block: tuple[int, int], window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask [1, 1, T, T] of a block: 0 for ancestors within the layer's sliding window, else -inf."""
        key = (block, window, dtype)
        if key not in self.masks:
            span = slice(*block)
            index_T = torch.arange(*block, device=self.ids_N.device)
            seen_TT = (index_T <= index_T[:, None]) & (index_T[:, None] < self.end_N[span])
            if window:
                depth_T = self.depth_N[span]
                seen_TT &= depth_T[:, None] - depth_T < window
            blank_TT = torch.zeros(seen_TT.shape, dtype=dtype, device=seen_TT.device)
            self.masks[key] = blank_TT.masked_fill_(~seen_TT, float("-inf"))[None, None]
        return self.masks[key]

    def flex_mask(self, window: int | None) -> Any:
        """The same for the whole tree, as FlexAttention wants it."""
        key = ("flex", window)
        if key not in self.masks:
            self.masks[key] = tree_block_mask(self.depth_N, self.end_N, window)
        return self.masks[key]

    def runs(self) -> tuple[Run, ...]:
        """The blocks, those together that follow one another and look the same: independent rows of one length, say."""
        if "runs" not in self.masks:
            runs: list[Run] = []
            for start, stop in self.blocks:
                last = runs[-1] if runs else (0, 0, -1)
                if last[2] == stop - start and self._alike(last[0], start, stop - start):
                    runs[-1] = (last[0], stop, last[2])
                else:
                    runs.append((start, stop, stop - start))
            self.masks["runs"] = tuple(runs)
        return self.masks["runs"]

    def _alike(self, a: int, b: int, t: int) -> bool:
        ends, depths = ((each[a : a + t], each[b : b + t]) for each in (self.end_N, self.depth_N))
        return torch.equal(ends[0] + (b - a), ends[1]) and torch.equal(*depths)

    def longest_block(self) -> int:
        """Tokens of the longest block."""
        return max(stop - start for start, stop in self.blocks)


def build_tree(
    input_ids_BL: Tensor, attention_mask_BL: Tensor, block_tokens: int | None = None, apart_tokens: int | None = None
) -> Tree:
    """The prefix tree of the rows' real tokens.

    Rows in sorted order share their prefix with the row before or with none, so laying out each row's new tokens after
    the last one's gives the depth-first order directly.

    Args:
        input_ids_BL: token ids [B, L], padded on either side.
        attention_mask_BL: 1 where a token counts [B, L]; every row holds at least one.
        block_tokens: a block is closed before the row that would make it longer; None: by the rows' mean length.
        apart_tokens: with so many tokens a block is also closed before a row that shares nothing with it.
    """
    mask_BL = attention_mask_BL.bool()
    rows = [ids[kept] for ids, kept in zip(input_ids_BL.cpu().numpy(), mask_BL.cpu().numpy(), strict=True)]
    rows = [row.tolist() for row in rows]
    if block_tokens is None:
        block_tokens = min(BLOCK_TOKENS, BLOCK_ROWS * -(-sum(map(len, rows)) // len(rows)))
    ids: list[int] = []
    depth: list[int] = []
    end: list[int] = []
    blocks: list[tuple[int, int]] = []
    paths: list[list[int]] = [[] for _ in rows]
    previous: list[int] = []
    path: list[int] = []
    start = 0
    for i in sorted(range(len(rows)), key=rows.__getitem__):
        row = rows[i]
        shared = common_prefix(row, previous)
        full = len(ids) - start + len(row) - shared > block_tokens
        if path and (full or (apart_tokens and not shared and len(ids) - start >= apart_tokens)):
            blocks.append((start, len(ids)))
            start, shared = len(ids), 0
        path = path[:shared] + list(range(len(ids), len(ids) + len(row) - shared))
        ids += row[shared:]
        depth += range(shared, len(row))
        end += [0] * (len(row) - shared)
        for node in path:
            end[node] = len(ids)
        previous, paths[i] = row, path
    blocks.append((start, len(ids)))
    device = input_ids_BL.device
    index_BL = torch.zeros(input_ids_BL.shape, dtype=torch.long)
    index_BL[mask_BL.cpu()] = torch.tensor([node for each in paths for node in each])
    return Tree(
        torch.tensor(ids, device=device),
        torch.tensor(depth, device=device),
        torch.tensor(end, device=device),
        tuple(blocks),
        index_BL.to(device),
        mask_BL,
    )


def rounded(tree: Tree, multiple: int = ROUND_TO) -> Tree:
    """The tree with tokens at its end that nobody sees and whose states nobody reads, up to a multiple of so many.

    They repeat the first token, at its own place: a token that no row has there, as padding's, may have an embedding of
    zeros, whose norm has no gradient, and a zero times that is not a zero.
    """
    n = len(tree.ids_N)
    missing = -n % multiple
    if not missing:
        return tree
    ids_N, depth_N = (torch.cat([each, each[:1].expand(missing)]) for each in (tree.ids_N, tree.depth_N))
    end_N = torch.cat([tree.end_N, torch.arange(n + 1, n + missing + 1, device=tree.end_N.device)])
    blocks = (*tree.blocks, (n, n + missing))
    return replace(tree, ids_N=ids_N, depth_N=depth_N, end_N=end_N, blocks=blocks, masks={})
