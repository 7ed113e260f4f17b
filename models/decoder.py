"""Decoding many prompts together: who is in flight, what each row drew, when a row leaves.

Shape suffixes: N requests, S steps, B rows in flight, P prompt positions, W columns in use, H hidden size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .logprobs import LmHead
from .row_cache import RowCache
from .sampling import Sampling, choose, uniforms

# Places are refilled, or the batch made smaller, once this share of it has ended: copying for every single row would
# cost more than it saves.
RENEW_AT = 1 / 8


def left_pad(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, P], every row's last token in the last column."""
    width = max(len(row) for row in rows)
    ids_BP = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in rows], device=device)
    mask_BP = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids_BP, mask_BP


class Decoder:
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


class StatefulDecoder(Decoder):
    """For models whose layers keep a state (Mamba, linear attention), which cannot be moved between columns: rows are
    decoded by the batch, each with transformers' own cache, until the last one has ended."""

    def run(self) -> None:
        """Until every request has its completion."""
        n, places = len(self.prompts), len(self.request_B)
        while self.waiting:
            requests = [self.waiting.pop() for _ in range(min(places, len(self.waiting)))]
            ids_BP, mask_BP = left_pad([self.prompts[i] for i in requests], self.pad_token_id, self.device)
            self.request_B = torch.tensor(requests, device=self.device)
            self.step_B, self.length_B = torch.zeros_like(self.request_B), mask_BP.sum(-1)
            self.newest_B = torch.zeros_like(self.request_B)
            cache, position_BP = DynamicCache(config=self.backbone.config), (mask_BP.cumsum(-1) - 1).clamp(min=0)
            while bool((self.request_B != n).any()):
                output = self.backbone(
                    input_ids=ids_BP,
                    attention_mask=mask_BP,
                    position_ids=position_BP,
                    past_key_values=cache,
                    use_cache=True,
                )
                self._sample(output.last_hidden_state[:, -1], slice(None))
                ids_BP, position_BP = self.newest_B[:, None], position_BP[:, -1:] + 1
                mask_BP = torch.cat([mask_BP, mask_BP.new_ones(len(mask_BP), 1)], dim=1)
            if self.done is not None:
                self.done(n - len(self.waiting))
