"""Rows of like length together, so that forwards waste little on padding, and the padding itself.

Legend of shape suffixes: B rows, L padded positions.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

TokenIds = Sequence[int]

TOKENS_PER_BATCH = 4096
"""Padded tokens of one forward without gradients on a CPU, where more of them make nothing faster."""

_FEWEST, _MOST, _SHARE = 1024, 16_384, 8
"""On a GPU: from so many to so many, in one eighth of the memory that the weights, and the merged ones, leave free."""


def forward_tokens(backbone: PreTrainedModel) -> int:
    """Padded tokens of one forward without gradients: they bound its activations.

    On a GPU as many as its memory has room for, by its size and not by what happens to be free: the same card takes
    the same batches when a run goes on. The projection to the vocabulary has chunks of its own.
    """
    device = next(backbone.parameters()).device
    if device.type != "cuda":
        return TOKENS_PER_BATCH
    held = sum(weight.numel() * weight.element_size() for weight in backbone.parameters())
    return tokens_in(torch.cuda.get_device_properties(device).total_memory, held, backbone.config, backbone.dtype)


def tokens_in(memory: int, weights: int, config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """`forward_tokens` on a GPU of so many bytes, with so many bytes of weights."""
    room = max(0, memory - 2 * weights) // _SHARE // _token_bytes(config.get_text_config(), dtype)
    return min(max(1 << room.bit_length() >> 1, _FEWEST), _MOST)


def _token_bytes(text: PreTrainedConfig, dtype: torch.dtype) -> int:
    """What a token takes in the widest moment of a layer, generously: the residual stream and attention's inputs, the
    feed-forward's two inner states and their product, a norm in fp32."""
    hidden: int = text.hidden_size
    inner: int = getattr(text, "intermediate_size", None) or 4 * hidden
    # of a mixture of experts, as many as see the token
    expert: int = getattr(text, "moe_intermediate_size", None) or 0
    inner = max(inner, expert * (getattr(text, "num_experts_per_tok", None) or 1))
    return dtype.itemsize * (6 * hidden + 3 * inner) + 8 * hidden


def token_batches(lengths: Sequence[int], max_tokens: int = TOKENS_PER_BATCH) -> Iterator[list[int]]:
    """Row indices in batches whose padded size stays within `max_tokens`; a longer row goes alone.

    The longest rows come first: what does not fit in memory fails at once.
    """
    batch: list[int] = []
    for index in by_length(lengths):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def row_batches(lengths: Sequence[int], rows: int, *, longest_first: bool = True) -> Iterator[list[int]]:
    """Row indices in batches of `rows` rows (the last one of what is left)."""
    order = by_length(lengths, longest_first=longest_first)
    for start in range(0, len(order), rows):
        yield order[start : start + rows]


def by_length(lengths: Sequence[int], *, longest_first: bool = True) -> list[int]:
    """Row indices by length; rows of equal length keep their order."""
    sign = -1 if longest_first else 1
    return sorted(range(len(lengths)), key=lambda i: sign * lengths[i])


def right_pad(rows: Sequence[TokenIds], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, L], every row's first token in the first column."""
    width = max(len(row) for row in rows)
    ids_BL = torch.tensor([list(row) + [pad_token_id] * (width - len(row)) for row in rows], device=device)
    mask_BL = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids_BL, mask_BL


def left_pad(rows: Sequence[TokenIds], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, L], every row's last token in the last column."""
    width = max(len(row) for row in rows)
    ids_BL = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in rows], device=device)
    mask_BL = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids_BL, mask_BL
