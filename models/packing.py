"""The packed forward: a batch of rows as a prefix tree, so that padding and repeated prefixes cost nothing.

`use_packed_forward(backbone)` replaces the backbone's forward. Given padded rows [B, L] it drops the padding, lays the
rows' distinct tokens out once (chosen and rejected share their prompt; so do n samples of one prompt, and every row its
system turn), runs the real backbone on them as one row with their depths as positions, and scatters the hidden states
back to [B, L, H]. Nothing downstream notices, except the clock.

Tokens attend to their ancestors in the tree. On a CPU the attention runs block by block, because a tree's mask over all
tokens would cost more than the sharing saves; a block starts with whole rows and repeats the prefix it needs. On a GPU
FlexAttention takes the tree in one piece.

Whether a decoder really hands the tree to its attention, takes positions and builds no mask of its own, nobody can say
who has not tried: before the first packed forward a probe of two rows goes through both forwards, and where they differ
by more than rounding the padded one stays.

Legend of shape suffixes: B rows, L padded positions, N distinct tokens, H hidden size, T tokens of a block.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from . import seams
from .block_attention import LONGEST_BLOCK, block_attention, token_attention
from .flex_tree import flex_applies, flex_tree_attention
from .prefix_tree import Tree, build_tree, rounded

with seams.importing(seams.ATTENTION_FUNCTIONS):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

logger = logging.getLogger(__name__)

ATTENTION = "preftune_tree"
"""The attention function's name in transformers' registry; without a tree it is plain SDPA."""

_NO_MASK = (1, 1, 1, 1)
"""Shape of a packed batch's mask. Any 4-D mask passes through transformers' mask making untouched, and one column for
many tokens is no mask that anything else could mean."""


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

    Raises:
        SeamMoved: the batch is packed and its tree has not come with it: its rows would see one another.
    """
    if tree is None and query.size(2) == 1 and _as_products(query, dropout) and _per_row(attention_mask):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        assert attention_mask is not None
        mask_BHC = attention_mask[:, :, 0].expand(-1, query.size(1), -1).contiguous()
        return token_attention(query[:, :, 0], key, value, mask_BHC, scale)[:, None], None
    if tree is None:
        if attention_mask is not None and attention_mask.shape == _NO_MASK and query.size(2) > 1:
            raise seams.TREE_HANDOVER.moved([f"the keyword arguments that reach {type(module).__name__}"])
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
    return _in_tree(query, key, value, tree, sliding_window, dropout=dropout, scaling=scaling), None


def _in_tree(
    query: Tensor, key: Tensor, value: Tensor, tree: Tree, window: int | None, *, dropout: float, scaling: float | None
) -> Tensor:
    """Each token attends to its ancestors: in one piece on a GPU, block by block elsewhere; [1, N, heads, D]."""
    tree.attended.append(window)
    if flex_applies(query.device) and not dropout:
        out = flex_tree_attention(query, key, value, tree.flex_mask(window), scaling)
        if out is not None:
            return out.transpose(1, 2)
    if _as_products(query, dropout) and tree.longest_block() <= LONGEST_BLOCK:
        runs = tree.runs()
        masks = [tree.mask((start, start + t), window, query.dtype)[0, 0] for start, _, t in runs]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return block_attention(query[0], key[0], value[0], runs, masks, scale)[None]
    grouped = query.size(1) != key.size(1)
    outputs = [
        F.scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, start:stop],
            value[:, :, start:stop],
            attn_mask=tree.mask((start, stop), window, query.dtype),
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=grouped,
        )
        for start, stop in tree.blocks
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _as_products(query: Tensor, dropout: float) -> bool:
    """Where the fused kernel is slow. In fp32 it is what everybody else runs, and its last digit is worth keeping."""
    return query.device.type == "cpu" and query.dtype != torch.float32 and not dropout


def _per_row(mask: Tensor | None) -> bool:
    return mask is not None and mask.dim() == 4 and mask.size(1) == 1 and mask.is_floating_point()


AttentionInterface.register(ATTENTION, tree_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def use_packed_forward(backbone: PreTrainedModel) -> bool:
    """Replace the backbone's forward by the packed one, for calls with padded rows and no cache.

    Calls that it does not understand (a cache, embeddings, a 4-D mask, hidden states of every layer) go to the model's
    own forward; so do all calls of a backbone whose packed forward does not give its own numbers (see `Packing`).
    Calling it twice changes nothing.

    Args:
        backbone: a transformers decoder (`model.base_model`).

    Returns:
        Whether the backbone is one that can be packed; if not, the log says so and nothing changes.
    """
    seams.require(seams.ATTENTION_FUNCTIONS)
    seams.require(seams.DECODER_FIELDS)
    if getattr(backbone, _PACKING, None) is not None:
        return True
    if not packs(backbone):
        logger.info("%s: the packed forward does not apply, padded rows are used", _name(backbone))
        return False
    plain = backbone.forward
    packing = Packing(backbone, plain)

    @functools.wraps(plain)
    def forward(
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        understood = _understood(input_ids, attention_mask, kwargs)
        if input_ids is None or attention_mask is None or not understood or not packing.agrees(input_ids.device):
            return plain(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        whole = flex_applies(input_ids.device)
        tree = build_tree(input_ids, attention_mask, input_ids.numel() if whole else None)
        hidden_NH = forward_tree(plain, tree, **{**kwargs, "use_cache": False})
        hidden_BLH = hidden_NH[tree.index_BL].masked_fill(~tree.mask_BL[..., None], 0)
        return BaseModelOutputWithPast(last_hidden_state=hidden_BLH)

    backbone.forward = forward
    setattr(backbone, _PACKING, packing)
    return True


def attention_of(config: PreTrainedConfig) -> str | None:
    """The name of the attention function that a model runs."""
    return config._attn_implementation  # pyright: ignore[reportPrivateUsage]  # seam attention-functions


def _attend(config: PreTrainedConfig, name: str) -> None:
    config._attn_implementation = name  # pyright: ignore[reportPrivateUsage]  # seam attention-functions


def packs_now(backbone: PreTrainedModel, device: torch.device) -> bool:
    """Whether this backbone's packed forward is in use on this device."""
    packing: Packing | None = getattr(backbone, _PACKING, None)
    return packing is not None and packing.agrees(device)


_PACKING = "_preftune_packing"
"""The attribute of a backbone under which its `Packing` is found."""


class Packing:
    """A backbone's packed forward, on trial.

    The first call on a device, in a precision, tries it: two rows that share their beginning, one shorter than the
    other, go through the padded and the packed forward, without gradients, dropout or a random number. Then and not
    earlier, because until then the base may be moved, sharded, quantised or get an adapter.
    """

    def __init__(self, backbone: PreTrainedModel, plain: Callable[..., Any]) -> None:
        self._backbone, self._plain = backbone, plain
        self._tried: set[tuple[str, torch.dtype]] = set()
        self._off = False
        _attend(backbone.config, ATTENTION)

    def agrees(self, device: torch.device) -> bool:
        """Whether the packed forward gives the padded one's numbers here; if not, the log has said so once."""
        dtype = _precision(self._backbone, device)
        if self._off or (device.type, dtype) in self._tried:
            return not self._off
        try:
            found = self._difference(device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a decoder that cannot be run so may fail in every way there is
            self._give_up(str(error))
            return False
        allowed = _allowed(dtype, device)
        if not found <= allowed:  # not a number counts as different
            self._give_up(
                f"packed and padded states differ by {found:.2g} of their size ({dtype} on {device.type}: "
                f"at most {allowed:.2g} is rounding)"
            )
            return False
        self._tried.add((device.type, dtype))
        return True

    def _give_up(self, why: str) -> None:
        self._off = True
        _attend(self._backbone.config, "sdpa")
        logger.warning("%s: the packed forward is not used, padded rows are: %s", _name(self._backbone), why)

    @torch.no_grad()
    def _difference(self, device: torch.device) -> float:
        """The packed forward's error at its worst token, as a share of the padded state's size."""
        ids_BL, mask_BL = _probe_rows(self._backbone.config.get_text_config().vocab_size, device)
        training = [module for module in self._backbone.modules() if module.training]
        cuda = [device] if device.type == "cuda" else []
        # no cache: weights that autocast casts without a gradient must not be those that training meets
        autocast = torch.autocast(
            device.type,
            dtype=torch.get_autocast_dtype(device.type),
            enabled=torch.is_autocast_enabled(device.type),
            cache_enabled=False,
        )
        for module in training:
            module.training = False
        try:
            with torch.random.fork_rng(devices=cuda), autocast:
                padded = self._plain(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state
                tree = build_tree(ids_BL, mask_BL, ids_BL.numel() if flex_applies(device) else None)
                packed = forward_tree(self._plain, tree, use_cache=False)[tree.index_BL]
        finally:
            for module in training:
                module.training = True
        _check_windows(self._backbone.config, tree)
        kept = mask_BL.bool()
        padded_NH, packed_NH = padded[kept].float(), packed[kept].float()
        return float(((packed_NH - padded_NH).norm(dim=-1) / padded_NH.norm(dim=-1)).max())


def _probe_rows(vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [2, 12]: three tokens in common, then nine of one row and three of the other."""
    ids_BL = torch.tensor([[1, 2, 3, *range(4, 13)], [1, 2, 3, 13, 14, 15, *[0] * 6]], device=device)
    # spread over the vocabulary: neighbours are often special tokens, or alike
    return ids_BL * 7919 % vocabulary, (ids_BL > 0).long()


def _precision(backbone: PreTrainedModel, device: torch.device) -> torch.dtype:
    """The lowest precision that the backbone computes in now."""
    dtype: torch.dtype = next(backbone.parameters()).dtype
    if torch.is_autocast_enabled(device.type) and dtype == torch.float32:
        return torch.get_autocast_dtype(device.type)
    return dtype


def _allowed(dtype: torch.dtype, device: torch.device) -> float:
    """What rounding may do to a state: half of the precision's digits.

    Rounding grows with a network's depth, from the last digit on, and stays well below that (measured: 1e-6 in fp32 and
    0.01 in bf16); a token that sees another row's tokens, or misses one of its own, is off by a tenth at least.
    """
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else torch.finfo(torch.bfloat16).eps
    if device.type == "cuda" and dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        eps = 2.0**-10  # TensorFloat-32
    return eps**0.5


def _check_windows(config: PreTrainedConfig, tree: Tree) -> None:
    """The tree met as many attention layers with a sliding window as there are. The probe's rows are too short for one
    to show in their numbers.

    Raises:
        SeamMoved: a window does not arrive at the attention.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    expected = list(kinds).count("sliding_attention") if kinds else text.num_hidden_layers if window else 0
    met = sum(each is not None for each in tree.attended)
    if met != expected:
        raise seams.TREE_HANDOVER.moved([f"the sliding window of {expected - met} layer(s)"])


def _name(backbone: PreTrainedModel) -> str:
    """The model's class and, where it has one, its name."""
    name = getattr(backbone, "name_or_path", "")
    return f"{type(backbone).__name__} ({name})" if name else type(backbone).__name__


def forward_tree(backbone: Callable[..., Any], tree: Tree, **kwargs: Any) -> Tensor:
    """Last hidden states [N, H] of a tree's tokens, through a backbone whose attention is `ATTENTION`.

    Raises:
        SeamMoved: no attention layer got the tree.
    """
    if tree.ids_N.device.type == "cpu":
        tree = rounded(tree)
    output = backbone(
        input_ids=tree.ids_N[None],
        attention_mask=torch.ones(_NO_MASK, device=tree.ids_N.device),
        position_ids=tree.depth_N[None],
        tree=tree,
        **kwargs,
    )
    seams.check(seams.TREE_HANDOVER, tree)
    return output.last_hidden_state[0]


def packs(backbone: PreTrainedModel) -> bool:
    """Whether this decoder takes an attention function by name and runs SDPA now (state-space layers do not)."""
    text = backbone.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    return (
        bool(getattr(type(backbone), "_supports_attention_backend", False))
        and attention_of(backbone.config) in ("sdpa", ATTENTION)
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
