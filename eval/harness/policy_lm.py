"""A policy of the run as lm-eval asks it: log-likelihoods by the packed forward, replies by our sampler.

lm-eval's own class would load a model for each policy, and runs it padded. Its rules are kept: what is a token of the
context and what of the continuation, cuts on the left, windows of a long text, and where a reply stops.

Legend of shape suffixes: B rows, L padded positions, N scored tokens, H hidden.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ...data.encode import IGNORED
from ...data.template import rendered
from ...errors import UserError
from ...models.batching import forward_tokens, right_pad
from ...models.context import context_length
from ...models.generate import sample
from ...models.tokens import end_token_ids
from ..shared import shared_rows
from ..workbench import Workbench
from .tasks import PLACE

_UNBOUNDED = 2048
"""Tokens of context where the base names no limit: as lm-eval has it."""
_MAX_NEW_TOKENS = 256

Request = tuple[Any, list[int], list[int]]
"""(whatever the caller tells requests apart by, the context's tokens, the continuation's)."""


class PolicyLM(TemplateLM):
    """One policy.

    Attributes:
        cut: requests so far whose context was cut on the left to fit the base's.
    """

    def __init__(self, bench: Workbench, policy: str) -> None:
        super().__init__()
        self.bench, self.policy, self.tokenizer = bench, policy, bench.tokenizer
        self.max_length = context_length(bench.spec.base) or _UNBOUNDED
        self.cut = 0

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.bench.spec.base.spec

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """With the special tokens that the tokenizer adds of itself, unless the text begins with its BOS already."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        options = {"continue_final_message": not add_generation_prompt}
        return rendered(self.tokenizer, chat_history, PLACE, add_generation_prompt=add_generation_prompt, **options)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        windows: list[Request] = []
        owners: list[int] = []
        for place, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            parts = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            found = [(place, *make_disjoint_window(part)) for part in parts]
            windows += found
            owners += [place] * len(found)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for place, (logprob, _) in zip(owners, scores, strict=True):
            totals[place] += logprob
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        rows: list[list[int]] = []
        for _, context, continuation in requests:
            if not continuation or len(continuation) > self.max_length:
                said = f"an answer of {len(continuation)} tokens, expected 1 to {self.max_length}"
                raise UserError(PLACE, said, "leave the task out, or correct it")
            whole = [*context, *continuation]
            self.cut += len(whole) > self.max_length + 1
            rows.append(whole[-(self.max_length + 1) :])
        counts = [len(continuation) for _, _, continuation in requests]
        batches = list(neighbours(rows, forward_tokens(self.bench.adapters.backbone)))

        def score(places: Sequence[int], done: Callable[[int], None]) -> list[tuple[float, bool]]:
            wanted = set(places)
            found: dict[int, tuple[float, bool]] = {}
            for batch in batches:
                if wanted.issuperset(batch):
                    found |= self._scores(batch, rows, counts)
                    done(len(found))
            return [found[place] for place in places]

        return shared_rows(f"eval {self.policy}: benchmarks, log-likelihoods", len(rows), score, batches)

    @torch.no_grad()
    def _scores(
        self, batch: Sequence[int], rows: Sequence[list[int]], counts: Sequence[int]
    ) -> dict[int, tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding would say it) of each row's last tokens."""
        adapters, pad = self.bench.adapters, self.tokenizer.pad_token_id
        device = next(adapters.model.parameters()).device
        # the last token predicts nothing that is asked for; at the base's last position it would not even fit
        ids_BL, mask_BL = right_pad([rows[i][:-1] for i in batch], pad, device)
        targets = [[IGNORED] * (len(rows[i]) - 1 - counts[i]) + rows[i][len(rows[i]) - counts[i] :] for i in batch]
        targets_BL, _ = right_pad(targets, IGNORED, device)
        asked_BL = targets_BL != IGNORED
        role = self.bench.roles[self.policy]
        hidden_NH, head = adapters.hidden(role, ids_BL, mask_BL)[asked_BL], adapters.head_under(role)
        logps_N, _, top_N = head.token_logprobs(hidden_NH, targets_BL[asked_BL], return_top1=True)
        sizes = [counts[i] for i in batch]
        parts = zip(batch, logps_N.double().split(sizes), top_N.split(sizes), strict=True)
        return {i: (float(logps.sum()), bool(top.bool().all())) for i, logps, top in parts}

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(place)
        said: dict[int, str] = {}
        for places in groups.values():
            texts = self._replies([requests[place].args[0] for place in places], requests[places[0]].args[1])
            said |= dict(zip(places, texts, strict=True))
        return [said[place] for place in range(len(requests))]

    def _replies(self, contexts: Sequence[str], asked: dict[str, Any]) -> list[str]:
        spec, end = self.bench.spec, self.tokenizer.decode([self.eot_token_id])
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(asked, _MAX_NEW_TOKENS))
        until = handle_stop_sequences(wanted["until"], eos=end)
        longest = wanted["max_gen_toks"]
        room = self.max_length - longest
        if room <= 0:
            said = f"a reply of {longest} tokens leaves no room for a prompt in the base's {self.max_length}"
            raise UserError(PLACE, said, "leave the task out, or correct its max_gen_toks")
        prompts = [self.tok_encode(context) for context in contexts]
        self.cut += sum(len(prompt) > room for prompt in prompts)
        prompts = [prompt[-room:] for prompt in prompts]
        ends = end_token_ids(self.tokenizer, self.bench.adapters.model)

        def draw(places: Sequence[int], done: Callable[[int], None]) -> list[str]:
            drawn = sample(
                self.bench.adapters,
                self.bench.roles[self.policy],
                [prompts[place] for place in places],
                max_new_tokens=longest,
                eos_token_id=ends,
                pad_token_id=self.tokenizer.pad_token_id,
                seed=spec.seed,
                temperature=float(wanted.get("temperature") or 0.0),
                top_k=int(wanted.get("top_k") or 0),
                top_p=float(wanted.get("top_p") or 1.0),
                batch_size=spec.batch_size,
                first=places[0],
                recompute=True,
                on_batch=done,
            )
            texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in drawn.tokens]
            return [postprocess_generated_text(text, until, None) for text in texts]

        return shared_rows(f"eval {self.policy}: benchmarks, replies", len(prompts), draw)


def neighbours(rows: Sequence[Sequence[int]], most: int) -> Iterable[list[int]]:
    """Rows that begin alike in one batch, whose padded size stays within `most`: the packed forward runs what they
    share once. A longer row goes alone."""
    batch: list[int] = []
    width = 0
    for place in sorted(range(len(rows)), key=lambda i: list(rows[i])):
        width = max(width, len(rows[place]))
        if batch and (len(batch) + 1) * width > most:
            yield batch
            batch, width = [], len(rows[place])
        batch.append(place)
    if batch:
        yield batch
