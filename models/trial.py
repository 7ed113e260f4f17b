"""Trying a model out: whatever is computed fast must be what the model's own forward says of one row by itself.

Here are the rows of a trial, what rounding may do to their numbers, and the conditions under which a trial leaves
nothing behind. `packing.py` tries forwards over many rows, `causal.py` the head, `generate.py` the ways of decoding.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from .rotary import rotary_limit

WINDOW = 5
"""Tokens that a sliding window reaches in a trial of decoding: with the model's own window the trial's rows would be
too short for it to show, or too long to be cheap."""

_WINDOWS = ("sliding_window", "attention_chunk_size")


SHARED = 3
"""Tokens with which both rows of a trial begin."""


def trial_rows(model: PreTrainedModel, device: torch.device) -> list[Tensor]:
    """Ids of two rows, of 12 and of 6 tokens: `SHARED` tokens in common, then each its own.

    They stay within the length at which rotary factors change: beyond it a token's state depends on its row's length.
    """
    limit, vocabulary = rotary_limit(model), model.config.get_text_config().vocab_size
    most = 12 if limit is None else limit.length
    rows = ([1, 2, 3, *range(4, 13)][:most], [1, 2, 3, 13, 14, 15][:most])
    # spread over the vocabulary: neighbours are often special tokens, or alike
    return [torch.tensor(row, device=device) * 7919 % vocabulary for row in rows]


@contextmanager
def quietly(model: nn.Module, device: torch.device) -> Generator[None, None, None]:
    """Without gradients, dropout or a random number, in the precision that is in force; every mode as it was after."""
    training = [module for module in model.modules() if module.training]
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
        with torch.no_grad(), torch.random.fork_rng(devices=cuda), autocast:
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def short_windows(model: PreTrainedModel) -> Generator[None, None, None]:
    """Within it sliding windows reach over `WINDOW` tokens, in the config and wherever a module keeps its own."""
    before: list[tuple[Any, str, int]] = []
    for holder in (model.config.get_text_config(), *model.modules()):
        for name in _WINDOWS:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > WINDOW:
                before.append((holder, name, value))
    try:
        for holder, name, _ in before:
            setattr(holder, name, WINDOW)
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


def precision(model: nn.Module, device: torch.device) -> torch.dtype:
    """The lowest precision that the model computes in now."""
    dtype: torch.dtype = next(model.parameters()).dtype
    if torch.is_autocast_enabled(device.type) and dtype == torch.float32:
        return torch.get_autocast_dtype(device.type)
    return dtype


def allowed(dtype: torch.dtype, device: torch.device) -> float:
    """What rounding may do to a state, as a share of its size: half of the precision's digits.

    Rounding grows with a network's depth, from the last digit on, and stays well below that (measured: 1e-6 in fp32 and
    0.01 in bf16); a token that sees another row's tokens, or misses one of its own, is off by a tenth at least.
    """
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else torch.finfo(torch.bfloat16).eps
    if device.type == "cuda" and dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        eps = 2.0**-10  # TensorFloat-32
    return eps**0.5


def difference(found_NX: Tensor, own_NX: Tensor) -> float:
    """The error of the worst of N vectors, as a share of its size; not a number where one of them is none."""
    found_NX, own_NX = found_NX.float(), own_NX.float()
    return float(((found_NX - own_NX).norm(dim=-1) / own_NX.norm(dim=-1)).max())


def difference_in_words(found: float, dtype: torch.dtype, device: torch.device) -> str | None:
    """How far a trial is off, for the log; None where it is no more than rounding."""
    most = allowed(dtype, device)
    if found <= most:  # not a number counts as different
        return None
    return f"differ by {found:.2g} of their size ({dtype} on {device.type}: at most {most:.2g} is rounding)"


def check_causal(model: PreTrainedModel, state_TH: Tensor, other_TH: Tensor) -> None:
    """The states of the same tokens before two different continuations are the same.

    Raises:
        UserError: they are not.
    """
    found = difference(state_TH, other_TH)
    if not found <= allowed(precision(model, state_TH.device), state_TH.device):
        raise UserError(
            "model.base",
            f"{model_name(model)}: a token's state changes by {found:.2g} of its size with the tokens after it, so its "
            "log-probs are not those of the completions that it draws",
            "use a causal model; another version of transformers may mask this one",
        )


def model_name(model: PreTrainedModel) -> str:
    """The model's class and, where it has one, its name."""
    name = getattr(model, "name_or_path", "")
    return f"{type(model).__name__} ({name})" if name else type(model).__name__
