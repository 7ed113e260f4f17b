"""The one sampler: PPO's rollouts, evaluation and chat all draw their completions here.

A batch of prompts is prefilled once and decoded with a key-value cache; rows that have ended leave the batch. Every row
draws from a random stream of its own, so what it says does not depend on its neighbours.

Shape suffixes: B rows in flight, P prompt positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import DynamicCache

from .adapters import AdapterSet
from .logprobs import LmHead

# Rows leave the batch once this share of it has ended: copying the cache for every single row would cost more.
COMPACT_BELOW = 0.75


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


@dataclass(frozen=True)
class Generation:
    """Completions in the order of their prompts.

    Attributes:
        tokens: ids of each completion, its EOS included where it was reached.
        logprobs: log-probability of each of those tokens under the whole temperature-scaled distribution, before any
            top-k, top-p or min-p cut: the quantity that training recomputes.
        finished: whether the completion ended at EOS (False: at `max_new_tokens`).
    """

    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)


@contextmanager
def merged(adapters: AdapterSet, role: str | None) -> Iterator[None]:
    """Within it the base carries the adapter's change in its own weights, and no adapter runs.

    Decoding then costs what the base costs. The base's tensors are set aside, never written to, so they come back bit
    for bit. A quantised base cannot be merged exactly: there the adapter runs beside it as in training.
    """
    layers: list[Any] = [
        m for m in adapters.model.modules() if role is not None and isinstance(m, LoraLayer) and role in m.lora_A
    ]
    weights: list[Any] = [layer.get_base_layer().weight for layer in layers]
    if role is None or not all(type(w) is nn.Parameter and w.is_floating_point() for w in weights):
        with adapters.using(role):
            yield
        return
    originals = [w.data for w in weights]
    try:
        for layer, w in zip(layers, weights, strict=True):
            w.data = (w.data.float() + layer.get_delta_weight(role).float()).to(w.dtype)
        with adapters.using(None):
            yield
    finally:
        for w, data in zip(weights, originals, strict=True):
            w.data = data


def filter_probs(probs_BV: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [B, V] with the tokens that top-k, top-p and min-p cut away set to 0 (not renormalised)."""
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
    else:
        logits_BV = logits_BV / sampling.temperature
    logps_BV = logits_BV - logits_BV.logsumexp(-1, keepdim=True)
    if sampling.temperature > 0:
        cdf_BV = filter_probs(logps_BV.exp(), sampling).cumsum(-1)
        total_B1 = cdf_BV[:, -1:]
        token_B = torch.searchsorted(cdf_BV, uniform_B[:, None] * total_B1, right=True).squeeze(-1)
        # Rounding can put a draw at the very end of the mass: then it is the last token that has any.
        token_B = torch.where(token_B == cdf_BV.size(-1), (cdf_BV >= total_B1).int().argmax(-1), token_B)
    return token_B, logps_BV.gather(-1, token_B[:, None]).squeeze(-1)


def left_pad(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, P], every row's last token in the last column."""
    width = max(len(row) for row in rows)
    ids_BP = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in rows], device=device)
    mask_BP = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids_BP, mask_BP


def _decode_batch(
    backbone: Any,
    head: LmHead,
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    max_new_tokens: int,
    eos_token_id: int,
    pad_token_id: int,
    sampling: Sampling,
) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and log-probabilities of one batch of prompts; `uniforms` [B, max_new_tokens] on the model's device."""
    device = uniforms.device
    ids_BP, mask_BP = left_pad(prompts, pad_token_id, device)
    position_BP = (mask_BP.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=backbone.config)
    alive_B = torch.arange(len(prompts), device=device)
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    done_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        output = backbone(
            input_ids=ids_BP,
            attention_mask=mask_BP,
            position_ids=position_BP,
            past_key_values=cache,
            use_cache=True,
        )
        token_B, logp_B = choose(head.logits(output.last_hidden_state[:, -1]), uniforms[alive_B, step], sampling)
        for row, token, logp, done in zip(
            alive_B.tolist(), token_B.tolist(), logp_B.tolist(), done_B.tolist(), strict=True
        ):
            if not done:
                tokens[row].append(token)
                logprobs[row].append(logp)
        done_B = done_B | (token_B == eos_token_id)
        n_alive = int((~done_B).sum())
        if n_alive == 0:
            break
        if n_alive <= COMPACT_BELOW * done_B.numel():
            keep = (~done_B).nonzero().squeeze(-1)
            cache.batch_select_indices(keep)
            alive_B, token_B, done_B = alive_B[keep], token_B[keep], done_B[keep]
            mask_BP, position_BP = mask_BP[keep], position_BP[keep]
        ids_BP = token_B[:, None]
        mask_BP = torch.cat([mask_BP, mask_BP.new_ones(mask_BP.size(0), 1)], dim=1)
        position_BP = position_BP[:, -1:] + 1
    return tokens, logprobs


@torch.no_grad()
def sample(
    adapters: AdapterSet,
    role: str | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int,
    pad_token_id: int,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    batch_size: int = 32,
    merge: bool = True,
    on_batch: Callable[[int], None] | None = None,
) -> Generation:
    """Draw one completion for each prompt.

    Args:
        adapters: the base with its adapters.
        role: the adapter that speaks; None is the base.
        prompts: token ids, ending where the reply begins; not one may be empty.
        max_new_tokens: at most so many tokens a completion, EOS included.
        seed: with a prompt's place in the list it fixes that row's random stream, whatever the batch size.
        merge: fold the adapter into the base's weights while decoding (see `merged`).
        on_batch: called with the number of prompts done so far, after each batch.

    Raises:
        ValueError: an empty prompt, or a setting out of its range.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty, expected at least one token; give it a BOS or a chat template")
    sampling = Sampling(temperature, top_k, top_p, min_p)
    model = adapters.model.get_base_model()
    head = LmHead.of(adapters.lm_head, model.config)
    device = head.weight.device
    # Rows of like length together, the longest first: a batch too large for memory then fails at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        with merged(adapters, role) if merge else adapters.using(role):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                uniforms = torch.stack([_uniforms(seed, i, max_new_tokens) for i in rows]).to(device)
                batch = _decode_batch(
                    adapters.backbone,
                    head,
                    [prompts[i] for i in rows],
                    uniforms,
                    max_new_tokens,
                    eos_token_id,
                    pad_token_id,
                    sampling,
                )
                for i, row_tokens, row_logprobs in zip(rows, *batch, strict=True):
                    tokens[i], logprobs[i] = row_tokens, row_logprobs
                if on_batch is not None:
                    on_batch(start + len(rows))
    finally:
        model.train(was_training)
    return Generation(tokens, logprobs, [bool(row) and row[-1] == eos_token_id for row in tokens])


def _uniforms(seed: int, index: int, count: int) -> Tensor:
    """`count` draws in [0, 1) of the stream that (seed, index) names, made on the CPU so that devices agree."""
    # Two primes far apart: neighbouring seeds and neighbouring rows never share a stream.
    generator = torch.Generator().manual_seed((seed * 2_147_483_647 + index * 1_000_003) % (2**63))
    return torch.rand(count, generator=generator)
