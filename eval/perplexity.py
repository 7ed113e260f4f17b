"""Perplexity of demonstrations under a policy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..data.encode import IGNORED
from ..models.adapters import AdapterSet
from ..models.batching import forward_tokens, right_pad, token_batches
from .statistics.intervals import Z95, ratio_se


@dataclass(frozen=True)
class Perplexity:
    """Negative log-likelihood of the labelled tokens, at temperature 1.

    Attributes:
        nll, nll_se: nats per token over all tokens, and its standard error with rows as units.
        perplexity: exp(nll).
        ci_low, ci_high: interval of the perplexity, exp(nll -+ 1.96 nll_se).
        n: rows.
        tokens: labelled tokens.
    """

    nll: float
    nll_se: float
    perplexity: float
    ci_low: float
    ci_high: float
    n: int
    tokens: int


@torch.no_grad()
def sequence_nlls(
    adapters: AdapterSet,
    role: str | None,
    input_ids: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    max_tokens: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[float]:
    """Summed NLL in nats of each row's labelled tokens; the label `IGNORED` counts for nothing.

    Args:
        input_ids, labels: [rows][tokens], the label of a token standing at the token's own place.
    """
    nlls = [0.0] * len(input_ids)
    done = 0
    device = next(adapters.model.parameters()).device
    head = adapters.head_under(role)
    for rows in token_batches([len(row) for row in input_ids], max_tokens or forward_tokens(adapters.backbone)):
        ids_BL, mask_BL = right_pad([input_ids[i] for i in rows], pad_token_id, device)
        labels_BL, _ = right_pad([labels[i] for i in rows], IGNORED, device)
        # Position t predicts token t + 1.
        targets_BL = labels_BL[:, 1:]
        counts_BL = targets_BL != IGNORED
        hidden_NH, targets_N = adapters.hidden(role, ids_BL, mask_BL)[:, :-1][counts_BL], targets_BL[counts_BL]
        logps_N, _ = head.token_logprobs(hidden_NH, targets_N)
        nlls_N = -logps_N.double()
        for i, row in zip(rows, nlls_N.split(counts_BL.sum(-1).tolist()), strict=True):
            nlls[i] = float(row.sum())
        done += len(rows)
        if on_batch is not None:
            on_batch(done)
    return nlls


def summarise(nlls: Sequence[float], tokens: Sequence[int]) -> Perplexity:
    """Perplexity with its interval, from the rows' summed NLLs and their numbers of labelled tokens."""
    nll, se = ratio_se(nlls, tokens)
    return Perplexity(
        nll=nll,
        nll_se=se,
        perplexity=math.exp(nll),
        ci_low=math.exp(nll - Z95 * se),
        ci_high=math.exp(nll + Z95 * se),
        n=len(nlls),
        tokens=sum(tokens),
    )
