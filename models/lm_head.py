"""A fused LM head for devices without Triton, in the place of TRL's.

TRL's trainers call `model(..., labels=labels, fused_lm_head=True)`. Without Triton its head projects EVERY position,
the prompt and the padding included, through several passes over fp32 tiles. Ours projects only the positions that have
a label, in chunks, and makes the gradient in the same pass (`logprobs.token_logprobs`). Values and gradients agree.

Legend of shape suffixes: B rows, T positions, S = T - 1 shifted positions, N labelled positions, H hidden,
V vocabulary.
"""

import functools
import types
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data.encode import IGNORED
from . import seams
from .causal import decoder_of, head_of
from .logprobs import LmHead, chunk_rows

with seams.importing(seams.FUSED_HEAD):
    from trl.trainer.utils import FusedCausalLMOutput


def use_compact_head(model: PreTrainedModel, *, mean_logits: bool = False) -> None:
    """Replace the fused head that TRL's `add_fused_lm_head` put on `model` by ours. Calling it twice changes nothing.

    Args:
        model: the causal model itself (not its PEFT wrapper), already patched by TRL.
        mean_logits: also fill `mean_logits`, which feeds the `logits/*` metrics of DPO and KTO.

    The caller keeps TRL's where Triton runs, or where it needs `log_sum_sq_probs` or a mixture's load-balancing loss.

    Raises:
        UserError: the model's log-probs cannot be reproduced (see `head_of`).
    """
    seams.require(seams.FUSED_HEAD)
    head_of(model)
    if getattr(model.forward, "_preftune_compact", False):
        return
    plain_forward = model.forward

    # `generate` validates its keyword arguments against the signature of `forward`
    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return plain_forward(*args, **kwargs, **{key: value for key, value in given.items() if value is not None})
        kwargs["use_cache"] = False
        # looked up on each call: the packed forward and PEFT replace the backbone after this patch
        hidden_BTH = decoder_of(self)(*args, **kwargs).last_hidden_state
        if shift_labels is None:
            assert labels is not None, "the fused head needs labels"
            hidden_BSH, labels_BS = hidden_BTH[:, :-1], labels[:, 1:]
        else:
            hidden_BSH, labels_BS = hidden_BTH, shift_labels
        head = head_of(self)
        return _score(head, hidden_BSH, labels_BS, num_items_in_batch, mean_logits)

    forward._preftune_compact = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def _score(
    head: LmHead, hidden_BSH: torch.Tensor, labels_BS: torch.Tensor, num_items: Any, mean_logits: bool
) -> FusedCausalLMOutput:
    mask_BS = labels_BS != IGNORED
    # the mask itself as an index, twice, would make a GPU wait twice
    index_N = mask_BS.nonzero(as_tuple=True)
    hidden_NH, targets_N = hidden_BSH[index_N], labels_BS[index_N]
    logps_N, entropy_N, top1_N = head.token_logprobs(hidden_NH, targets_N, return_top1=True)

    def spread(values_N: torch.Tensor) -> torch.Tensor:
        # masked_scatter keeps the graph even where no position has a label
        return values_N.new_zeros(mask_BS.shape).masked_scatter(mask_BS, values_N)

    logps_BS = spread(logps_N)
    return FusedCausalLMOutput(
        loss=-logps_BS.sum() / (mask_BS.sum().clamp(min=1) if num_items is None else num_items),
        log_probs=logps_BS,
        entropy=spread(entropy_N),
        mean_logits=spread(_mean_logits(hidden_NH.detach(), head)) if mean_logits else None,
        is_top1=spread(top1_N),
        label_mask=mask_BS,
    )


@torch.no_grad()
def _mean_logits(hidden_NH: torch.Tensor, head: LmHead) -> torch.Tensor:
    """Mean logit over the vocabulary [N], fp32."""
    hidden_NH = hidden_NH.to(head.weight.dtype)
    if head.softcap is None and head.own is None:
        # the mean of linear functions is the function of the mean: one dot product a token
        mean_N = hidden_NH.float() @ head.weight.mean(0, dtype=torch.float32)
        return head.scale * (mean_N if head.bias is None else mean_N + head.bias.float().mean())
    return torch.cat([head.logits(part).mean(-1) for part in hidden_NH.split(chunk_rows(head.weight))])
