"""Rows of like length together, so that forwards waste little on padding."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Padded tokens in one forward; bounds activations, the projection to the vocabulary is chunked apart from it.
TOKENS_PER_BATCH = 4096


def token_batches(lengths: Sequence[int], max_tokens: int = TOKENS_PER_BATCH) -> Iterator[list[int]]:
    """Row indices in batches whose padded size stays within `max_tokens`; a longer row goes alone.

    The longest rows come first: what does not fit in memory fails at once.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def right_pad(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, L], every row starting in column 0."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([list(row) + [pad_token_id] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask
