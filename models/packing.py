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
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from .block_attention import LONGEST_BLOCK, block_attention, token_attention
from .flex_tree import flex_applies, flex_tree_attention
from .prefix_tree import Tree, build_tree, rounded

logger = logging.getLogger(__name__)

ATTENTION = "preftune_tree"
"""The attention function's name in transformers' registry; without a tree it is plain SDPA."""


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
        runs = tree.runs()
        masks = [tree.mask((start, start + t), sliding_window, query.dtype)[0, 0] for start, _, t in runs]
        return block_attention(query[0], key[0], value[0], runs, masks, scale)[None], None
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
