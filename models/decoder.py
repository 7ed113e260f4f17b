"""Decoding many prompts together: who is in flight, what each row drew, when a row leaves.

Shape suffixes: N requests, S steps, B rows in flight, C columns of the cache, H hidden size,
E tokens that end a completion.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .. import stopping
from .batching import left_pad
from .causal import decoder_of
from .compiled_step import CompiledStep, step_for
from .logprobs import LmHead
from .packing import ATTENTION, attention_of
from .prefill import Prefilled, prefill
from .prepack import Product
from .row_cache import RowCache
from .sampling import Sampling, choose, uniforms
from .token_kernels import TokenKernels
from .token_step import TokenStep, sees_everything

logger = logging.getLogger(__name__)

# Places are refilled, or the batch made smaller, once this share of it has ended: copying for every single row would
# cost more than it saves.
RENEW_AT = 1 / 16


class Decoder:
    """One call's requests and the rows in flight; the way that `words` names.

    Attributes:
        tokens_NS, logps_NS: what was sampled, S = `max_new_tokens`; one row more than requests, for idle places.
        count_N: tokens of each request so far. stopped_N: whether its newest one is EOS.
        request_B: which request each row serves; N where the place is idle.
        step_B: tokens sampled so far. length_B: prompt and sampled tokens, the newest not yet in the cache included.
        idle: places that serve no request.
        asked: how many of the requests are served here.
    """

    words = "row by row, with a cache of ours"
    token_step: TokenStep | None = None
    drawing: TokenKernels | None = None
    """What draws the tokens; None: PyTorch's operations."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: LmHead,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int],
        pad_token_id: int,
        seed: int | Sequence[int],
        batch_size: int | None,
        done: Callable[[int], None] | None,
        heard: Callable[[list[int], list[int]], None] | None = None,
        joint: Mapping[nn.Module, Product] | None = None,
        only: Sequence[int] | None = None,
        first: int = 0,
    ) -> None:
        self.model, self.backbone = model, decoder_of(model)
        self.head, self.prompts, self.sampling = head, prompts, sampling
        self.max_new_tokens, self.pad_token_id, self.done, self.heard = max_new_tokens, pad_token_id, done, heard
        device = self.device = head.weight.device
        n = len(prompts)
        self.eos_E = torch.tensor(
            [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id), device=device
        )
        streams = [(seed, first + i) for i in range(n)] if isinstance(seed, int) else [(each, 0) for each in seed]
        self.uniforms_NS = torch.stack([uniforms(s, i, max_new_tokens) for s, i in (*streams, (0, n))]).to(device)
        self.tokens_NS = torch.full((n + 1, max_new_tokens), pad_token_id, device=device)
        self.logps_NS = torch.zeros((n + 1, max_new_tokens), device=device)
        self.count_N = torch.zeros(n + 1, dtype=torch.long, device=device)
        self.stopped_N = torch.zeros(n + 1, dtype=torch.bool, device=device)
        # The longest first: a batch too large for memory fails at once, and a later prompt always fits. Equal prompts
        # stand together, so that they are prefilled once.
        asked = range(n) if only is None else only
        self.asked = len(asked)
        self.waiting = sorted(asked, key=lambda i: (-len(prompts[i]), list(prompts[i])))[::-1]
        # A batch's worth of prompts is prefilled at once, more than there may be places for at that moment.
        self.prefill: Prefilled | None = None
        self.prefilled: list[int] = []
        wanted = min(batch_size or self.asked, self.asked)
        rows = self._places(wanted)
        if batch_size is not None and rows < wanted:
            logger.info("%d prompts are decoded at once, not %d: memory holds no more", rows, wanted)
        self.request_B = torch.full((rows,), n, device=device)
        self.step_B, self.length_B = self.request_B.new_zeros(rows), self.request_B.new_zeros(rows)
        self.newest_B = self.request_B.new_full((rows,), pad_token_id)
        self.idle = rows
        self._open(joint or {})

    def _places(self, asked: int) -> int:
        """How many of so many rows are in flight at once."""
        return asked

    def _open(self, joint: Mapping[nn.Module, Product]) -> None:
        """What a way of decoding keeps beside the requests."""
        self.whole_mask = sees_everything(self.backbone) and attention_of(self.backbone.config) in ("sdpa", ATTENTION)
        self.token_step = step_for(self.backbone, joint)
        if isinstance(self.token_step, CompiledStep) and self.sampling.temperature and not self.sampling.cuts:
            self.drawing = self.token_step.kernels
        self.cache = RowCache(len(self.request_B), self.backbone.config.get_text_config().num_hidden_layers)

    def run(self) -> None:
        """Until every request has its completion."""
        while self.left or self.idle < len(self.request_B):
            stopping.poll()
            if self.idle >= RENEW_AT * len(self.request_B):
                ended = self._admit() if self.left else self._shrink()
            else:
                ended = self._step()
            if ended:
                self.idle = int((self.request_B == len(self.prompts)).sum())
                if self.done is not None:
                    self.done(self.asked - self.left - (len(self.request_B) - self.idle))

    @property
    def left(self) -> int:
        """Requests that have no place yet."""
        return len(self.waiting) + len(self.prefilled)

    def _admit(self) -> bool:
        """Waiting prompts take the idle places; whether one of them ended with its first token."""
        if self.prefill is None:
            coming = [self.waiting.pop() for _ in range(min(len(self.request_B), len(self.waiting)))]
            prompts = [self.prompts[i] for i in coming]
            self.prefill, self.prefilled = prefill(self.backbone, prompts, self.pad_token_id, self.device), coming[::-1]
        ready = self.prefill
        slots = (self.request_B == len(self.prompts)).nonzero().squeeze(-1)[: len(self.prefilled)]
        requests = [self.prefilled.pop() for _ in range(len(slots))]
        source = ready.rows([self.prompts[i] for i in requests])
        self.cache.insert(slots, ready, source)
        self.request_B[slots] = torch.tensor(requests, device=self.device)
        self.step_B[slots] = 0
        self.length_B[slots] = ready.length_B[source]
        self.idle -= len(slots)
        if not self.prefilled:
            self.prefill = None  # used up: its memory is free for what comes
        return self._sample(ready.last_BH[source], slots)

    def _step(self) -> bool:
        """One more token for every row; whether one ended."""
        cache = self.cache
        # rows that have ended count as short, so that they hold no column
        cache.make_room(int(self.length_B.max()) - 1)
        if self.token_step is not None:
            hidden_BH = self.token_step(self.newest_B, self.length_B, cache)
        else:
            # where it can be, ready made and additive: then neither transformers nor any layer makes it so again
            dtype = self.head.weight.dtype
            hidden_BH = self.backbone(
                input_ids=self.newest_B[:, None],
                attention_mask=cache.mask(self.length_B, dtype)[:, None, None]
                if self.whole_mask
                else cache.seen(self.length_B).long(),
                position_ids=self.length_B[:, None] - 1,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
        cache.stop += 1
        return self._sample(hidden_BH, slice(None))

    def _sample(self, hidden_BH: Tensor, slots: Tensor | slice) -> bool:
        """Choose and keep the next token of these rows; whether one of them ended with it."""
        logits = self.head.logits if self.drawing is None else self.head.bare_logits
        return self._choose(logits(hidden_BH), slots)

    def _choose(self, logits_BV: Tensor, slots: Tensor | slice) -> bool:
        return bool(self._keep(logits_BV, slots).any())

    def _keep(self, logits_BV: Tensor, slots: Tensor | slice) -> Tensor:
        """Choose and keep; which of the rows ended [B]. Where nobody listens the device is not waited for, and what
        changes stays where it is in memory."""
        n = len(self.prompts)
        request_B, step_B = self.request_B[slots], self.step_B[slots]
        token_B, logp_B = self._drawn(logits_BV, self.uniforms_NS[request_B, step_B])
        self.tokens_NS[request_B, step_B] = token_B
        self.logps_NS[request_B, step_B] = logp_B
        self.stopped_N[request_B] = stopped_B = (token_B[:, None] == self.eos_E).any(-1)
        step_B = step_B + 1
        self.count_N[request_B] = step_B
        active_B = request_B != n
        ended_B = active_B & (stopped_B | (step_B == self.max_new_tokens))
        goes_on_B = active_B & ~ended_B
        if self.heard is not None:
            # before the rows go on: `request_B` may be a view of what changes then
            self.heard(request_B[active_B].tolist(), token_B[active_B].tolist())
        self.newest_B[slots] = token_B
        self.step_B[slots] = step_B * goes_on_B
        self.length_B[slots] = torch.where(goes_on_B, self.length_B[slots] + 1, 1)
        self.request_B[slots] = torch.where(goes_on_B, request_B, n)
        return ended_B

    def _drawn(self, logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of each row and its log-probability."""
        if self.drawing is None or logits_BV.dtype != torch.bfloat16:
            return choose(logits_BV, uniform_B, self.sampling)
        return self.drawing.draw(logits_BV, uniform_B, self.sampling.temperature)

    def _shrink(self) -> bool:
        """No prompt waits: idle places go. Nothing ends by it."""
        self._keep_rows((self.request_B != len(self.prompts)).nonzero().squeeze(-1))
        self.idle = 0
        return False

    def _keep_rows(self, rows: Tensor) -> None:
        self.cache.keep(rows)
        for name in ("request_B", "step_B", "length_B", "newest_B"):
            setattr(self, name, getattr(self, name)[rows])


class StatefulDecoder(Decoder):
    """For models whose layers keep a state (Mamba, linear attention), which cannot be moved between columns: rows are
    decoded by the batch, each with transformers' own cache, until the last one has ended."""

    words = "by the batch, with transformers' own cache"

    def _open(self, joint: Mapping[nn.Module, Product]) -> None:
        self.places = len(self.request_B)

    def _begin(self, requests: list[int]) -> None:
        """These requests are in flight, and no other."""
        self.request_B = torch.tensor(requests, device=self.device)
        self.step_B, self.newest_B = torch.zeros_like(self.request_B), torch.zeros_like(self.request_B)
        self.length_B = torch.tensor([len(self.prompts[i]) for i in requests], device=self.device)

    def run(self) -> None:
        """Until every request has its completion."""
        n = len(self.prompts)
        while self.waiting:
            requests = [self.waiting.pop() for _ in range(min(self.places, len(self.waiting)))]
            ids_BP, mask_BP = left_pad([self.prompts[i] for i in requests], self.pad_token_id, self.device)
            self._begin(requests)
            cache, position_BP = DynamicCache(config=self.backbone.config), (mask_BP.cumsum(-1) - 1).clamp(min=0)
            while bool((self.request_B != n).any()):
                stopping.poll()
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
                self.done(self.asked - len(self.waiting))


class LibraryDecoder(StatefulDecoder):
    """For models that our ways do not suit: transformers' `generate` over prompts of one length, so without padding,
    with the model's own head and cache. The tokens are chosen here, row by row, as everywhere."""

    words = "by transformers' generate, prompts of one length together"
    use_cache = True

    def run(self) -> None:
        """Until every request has its completion."""
        while self.waiting:
            length = len(self.prompts[self.waiting[-1]])
            # the shortest stand first among those that wait, so equal lengths are neighbours
            alike = [i for i in self.waiting if len(self.prompts[i]) == length][-self.places :]
            self.waiting = [i for i in self.waiting if i not in set(alike)]
            self._begin(alike)
            self._forget(alike)
            self._generate(torch.tensor([list(self.prompts[i]) for i in alike], device=self.device))
            if self.done is not None:
                self.done(self.asked - len(self.waiting))

    def _forget(self, requests: Sequence[int]) -> None:
        """A model that keeps its state in its modules (RecurrentGemma) takes a prompt of one token for the last batch's
        next one; a forward without a cache ends that."""
        if len(self.prompts[requests[0]]) == 1:
            self.model(input_ids=torch.tensor([[self.pad_token_id] * 2], device=self.device), use_cache=False)

    def _generate(self, ids_BP: Tensor) -> None:
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            use_cache=self.use_cache,
            pad_token_id=self.pad_token_id,
        )
        model: Any = self.model
        # what the settings leave open, `generate` takes from the model's own: its end tokens, its penalties
        before, n = model.generation_config, len(self.prompts)
        model.generation_config = settings
        try:
            model.generate(
                input_ids=ids_BP,
                attention_mask=torch.ones_like(ids_BP),
                generation_config=settings,
                logits_processor=LogitsProcessorList([_Chosen(self._next)]),
                stopping_criteria=StoppingCriteriaList([_Ended(lambda: bool((self.request_B == n).all()))]),
            )
        finally:
            model.generation_config = before

    def _next(self, logits_BV: Tensor) -> Tensor:
        """Scores that leave each row no choice but the token that it drew."""
        self._choose(logits_BV, slice(None))
        return torch.full_like(logits_BV, float("-inf")).scatter_(1, self.newest_B[:, None], 0.0)


class RecomputingDecoder(LibraryDecoder):
    """The same without a cache: every step reads the whole row again."""

    words = "with a whole forward for every token"
    use_cache = False


class _Chosen(LogitsProcessor):
    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        self._choose = choose

    # torch's annotations type a tensor by its content, and transformers' differ from what they call it with
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._choose(scores)


class _Ended(StoppingCriteria):
    def __init__(self, ended: Callable[[], bool]) -> None:
        self._ended = ended

    def __call__(
        self, input_ids: torch.LongTensor, scores: tuple[torch.Tensor] | None, **kwargs: Any
    ) -> torch.BoolTensor:
        whole = torch.full((len(input_ids),), self._ended(), device=input_ids.device)
        return whole  # pyright: ignore[reportReturnType]: as above
