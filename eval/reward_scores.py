"""The raw scores that a reward adapter gives to whole rows."""

from collections.abc import Callable, Sequence

import torch

from ..models.adapters import AdapterSet
from ..models.batching import forward_tokens, right_pad, token_batches
from .shared import shared_rows


@torch.no_grad()
def reward_scores(
    adapters: AdapterSet,
    role: str,
    rows: Sequence[Sequence[int]],
    pad_token_id: int,
    *,
    max_tokens: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[float]:
    """Raw reward of each row of token ids (prompt and response), read at its last token; in the rows' order."""
    scores = [0.0] * len(rows)
    done = 0
    device = next(adapters.model.parameters()).device
    for batch in token_batches([len(row) for row in rows], max_tokens or forward_tokens(adapters.backbone)):
        ids_BL, mask_BL = right_pad([rows[i] for i in batch], pad_token_id, device)
        hidden_BLH = adapters.hidden(role, ids_BL, mask_BL)
        last_B = mask_BL.sum(-1) - 1
        last_B1H = hidden_BLH[torch.arange(len(batch), device=device), last_B][:, None]
        for i, score in zip(batch, adapters.heads[role](last_B1H)[:, 0].tolist(), strict=True):
            scores[i] = score
        done += len(batch)
        if on_batch is not None:
            on_batch(done)
    return scores


def shared_scores(
    label: str, adapters: AdapterSet, role: str, rows: Sequence[Sequence[int]], pad_token_id: int
) -> list[float]:
    """`reward_scores`, by all processes of an evaluation, with a meter of that label."""

    def score(places: Sequence[int], done: Callable[[int], None]) -> list[float]:
        return reward_scores(adapters, role, [rows[place] for place in places], pad_token_id, on_batch=done)

    batches = token_batches([len(row) for row in rows], forward_tokens(adapters.backbone))
    return shared_rows(label, len(rows), score, batches)
