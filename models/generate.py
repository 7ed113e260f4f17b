"""The one sampler: PPO's rollouts, evaluation and chat all draw their completions here.

Prompts are prefilled, each distinct one once, and decoded together with a key-value cache; a row that has ended gives
its place to a waiting prompt. Every row draws from a random stream of its own, so what it says does not depend on its
neighbours.

Shape suffixes: N requests, B rows in flight, P prompt positions, W columns in use, V vocabulary.
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
from .row_cache import RowCache
from .sampling import Sampling, choose, uniforms

# Places are refilled, or the batch made smaller, once this share of it has ended: copying for every single row would
# cost more than it saves.
RENEW_AT = 1 / 8


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


def left_pad(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, P], every row's last token in the last column."""
    width = max(len(row) for row in rows)
    ids_BP = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in rows], device=device)
    mask_BP = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids_BP, mask_BP


class _Decoder:
    """One call's requests and the rows in flight.

    Attributes:
        tokens_NS, logps_NS: what was sampled, S = `max_new_tokens`; one row more than requests, for idle places.
        count_N: tokens of each request so far.
        request_B: which request each row serves; N where the place is idle.
        step_B: tokens sampled so far. length_B: prompt and sampled tokens, the newest not yet in the cache included.
        idle: places that serve no request.
    """

    def __init__(
        self,
        backbone: Any,
        head: LmHead,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        pad_token_id: int,
        seed: int,
        batch_size: int,
        done: Callable[[int], None] | None,
    ) -> None:
        self.backbone, self.head, self.prompts, self.sampling = backbone, head, prompts, sampling
        self.max_new_tokens, self.pad_token_id, self.done = max_new_tokens, pad_token_id, done
        device = self.device = head.weight.device
        n = len(prompts)
        self.stop_ids = torch.tensor(stop_ids, device=device)
        self.uniforms_NS = torch.stack([uniforms(seed, i, max_new_tokens) for i in (*range(n), n)]).to(device)
        self.tokens_NS = torch.full((n + 1, max_new_tokens), pad_token_id, device=device)
        self.logps_NS = torch.zeros((n + 1, max_new_tokens), device=device)
        self.count_N = torch.zeros(n + 1, dtype=torch.long, device=device)
        # The longest first: a batch too large for memory fails at once, and a later prompt always fits. Equal prompts
        # stand together, so that they are prefilled once.
        self.waiting = sorted(range(n), key=lambda i: (-len(prompts[i]), list(prompts[i])))[::-1]
        rows = min(batch_size, n)
        self.request_B = torch.full((rows,), n, device=device)
        self.step_B, self.length_B = self.request_B.new_zeros(rows), self.request_B.new_zeros(rows)
        self.newest_B = self.request_B.new_full((rows,), pad_token_id)
        self.idle = rows
        width = max(map(len, prompts)) + max_new_tokens
        self.cache = RowCache(rows, width, backbone.config.get_text_config().num_hidden_layers)

    def run(self) -> None:
        """Until every request has its completion."""
        while self.waiting or self.idle < len(self.request_B):
            if self.idle >= RENEW_AT * len(self.request_B):
                ended = self._admit() if self.waiting else self._shrink()
            else:
                ended = self._step()
            if ended:
                self.idle = int((self.request_B == len(self.prompts)).sum())
                if self.done is not None:
                    self.done(len(self.prompts) - len(self.waiting) - (len(self.request_B) - self.idle))

    def _admit(self) -> bool:
        """Waiting prompts take the idle places; whether one of them ended with its first token."""
        slots = (self.request_B == len(self.prompts)).nonzero().squeeze(-1)[: len(self.waiting)]
        requests = [self.waiting.pop() for _ in range(len(slots))]
        distinct: dict[tuple[int, ...], int] = {}
        source = torch.tensor(
            [distinct.setdefault(tuple(self.prompts[i]), len(distinct)) for i in requests], device=self.device
        )
        ids_BP, mask_BP = left_pad(list(distinct), self.pad_token_id, self.device)
        # a plain cache keeps every position, of layers with a sliding window too
        prefilled = DynamicCache()
        output = self.backbone(
            input_ids=ids_BP,
            attention_mask=mask_BP,
            position_ids=(mask_BP.cumsum(-1) - 1).clamp(min=0),
            past_key_values=prefilled,
            use_cache=True,
        )
        self.cache.insert(slots, prefilled, source)
        self.idle -= len(requests)
        self.request_B[slots] = torch.tensor(requests, device=self.device)
        self.step_B[slots] = 0
        self.length_B[slots] = mask_BP.sum(-1)[source]
        return self._sample(output.last_hidden_state[:, -1][source], slots)

    def _step(self) -> bool:
        """One more token for every row; whether one ended."""
        cache = self.cache
        cache.make_room()
        # rows that have ended count as short, so that they hold no column
        width = int(self.length_B.max())
        cache.start = cache.stop - (width - 1)
        column_W = torch.arange(width, device=self.device)
        output = self.backbone(
            input_ids=self.newest_B[:, None],
            attention_mask=(column_W >= width - self.length_B[:, None]).long(),
            position_ids=self.length_B[:, None] - 1,
            past_key_values=cache,
            use_cache=True,
        )
        cache.stop += 1
        return self._sample(output.last_hidden_state[:, -1], slice(None))

    def _sample(self, hidden_BH: Tensor, slots: Tensor | slice) -> bool:
        """Choose and keep the next token of these rows; whether one of them ended with it."""
        n = len(self.prompts)
        request_B, step_B = self.request_B[slots], self.step_B[slots]
        token_B, logp_B = choose(self.head.logits(hidden_BH), self.uniforms_NS[request_B, step_B], self.sampling)
        self.tokens_NS[request_B, step_B] = token_B
        self.logps_NS[request_B, step_B] = logp_B
        step_B = step_B + 1
        self.count_N[request_B] = step_B
        active_B = request_B != n
        ended_B = active_B & (torch.isin(token_B, self.stop_ids) | (step_B == self.max_new_tokens))
        goes_on_B = active_B & ~ended_B
        self.newest_B[slots] = token_B
        self.step_B[slots] = step_B * goes_on_B
        self.length_B[slots] = torch.where(goes_on_B, self.length_B[slots] + 1, 1)
        self.request_B[slots] = torch.where(goes_on_B, request_B, n)
        return bool(ended_B.any())

    def _shrink(self) -> bool:
        """No prompt waits: idle places go. Nothing ends by it."""
        keep = (self.request_B != len(self.prompts)).nonzero().squeeze(-1)
        self.cache.keep(keep)
        for name in ("request_B", "step_B", "length_B", "newest_B"):
            setattr(self, name, getattr(self, name)[keep])
        self.idle = 0
        return False


@torch.no_grad()
def sample(
    adapters: AdapterSet,
    role: str | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int],
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
    """Draw one completion for each prompt; a prompt that is to have n completions stands n times in the list.

    Args:
        adapters: the base with its adapters.
        role: the adapter that speaks; None is the base.
        prompts: token ids, ending where the reply begins; not one may be empty.
        max_new_tokens: at most so many tokens a completion, EOS included.
        eos_token_id: a completion ends with this token, or with the first of these.
        seed: with a prompt's place in the list it fixes that row's random stream, whatever the batch size.
        batch_size: rows decoded at once.
        merge: fold the adapter into the base's weights while decoding (see `merged`).
        on_batch: called with the number of completions done so far, whenever some ended.

    Raises:
        ValueError: an empty prompt, or a setting out of its range.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty, expected at least one token; give it a BOS or a chat template")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected 1 or more")
    sampling = Sampling(temperature, top_k, top_p, min_p)
    if not prompts:
        return Generation()
    model = adapters.model.get_base_model()
    stop_ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    was_training = model.training
    model.eval()
    try:
        with merged(adapters, role) if merge else adapters.using(role):
            decoder = _Decoder(
                adapters.backbone,
                LmHead.of(adapters.lm_head, model.config),
                prompts,
                sampling,
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids,
                pad_token_id=pad_token_id,
                seed=seed,
                batch_size=batch_size,
                done=on_batch,
            )
            decoder.run()
    finally:
        model.train(was_training)
    counts = decoder.count_N.tolist()[: len(prompts)]
    tokens = [row[:count] for row, count in zip(decoder.tokens_NS.tolist(), counts, strict=False)]
    logprobs = [row[:count] for row, count in zip(decoder.logps_NS.tolist(), counts, strict=False)]
    return Generation(tokens, logprobs, [row[-1] in stop_ids for row in tokens])
