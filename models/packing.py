"""The packed forward: a batch of rows as a prefix tree, so that padding and repeated prefixes cost nothing.

`use_packed_forward(backbone)` replaces the backbone's forward. Given padded rows [B, L] it drops the padding, lays the
rows' distinct tokens out once (chosen and rejected share their prompt; so do n samples of one prompt, and every row its
system turn), runs the real backbone on them as one row with their depths as positions, and scatters the hidden states
back to [B, L, H]. Nothing downstream notices, except the clock.

Tokens attend to their ancestors in the tree. On a CPU the attention runs block by block, because a tree's mask over all
tokens would cost more than the sharing saves; a block starts with whole rows and repeats the prefix it needs. On a GPU
FlexAttention takes the tree in one piece.

Legend of shape suffixes: B rows, L padded positions, N distinct tokens, H hidden size, T tokens of a block.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from .block_attention import LONGEST_BLOCK, block_attention, token_attention
from .flex_tree import flex_applies, flex_tree_attention, tree_block_mask

logger = logging.getLogger(__name__)

ATTENTION = "preftune_tree"
"""The attention function's name in transformers' registry; without a tree it is plain SDPA."""

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
        masks: masks already made, by block, window and dtype.
    """

    ids_N: Tensor
    depth_N: Tensor
    end_N: Tensor
    blocks: tuple[tuple[int, int], ...]
    index_BL: Tensor
    mask_BL: Tensor
    masks: dict[Any, Any] = field(default_factory=dict)

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
        shared = _common_prefix(row, previous)
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


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(k for k in range(n) if a[k] != b[k])


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    tree: Tree | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: SDPA over each block of the tree; without a tree, plain SDPA.

    Args:
        query, key, value: [1, heads, N, head dimension]; key and value may have fewer heads.
        tree: of the packed batch, handed through the model by the packed forward.

    Returns:
        [1, N, heads, head dimension], and no weights.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if tree is None and query.size(2) == 1 and _as_products(query, dropout) and _per_row(attention_mask):
        assert attention_mask is not None
        mask_BHC = attention_mask[:, :, 0].expand(-1, query.size(1), -1).contiguous()
        return token_attention(query[:, :, 0], key, value, mask_BHC, scale)[:, None], None
    if tree is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    if flex_applies(query.device) and not dropout:
        out = flex_tree_attention(query, key, value, tree.flex_mask(sliding_window), scaling)
        if out is not None:
            return out.transpose(1, 2), None
    if _as_products(query, dropout) and tree.longest_block() <= LONGEST_BLOCK:
        masks = [tree.mask(block, sliding_window, query.dtype)[0, 0] for block in tree.blocks]
        return block_attention(query[0], key[0], value[0], tree.blocks, masks, scale)[None], None
    grouped = query.size(1) != key.size(1)
    outputs = [
        F.scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, start:stop],
            value[:, :, start:stop],
            attn_mask=tree.mask((start, stop), sliding_window, query.dtype),
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=grouped,
        )
        for start, stop in tree.blocks
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _as_products(query: Tensor, dropout: float) -> bool:
    """Where the fused kernel is slow. In fp32 it is what everybody else runs, and its last digit is worth keeping."""
    return query.device.type == "cpu" and query.dtype != torch.float32 and not dropout


def _per_row(mask: Tensor | None) -> bool:
    return mask is not None and mask.dim() == 4 and mask.size(1) == 1 and mask.is_floating_point()


AttentionInterface.register(ATTENTION, tree_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def use_packed_forward(backbone: Any) -> bool:
    """Replace the backbone's forward by the packed one, for calls with padded rows and no cache.

    Calls that it does not understand (a cache, embeddings, a 4-D mask, hidden states of every layer) go to the model's
    own forward.

    Args:
        backbone: a transformers decoder (`model.base_model`).

    Returns:
        Whether the backbone can be packed; if not, the log says so and nothing changes.
    """
    config = backbone.config
    if not packs(backbone):
        logger.info("%s: the packed forward does not apply, padded rows are used", type(backbone).__name__)
        return False
    plain = backbone.forward
    config._attn_implementation = ATTENTION

    @functools.wraps(plain)
    def forward(
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not _understood(input_ids, attention_mask, kwargs):
            return plain(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        assert input_ids is not None and attention_mask is not None
        whole = flex_applies(input_ids.device)
        tree = build_tree(input_ids, attention_mask, input_ids.numel() if whole else None)
        hidden_NH = forward_tree(plain, tree, **{**kwargs, "use_cache": False})
        hidden_BLH = hidden_NH[tree.index_BL].masked_fill(~tree.mask_BL[..., None], 0)
        return BaseModelOutputWithPast(last_hidden_state=hidden_BLH)

    backbone.forward = forward
    return True


def rounded(tree: Tree, multiple: int = ROUND_TO) -> Tree:
    """The tree with tokens at its end that nobody sees and whose states nobody reads, up to a multiple of so many."""
    n = len(tree.ids_N)
    missing = -n % multiple
    if not missing:
        return tree
    ids_N, depth_N = F.pad(tree.ids_N, (0, missing)), F.pad(tree.depth_N, (0, missing))
    end_N = torch.cat([tree.end_N, torch.arange(n + 1, n + missing + 1, device=tree.end_N.device)])
    blocks = (*tree.blocks, (n, n + missing))
    return replace(tree, ids_N=ids_N, depth_N=depth_N, end_N=end_N, blocks=blocks, masks={})


def forward_tree(backbone: Callable[..., Any], tree: Tree, **kwargs: Any) -> Tensor:
    """Last hidden states [N, H] of a tree's tokens, through a backbone whose attention is `ATTENTION`."""
    if tree.ids_N.device.type == "cpu":
        tree = rounded(tree)
    output = backbone(
        input_ids=tree.ids_N[None],
        # any 4-D mask passes through transformers' mask making untouched; the attention reads the tree instead
        attention_mask=torch.ones(1, 1, 1, 1, device=tree.ids_N.device),
        position_ids=tree.depth_N[None],
        tree=tree,
        **kwargs,
    )
    return output.last_hidden_state[0]


def packs(backbone: Any) -> bool:
    """Whether this decoder takes an attention function by name and runs SDPA now (state-space layers do not)."""
    text = backbone.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    return (
        bool(getattr(type(backbone), "_supports_attention_backend", False))
        and backbone.config._attn_implementation in ("sdpa", ATTENTION)
        and kinds <= {"full_attention", "sliding_attention"}
        and not getattr(text, "attn_logit_softcapping", None)
    )


def _understood(input_ids: Tensor | None, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Padded rows of ids with a 2-D mask, at least two tokens long, and nothing asked for but the last hidden state."""
    if input_ids is None or attention_mask is None or attention_mask.dim() != 2 or input_ids.size(1) < 2:
        return False
    if input_ids.shape != attention_mask.shape or kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        return False
    wanted = ("inputs_embeds", "output_hidden_states", "output_attentions", "output_router_logits", "token_type_ids")
    return not any(kwargs.get(name) is not None and kwargs.get(name) is not False for name in wanted)
