"""Fresh samples of the policies: do they end, how far are they from their start, does merging change them?"""

import math
from collections.abc import Iterator

import torch

from ...models.batching import right_pad
from ...models.generate import merged
from ...models.logprobs import chunk_rows
from ...progress import meter
from ..kl import kl_from_logits, response_hidden, sequence_kls, summarise
from ..samples import Sample
from ..statistics.intervals import mean_se
from ..workbench import Workbench
from .finding import Finding
from .log_checks import score_gain
from .policy_checks import EOS_JUDGED_FROM, check_drift, check_eos, check_learned, check_merged
from .records import Record, series

MERGED_REPLIES = 8
"""Replies on which adapter and merged weights are compared: some hundred tokens, and each has a whole vocabulary."""


def policy_findings(
    bench: Workbench, record: Record, replies: list[Sample], expected: float | None, left_out: list[str]
) -> Iterator[Finding]:
    """What a policy's replies tell.

    Args:
        bench: with the policy and what it starts from.
        replies: drawn from the policy.
        expected: share of the demonstrations' replies that end within the budget; None: none are at hand.
    """
    name, spec = record.name, bench.spec
    finished = sum(reply.finished for reply in replies)
    if expected is not None and expected < EOS_JUDGED_FROM:
        left_out.append(
            f"{name}, eos rate: {finished} of {len(replies)} replies end, but only {expected:.2g} of the "
            f"demonstrations do within {spec.max_new_tokens} tokens (raise eval.max_new_tokens)"
        )
    else:
        yield check_eos(name, finished, len(replies), expected=expected, budget=spec.max_new_tokens)
    yield from _drift(bench, record, replies, left_out)
    low = bench.adapters.model.dtype != torch.float32
    yield check_merged(name, merge_gap(bench, name, replies[:MERGED_REPLIES]), low_precision=low)


def _drift(bench: Workbench, record: Record, replies: list[Sample], left_out: list[str]) -> Iterator[Finding]:
    """KL to what the policy started from: not too far, and not nothing; an SFT stage is meant to leave its start."""
    if record.job.record.rows == "demo":
        return
    start = "base" if record.job.parent is None else record.job.parent.name
    if start not in bench.roles or bench.spec.temperature == 0:
        why = "greedy replies have no KL" if start in bench.roles else f"{start} cannot be loaded"
        left_out.append(f"{record.name}, kl to reference, learned: {why}")
        return
    with meter(f"doctor {record.name}: KL to {start}", len(replies)) as done:
        kls = sequence_kls(
            bench.adapters,
            bench.roles[record.name],
            bench.roles[start],
            [reply.prompt.ids for reply in replies],
            [reply.tokens for reply in replies],
            temperature=bench.spec.temperature,
            pad_token_id=bench.tokenizer.pad_token_id,
            on_batch=done,
        )
    kl = summarise(kls, [len(reply.tokens) for reply in replies], bench.spec.temperature)
    yield check_drift(record.name, kl.per_token, kl.per_token_se, reference=start, n=len(replies))
    gain = score_gain(*series(record.log, "objective/scores")) if record.job.record.on_policy is not None else None
    rate = float(record.setting("learning_rate", math.nan))
    yield check_learned(record.name, kl.per_token, kl.per_token_se, reference=start, gain=gain, rate=rate)


@torch.no_grad()
def merge_gap(bench: Workbench, policy: str, replies: list[Sample]) -> float:
    """Mean KL in nats per token between a policy with its adapter beside the base and merged into it."""
    adapters, role = bench.adapters, bench.roles[policy]
    device = next(adapters.model.parameters()).device
    rows = [[*reply.prompt.ids, *reply.tokens] for reply in replies]
    ids_BL, mask_BL = right_pad(rows, bench.tokenizer.pad_token_id, device)
    start_B = torch.tensor([len(reply.prompt.ids) for reply in replies], device=device)
    length_B = torch.tensor([len(reply.tokens) for reply in replies], device=device)
    beside_NH = response_hidden(adapters, role, ids_BL, mask_BL, start_B=start_B, length_B=length_B)
    with merged(adapters, role):
        within_NH = response_hidden(adapters, None, ids_BL, mask_BL, start_B=start_B, length_B=length_B)
    head = adapters.head_under(role)
    size = chunk_rows(head.weight)
    pieces = zip(beside_NH.split(size), within_NH.split(size), strict=True)
    return mean_se(torch.cat([kl_from_logits(head.logits(a), head.logits(b), 1.0) for a, b in pieces]).tolist())[0]
