"""Rows of like length together, so that forwards waste little on padding, and the padding itself.

Legend of shape suffixes: B rows, L padded positions.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

TokenIds = Sequence[int]

TOKENS_PER_BATCH = 4096
"""Padded tokens of one forward. They bound its activations; the projection to the vocabulary has chunks of its own."""


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
