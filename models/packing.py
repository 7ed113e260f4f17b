"""The packed forward: a batch of rows as a prefix tree, so that padding and repeated prefixes cost nothing.

`use_packed_forward(backbone)` replaces the backbone's forward. Given padded rows [B, L] it drops the padding, lays the
rows' distinct tokens out once (chosen and rejected share their prompt; so do n samples of one prompt, and every row its
system turn), runs the real backbone on them as one row with their depths as positions, and scatters the hidden states
back to [B, L, H]. Nothing downstream notices, except the clock.

Tokens attend to their ancestors in the tree. On a CPU the attention runs block by block, because a tree's mask over all
tokens would cost more than the sharing saves; a block starts with whole rows and repeats the prefix it needs. On a GPU
FlexAttention takes the tree in one piece; where it does not run, the tree has blocks there too.

Whether a decoder really hands the tree to its attention, takes positions and builds no mask of its own, nobody can say
who has not tried: before the first packed forward two rows go through it, and where their numbers are not those of each
row by itself, by more than rounding, rows are padded instead, or computed apart (`Packing`).

Legend of shape suffixes: B rows, L padded positions, N distinct tokens, H hidden size, T tokens of a block.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from . import seams
from .block_attention import LONGEST_BLOCK, block_attention, token_attention
from .flex_tree import flex_applies, flex_tree_attention, kind_of, probe
from .prefix_tree import TRIAL_SQUARES, Attended, Kind, Rows, Tree, rounded
from .rotary import forget_lengths, rotary_limit
from .tree_pieces import attention_in_pieces
from .trial import SHARED, check_causal, difference, difference_in_words, model_name, precision, quietly, trial_rows

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
    if tree is None and query.size(2) == 1 and _as_products(query, value, dropout) and _per_row(attention_mask):
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
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # as SDPA does it; of fp32 weights the products alone come in 16 bits
        query, key, value = (each.to(torch.get_autocast_dtype("cpu")) for each in (query, key, value))
    kind = kind_of(query, key, value)
    tree.attended.append(Attended(window, kind, scaling))
    if query.device.type != "cpu":
        # one that fails falls back within: layers that are computed again in the backward must keep what they kept
        if tree.layout.whole and not dropout:
            return flex_tree_attention(query, key, value, tree, window, scaling).transpose(1, 2)
        return attention_in_pieces(query, key, value, tree, window, dropout=dropout, scale=scaling).transpose(1, 2)
    if _as_products(query, value, dropout) and tree.longest_block() <= LONGEST_BLOCK:
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


def _as_products(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Where the fused kernel is slow. In fp32 it is what everybody else runs, and its last digit is worth keeping.

    Our products take keys and values of one width.
    """
    slow = query.device.type == "cpu" and query.dtype != torch.float32 and not dropout
    return slow and query.size(-1) == value.size(-1)


def _per_row(mask: Tensor | None) -> bool:
    return mask is not None and mask.dim() == 4 and mask.size(1) == 1 and mask.is_floating_point()


AttentionInterface.register(ATTENTION, tree_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def use_packed_forward(backbone: PreTrainedModel, packed: bool = True) -> bool:
    """Replace the backbone's forward, for calls with padded rows and no cache, by the fastest one that is right.

    Packed where a trial shows that it gives each row's own numbers, else padded, else rows of one length at a time (see
    `Packing`). Calls that it does not understand (a cache, embeddings, a 4-D mask, hidden states of every layer) go to
    the model's own forward. Calling it twice changes nothing.

    The new forward also takes `rows`: the same ids and mask as a `Rows`, from whoever takes several forwards of them.

    Args:
        backbone: a transformers decoder (`causal.decoder_of`).
        packed: whether packing may be tried at all.

    Returns:
        Whether the backbone is one that can be packed; if not, the log says so.
    """
    seams.require(seams.ATTENTION_FUNCTIONS)
    seams.require(seams.DECODER_FIELDS)
    held: Packing | None = getattr(backbone, _PACKING, None)
    if held is not None:
        return held.packable
    packable = packed and packs(backbone)
    if packed and not packable:
        logger.info("%s: the packed forward does not apply, padded rows are used", model_name(backbone))
    plain = backbone.forward
    packing = Packing(backbone, plain, packable)

    @functools.wraps(plain)
    def forward(
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        rows: Rows | None = None,
        **kwargs: Any,
    ) -> Any:
        if input_ids is None or attention_mask is None or not _understood(input_ids, attention_mask, kwargs):
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
            return plain(**{name: x for name, x in given.items() if x is not None}, **kwargs)
        return packing(input_ids, attention_mask, position_ids, kwargs, rows)

    backbone.forward = forward
    setattr(backbone, _PACKING, packing)
    return packable


def attention_of(config: PreTrainedConfig) -> str | None:
    """The name of the attention function that a model runs."""
    return config._attn_implementation  # pyright: ignore[reportPrivateUsage]  # seam attention-functions


def _attend(config: PreTrainedConfig, name: str) -> None:
    config._attn_implementation = name  # pyright: ignore[reportPrivateUsage]  # seam attention-functions


def packs_now(backbone: PreTrainedModel, device: torch.device) -> bool:
    """Whether this backbone's packed forward is in use on this device."""
    packing: Packing | None = getattr(backbone, _PACKING, None)
    return packing is not None and packing.agrees(device)


def attention_used(backbone: PreTrainedModel) -> str | None:
    """How the backbone's rows have been computed, in words; None: none were, or by its own forward."""
    packing: Packing | None = getattr(backbone, _PACKING, None)
    return None if packing is None else packing.used(next(backbone.parameters()).device)


_PACKING = "_preftune_packing"
"""The attribute of a backbone under which its `Packing` is found."""


Way = Literal["packed", "padded", "alone"]
"""How a batch of padded rows is computed; "alone": rows of one length together, without padding or a mask."""


class Packing:
    """A backbone's ways over padded rows, on trial.

    The first call on a device, in a precision, tries them: two rows that share their beginning, one shorter than the
    other, must get the numbers that the model's own forward gives to each row by itself, unpadded. Then and not
    earlier, because until then the base may be moved, sharded, quantised or get an adapter.

    On a GPU the trial also says which kinds of attention the backbone has, and each is probed, its backward too, before
    the first batch: where one does not run in one piece, trees have blocks.

    Rows on either side of a length at which rotary factors change are computed apart, whatever the way.
    """

    def __init__(self, backbone: PreTrainedModel, plain: Callable[..., Any], packable: bool) -> None:
        self.packable = packable
        self._backbone, self._plain = backbone, plain
        self._takes = _taken(plain)
        self._limit = rotary_limit(backbone)
        self._ways: dict[tuple[str, torch.dtype], Way] = {}
        self._kinds: dict[tuple[str, torch.dtype], set[Kind]] = {}
        self._off = not packable
        if packable:
            _attend(backbone.config, ATTENTION)

    def __call__(
        self,
        ids_BL: Tensor,
        mask_BL: Tensor,
        position_BL: Tensor | None,
        kwargs: dict[str, Any],
        known: Rows | None = None,
    ) -> Any:
        """The last hidden states of padded rows; what else is asked for goes with the padded way."""
        way = self.way(ids_BL.device)
        parts = self._parts(mask_BL, way)
        if len(parts) == 1 and way == "padded":
            return self._padded(ids_BL, mask_BL, position_BL, kwargs)
        if len(parts) == 1 and way == "packed":
            states_BLH = self._packed(Rows.of(ids_BL, mask_BL) if known is None else known, ids_BL.device, kwargs)
            return BaseModelOutputWithPast(last_hidden_state=states_BLH)
        hidden: list[Tensor] = []
        for rows in parts:
            part = torch.tensor(rows, device=ids_BL.device)
            ids, mask = ids_BL[part], mask_BL[part]
            if way == "packed":
                hidden.append(self._packed(Rows.of(ids, mask), ids.device, kwargs))
            elif way == "padded":
                hidden.append(self._rows_of_one_kind(ids, mask, kwargs))
            else:
                hidden.append(self._alone(ids, mask, kwargs))
        order = torch.tensor([row for rows in parts for row in rows], device=ids_BL.device).argsort()
        return BaseModelOutputWithPast(last_hidden_state=torch.cat(hidden)[order])

    def way(self, device: torch.device) -> Way:
        """How rows are computed here; where it is not packed, the log has said so once."""
        key = (device.type, precision(self._backbone, device))
        if key not in self._ways:
            self._ways[key] = self._try(device, key[1])
        # a decoder whose packed forward failed in one precision has given up its attention function in all of them
        return "padded" if self._off and self._ways[key] == "packed" else self._ways[key]

    def used(self, device: torch.device) -> str | None:
        """How rows have been computed here, in words; None: none were."""
        key = (device.type, precision(self._backbone, device))
        if key not in self._ways:
            return None
        if (way := self.way(device)) != "packed":
            return {"padded": "padded rows", "alone": "rows of one length together"}[way]
        whole = flex_applies(device, *self._kinds.get(key, ()))
        return f"packed rows as prefix trees, {'FlexAttention' if whole else 'SDPA in blocks'}"

    def agrees(self, device: torch.device) -> bool:
        """Whether the packed forward is in use."""
        return self.way(device) == "packed"

    def _parts(self, mask_BL: Tensor, way: Way) -> list[list[int]]:
        """Rows that are computed together."""
        everyone = [list(range(len(mask_BL)))]
        if self._limit is not None:
            forget_lengths(self._backbone)
            if mask_BL.size(1) > self._limit.length:
                everyone = self._limit.parts(mask_BL.sum(-1).tolist())
        if way != "alone":
            return everyone
        groups: dict[int, list[int]] = {}
        for row, length in enumerate(mask_BL.sum(-1).tolist()):
            groups.setdefault(length, []).append(row)
        return list(groups.values())

    def _padded(self, ids_BL: Tensor, mask_BL: Tensor, position_BL: Tensor | None, kwargs: dict[str, Any]) -> Any:
        position = {} if position_BL is None or "position_ids" not in self._takes else {"position_ids": position_BL}
        return self._plain(input_ids=ids_BL, attention_mask=mask_BL, **position, **kwargs)

    def _packed(self, rows: Rows, device: torch.device, kwargs: dict[str, Any]) -> Tensor:
        kinds = self._kinds.get((device.type, precision(self._backbone, device)), ())
        tree = rows.tree(device, whole=flex_applies(device, *kinds))
        if self._limit is not None:
            forget_lengths(self._backbone)
        return tree.spread(forward_tree(self._plain, tree, **{**kwargs, "use_cache": False}))

    def _rows_of_one_kind(self, ids_BL: Tensor, mask_BL: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Padded rows, no wider than the longest of them: rotary factors go by a forward's width."""
        rows, width = [ids[kept] for ids, kept in zip(ids_BL, mask_BL.bool(), strict=True)], mask_BL.sum(-1).max()
        pad = torch.nn.utils.rnn.pad_sequence
        ids_BW = pad(rows, batch_first=True)
        mask_BW = pad([torch.ones_like(row) for row in rows], batch_first=True)
        forget_lengths(self._backbone)
        hidden_BWH = self._padded(ids_BW, mask_BW, None, kwargs).last_hidden_state
        assert hidden_BWH.size(1) == width
        return _spread(hidden_BWH[mask_BW.bool()], mask_BL)

    def _alone(self, ids_BL: Tensor, mask_BL: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Rows of one length, as each would be by itself."""
        if self._limit is not None:
            forget_lengths(self._backbone)
        kept_BL = mask_BL.bool()
        ids_BT = ids_BL[kept_BL].view(len(ids_BL), -1)
        return _spread(self._plain(input_ids=ids_BT, **kwargs).last_hidden_state.flatten(0, 1), mask_BL)

    def _try(self, device: torch.device, dtype: torch.dtype) -> Way:
        rows = trial_rows(self._backbone, device)
        ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask_BL = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        kept_BL, plain = mask_BL.bool(), {"use_cache": False}
        if self._limit is not None:
            forget_lengths(self._backbone)
        with quietly(self._backbone, device):
            own = [self._plain(input_ids=row[None], **plain).last_hidden_state[0] for row in rows]
        check_causal(self._backbone, own[0][:SHARED], own[1][:SHARED])
        own_NH = torch.cat(own)

        def fails(forward: Callable[[], Tensor]) -> str | None:
            try:
                with quietly(self._backbone, device):
                    return difference_in_words(difference(forward()[kept_BL], own_NH), dtype, device)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a decoder that cannot be run so may fail in every way there is
                return str(error) or type(error).__name__

        name = model_name(self._backbone)
        if not self._off:
            if (why := fails(lambda: self._tried_tree(Rows.of(ids_BL, mask_BL), device, dtype))) is None:
                return "packed"
            self._off = True
            _attend(self._backbone.config, "sdpa")
            logger.warning("%s: the packed forward is not used, padded rows are: packed states %s", name, why)
        position_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)
        if (why := fails(lambda: self._padded(ids_BL, mask_BL, position_BL, plain).last_hidden_state)) is None:
            return "padded"
        logger.warning("%s: rows of different lengths are computed apart: padded states %s", name, why)
        return "alone"

    def _tried_tree(self, rows: Rows, device: torch.device, dtype: torch.dtype) -> Tensor:
        tree = rows.tree(device, whole=flex_applies(device), squares=TRIAL_SQUARES)
        attended, packed_NH = _run(self._plain, tree, use_cache=False)
        _check_windows(self._backbone.config, attended)
        self._kinds[device.type, dtype] = {each.kind for each in attended}
        for each in dict.fromkeys(attended):
            probe(each, device)
        return tree.spread(packed_NH)


def _spread(hidden_NH: Tensor, mask_BL: Tensor) -> Tensor:
    """States of the rows' own tokens [N, H] to where these stand [B, L, H]; zero where there is padding."""
    zeros_BLH = hidden_NH.new_zeros(*mask_BL.shape, hidden_NH.size(-1))
    return zeros_BLH.masked_scatter(mask_BL.bool()[..., None], hidden_NH)


def _taken(forward: Callable[..., Any]) -> set[str]:
    """The names of a forward's arguments."""
    return set(inspect.signature(forward).parameters)


def _check_windows(config: PreTrainedConfig, attended: Sequence[Attended]) -> None:
    """The tree met as many attention layers with a sliding window as there are. The probe's rows are too short for one
    to show in their numbers.

    Raises:
        SeamMoved: a window does not arrive at the attention.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    expected = list(kinds).count("sliding_attention") if kinds else text.num_hidden_layers if window else 0
    met = sum(each.window is not None for each in attended)
    if met != expected:
        raise seams.TREE_HANDOVER.moved([f"the sliding window of {expected - met} layer(s)"])


def forward_tree(backbone: Callable[..., Any], tree: Tree, **kwargs: Any) -> Tensor:
    """Last hidden states [N, H] of a tree's tokens, through a backbone whose attention is `ATTENTION`.

    Raises:
        SeamMoved: no attention layer got the tree.
    """
    return _run(backbone, tree, **kwargs)[1]


def _run(backbone: Callable[..., Any], tree: Tree, **kwargs: Any) -> tuple[list[Attended], Tensor]:
    """What the layers were that got the tree, and the states."""
    if tree.device.type == "cpu":
        tree = rounded(tree)
    # a tree may serve several forwards: what each of them reaches is counted apart
    tree.attended.clear()
    output = backbone(
        input_ids=tree.ids_N[None],
        attention_mask=torch.ones(_NO_MASK, device=tree.device),
        position_ids=tree.depth_N[None],
        tree=tree,
        **kwargs,
    )
    seams.check(seams.TREE_HANDOVER, tree)
    return list(tree.attended), output.last_hidden_state[0]


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
