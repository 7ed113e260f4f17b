"""How the next token is chosen: temperature, cuts, and one random stream a row.

Shape suffixes: B rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 means greedy.
        top_k: keep the k likeliest tokens (0: all).
        top_p: keep the smallest set of tokens with at least this probability (1: all).
        min_p: keep tokens with at least this share of the likeliest token's probability (0: all).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected a number in (0, 1]")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p is {self.min_p}, expected a number in [0, 1)")


def filter_probs(probs_BV: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [B, V] with the tokens that top-k, top-p and min-p cut away set to 0 (not renormalised)."""
    if sampling.min_p == 0 and sampling.top_k == 0 and sampling.top_p == 1:
        return probs_BV
    keep_BV = torch.ones_like(probs_BV, dtype=torch.bool)
    if sampling.min_p > 0:
        keep_BV &= probs_BV >= sampling.min_p * probs_BV.amax(-1, keepdim=True)
    if 0 < sampling.top_k < probs_BV.size(-1):
        keep_BV &= probs_BV >= probs_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
    if sampling.top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
        # A token stays while the mass before it is short of top_p, so the likeliest token always stays.
        inside_BV = sorted_BV.cumsum(-1) - sorted_BV < sampling.top_p
        keep_BV &= torch.zeros_like(keep_BV).scatter(-1, order_BV, inside_BV)
    return probs_BV * keep_BV


def choose(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-probability.

    Args:
        logits_BV: raw logits [B, V].
        uniform_B: one draw in [0, 1) a row; the token is found by inverting the cumulative distribution, which is
            several times cheaper than `torch.multinomial` over a large vocabulary.

    Returns:
        token ids [B] and their log-probabilities [B] under softmax(logits / temperature) (greedy: temperature 1).
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0:
        token_B = logits_BV.argmax(-1)
    elif sampling.temperature != 1:
        logits_BV = logits_BV / sampling.temperature
    if sampling.temperature > 0:
        cdf_BV = filter_probs(logits_BV.softmax(-1), sampling).cumsum(-1)
        total_B1 = cdf_BV[:, -1:]
        token_B = torch.searchsorted(cdf_BV, uniform_B[:, None] * total_B1, right=True).squeeze(-1)
        # Rounding can put a draw at the very end of the mass: then it is the last token that has any.
        token_B = torch.where(token_B == cdf_BV.size(-1), (cdf_BV >= total_B1).int().argmax(-1), token_B)
    return token_B, logits_BV.gather(-1, token_B[:, None]).squeeze(-1) - logits_BV.logsumexp(-1)


def uniforms(seed: int, index: int, count: int) -> Tensor:
    """`count` draws in [0, 1) of the stream that (seed, index) names, made on the CPU so that devices agree."""
    # Two primes far apart: neighbouring seeds and neighbouring rows never share a stream.
    generator = torch.Generator().manual_seed((seed * 2_147_483_647 + index * 1_000_003) % (2**63))
    return torch.rand(count, generator=generator)
