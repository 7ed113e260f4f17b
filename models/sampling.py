"""How the next token is chosen: temperature, cuts, and one random stream a row.

Shape suffixes: B rows, V vocabulary, K blocks of the vocabulary, T tokens of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 means greedy.
        top_k: keep the k likeliest tokens (0: all).
        top_p: keep the smallest set of tokens with at least this probability (1: all).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected a number in (0, 1]")

    @property
    def cuts(self) -> bool:
        """Whether some tokens are left out."""
        return self.top_k > 0 or self.top_p < 1


def filter_probs(probs_BV: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [B, V] with the tokens that top-k and top-p cut away set to 0 (not renormalised)."""
    if not sampling.cuts:
        return probs_BV
    keep_BV = torch.ones_like(probs_BV, dtype=torch.bool)
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
        logits_BV: raw logits [B, V]. They are used up: in fp32 the probabilities are made in their place.
        uniform_B: one draw in [0, 1) a row, see `invert_cdf`.

    Returns:
        token ids [B] and their log-probabilities [B] under softmax(logits / temperature) (greedy: temperature 1).
    """
    if sampling.temperature == 0:
        token_B1 = logits_BV.argmax(-1, keepdim=True)
        return token_B1.squeeze(-1), logits_BV.float().log_softmax(-1).gather(-1, token_B1).squeeze(-1)
    scaled_BV = logits_BV.float().div_(sampling.temperature)
    probs_BV = torch.softmax(scaled_BV, -1, out=scaled_BV)
    token_B1 = invert_cdf(filter_probs(probs_BV, sampling), uniform_B)
    # A token that can be drawn has a probability far above fp32's smallest, so its logarithm loses nothing.
    return token_B1.squeeze(-1), probs_BV.gather(-1, token_B1).log().squeeze(-1)


def invert_cdf(mass_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The tokens [B, 1] at which the cumulative mass first exceeds `uniform` times the whole.

    First the block of tokens is found, then the token in it: sums of blocks cost one fast pass, where a cumulative sum
    over a large vocabulary is slow (and `torch.multinomial` many times slower). A token without mass is never chosen.
    """
    blocks = mass_BV.size(1) // BLOCK
    whole_BK = mass_BV[:, : blocks * BLOCK].view(len(mass_BV), blocks, BLOCK).sum(-1)
    block_BK = torch.cat([whole_BK, mass_BV[:, blocks * BLOCK :].sum(-1, keepdim=True)], dim=-1)
    cdf_BK = block_BK.cumsum(-1)
    draw_B1 = _below(uniform_B[:, None] * cdf_BK[:, -1:], cdf_BK[:, -1:])
    found_B1 = torch.searchsorted(cdf_BK, draw_B1, right=True)
    draw_B1 = draw_B1 - (cdf_BK - block_BK).gather(1, found_B1)
    index_BT = found_B1 * BLOCK + torch.arange(BLOCK, device=mass_BV.device)
    inside_BT = index_BT < mass_BV.size(1)
    cdf_BT = (mass_BV.gather(1, index_BT.clamp(max=mass_BV.size(1) - 1)) * inside_BT).cumsum(-1)
    return found_B1 * BLOCK + torch.searchsorted(cdf_BT, _below(draw_B1, cdf_BT[:, -1:]), right=True)


def _below(draw_B1: Tensor, total_B1: Tensor) -> Tensor:
    """The draw, kept within [0, total): rounding can put it on the edge, which no token exceeds."""
    return torch.minimum(draw_B1.clamp(min=0), total_B1.nextafter(torch.zeros_like(total_B1)))


def uniforms(seed: int, index: int, count: int) -> Tensor:
    """`count` draws in [0, 1) of the stream that (seed, index) names, made on the CPU so that devices agree."""
    # Two primes far apart: neighbouring seeds and neighbouring rows never share a stream.
    generator = torch.Generator().manual_seed((seed * 2_147_483_647 + index * 1_000_003) % (2**63))
    return torch.rand(count, generator=generator)
