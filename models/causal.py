"""What a causal model is made of: its decoder, and the head that its log-probabilities and its sampler go through.

Our own head (`LmHead`) is a product with what the config says of the logits. Some models do more to them, or to the
states before: whether ours is theirs is tried once, on a row, and where it is not transformers' own head is used.

Legend of shape suffixes: T tokens, C tokens of a chunk, H hidden size, V vocabulary.
"""

import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..errors import UserError
from .logprobs import LmHead
from .token_rows import weight_of
from .trial import check_causal, difference, difference_in_words, model_name, precision, quietly, trial_rows

logger = logging.getLogger(__name__)

OwnHead = Callable[[Tensor], Tensor]
"""Hidden states [C, H] to logits [C, V]."""

_TRIED = "_preftune_heads"
"""The attribute of a causal model under which the outcome of `head_of`'s trials is found."""


def inner_model(model: torch.nn.Module) -> Any:
    """The model itself, without what PEFT puts around it where there is an adapter."""
    whole: Any = model
    return whole.get_base_model() if hasattr(whole, "get_base_model") else whole


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder of a causal model or a classifier: what its head reads.

    transformers names it by a prefix, which in some models (Llama 4) is that of another class: then `base_model` is the
    model itself.

    Raises:
        UserError: it has none that can be found.
    """
    named = cast(PreTrainedModel, model.base_model)
    if named is not model:
        return named
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(inner) != 1:
        raise UserError(
            "model.base",
            f"{type(model).__name__} does not say which of its parts is the decoder",
            "use a model with a decoder and a head",
        )
    return inner[0]


def head_of(model: PreTrainedModel) -> LmHead:
    """The head of a causal model, tried against the model's own logits on this device and in this precision.

    Where adapters have rows of it, it is that of the adapter which is active now.

    Raises:
        UserError: the model's numbers cannot be reproduced: its logits are not made of its decoder's states, or a
            token sees those after it.
    """
    tried: dict[tuple[str, torch.dtype], OwnHead | None] | None = getattr(model, _TRIED, None)
    if tried is None:
        tried = {}
        setattr(model, _TRIED, tried)
    device = next(model.parameters()).device
    key = (device.type, precision(model, device))
    if key not in tried:
        tried[key] = _try(model, device, key[1])
    own = tried[key]
    return _ours(model) if own is None else LmHead.by(own, _weight(model))


def _try(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> OwnHead | None:
    """None where our own head is right; else transformers'."""
    decoder, name = decoder_of(model), model_name(model)
    (row_T, short_T) = trial_rows(model, device)
    with quietly(model, device):
        output = decoder(input_ids=row_T[None], use_cache=False)
        hidden_TH = output.last_hidden_state[0]
        logits_TV = _centred(model(input_ids=row_T[None], use_cache=False).logits[0])
        before_TH = decoder(input_ids=row_T[None, : len(short_T)], use_cache=False).last_hidden_state[0]
        check_causal(decoder, hidden_TH[: len(short_T)], before_TH)
        own = _transformers_head(model, decoder, type(output))
        why = _fails(lambda: _ours(model).logits(hidden_TH), logits_TV, dtype)
        if why is None:
            return None
        logger.warning("%s: transformers' own head is used, slower than ours: our logits %s", name, why)
        if (why := _fails(lambda: own(hidden_TH), logits_TV, dtype)) is not None:
            raise UserError(
                "model.base",
                f"{name}: its logits cannot be made from its decoder's last states (they {why})",
                "use another base; its log-probabilities would be wrong in every stage",
            )
    return own


def _fails(logits: Callable[[], Tensor], expected_TV: Tensor, dtype: torch.dtype) -> str | None:
    try:
        return difference_in_words(difference(_centred(logits()), expected_TV), dtype, expected_TV.device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a head that is no product may fail in every way there is
        return f"fail: {error or type(error).__name__}"


def _centred(logits_TV: Tensor) -> Tensor:
    """What a distribution depends on: a constant added to all logits of a token changes nothing."""
    logits_TV = logits_TV.float()
    return logits_TV - logits_TV.mean(-1, keepdim=True)


def _ours(model: PreTrainedModel) -> LmHead:
    return LmHead.of(cast(torch.nn.Module, model.get_output_embeddings()), model.config)


def _weight(model: PreTrainedModel) -> Tensor:
    """The head's matrix, for its dtype, device and vocabulary."""
    head = model.get_output_embeddings()
    weight = None if head is None else weight_of(head)[0]
    return weight if isinstance(weight, Tensor) else next(model.parameters())


def _transformers_head(model: PreTrainedModel, decoder: PreTrainedModel, kind: type[ModelOutput]) -> OwnHead:
    """The model's own forward over a decoder that says what it is told."""

    def logits(hidden_CH: Tensor) -> Tensor:
        output = kind(last_hidden_state=hidden_CH[None])  # pyright: ignore[reportCallIssue]: every decoder's output has it
        held: dict[str, Any] = decoder.__dict__
        before = held.get("forward")
        held["forward"] = lambda *_, **__: output
        try:
            ids_1C = torch.zeros(1, len(hidden_CH), dtype=torch.long, device=hidden_CH.device)
            # the class' own: what TRL and we put in its place calls the decoder itself
            return type(model).forward(model, input_ids=ids_1C, use_cache=False).logits[0]
        finally:
            if before is None:
                held.pop("forward", None)
            else:
                held["forward"] = before

    return logits
