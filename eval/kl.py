"""KL of a policy to its reference, Rao-Blackwellised over the vocabulary (checklist E4).

For a response y drawn from the policy pi, the sum over its steps of the full KL(pi(.|y_<t) || ref(.|y_<t)) has the same
mean as log pi(y) - log ref(y) and a smaller variance, and is never negative (Amini et al., arXiv 2504.10637, eq. 12).

Shape suffixes: B rows, L positions, H hidden, N response tokens, C a chunk of them, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.adapters import AdapterSet
from ..models.batching import forward_tokens, right_pad, token_batches
from ..models.logprobs import LmHead, chunk_rows, response_positions, states_before_response
from .statistics.intervals import mean_se, ratio_se


@dataclass(frozen=True)
class KL:
    """KL(policy || reference) in nats.

    Attributes:
        per_sequence, per_sequence_se: mean over responses, and its standard error.
        per_token, per_token_se: all nats over all tokens, and its standard error with responses as units.
        n: responses.
        tokens: response tokens, EOS included.
        temperature: of both distributions; the one at which the responses were drawn.
    """

    per_sequence: float
    per_sequence_se: float
    per_token: float
    per_token_se: float
    n: int
    tokens: int
    temperature: float


def kl_from_logits(policy_CV: Tensor, reference_CV: Tensor, temperature: float) -> Tensor:
    """KL(softmax(policy / T) || softmax(reference / T)) of each row [C] in nats, fp32; exactly 0 for equal logits."""
    logp_CV = torch.log_softmax(policy_CV.float() / temperature, dim=-1)
    logq_CV = torch.log_softmax(reference_CV.float() / temperature, dim=-1)
    return (logp_CV.exp() * (logp_CV - logq_CV)).sum(-1)


def response_hidden(
    adapters: AdapterSet, role: str | None, ids_BL: Tensor, mask_BL: Tensor, *, start_B: Tensor, length_B: Tensor
) -> Tensor:
    """Last hidden states [N, H] from which the response tokens were chosen, row by row."""
    hidden_BLH = adapters.hidden(role, ids_BL, mask_BL)
    _, counts_BR = response_positions(start_B, length_B)
    return states_before_response(hidden_BLH, start_B, length_B)[counts_BR]


@torch.no_grad()
def sequence_kls(
    adapters: AdapterSet,
    policy: str | None,
    reference: str | None,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    temperature: float,
    pad_token_id: int,
    max_tokens: int | None = None,
    chunk: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[float]:
    """Summed per-step KL of each response, in nats, in the order of the responses.

    Args:
        policy, reference: adapter names; None is the base.
        prompts, responses: token ids; the responses were drawn from the policy at `temperature`.
        max_tokens: padded tokens in one forward; None: as many as memory has room for (`forward_tokens`).
        chunk: response tokens projected to the vocabulary at once; None fits the vocabulary's size.
        on_batch: called with the number of responses done so far.

    Raises:
        ValueError: a temperature of 0, at which a distribution has no KL.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0: greedy decoding has no KL")
    kls = [0.0] * len(responses)
    done = 0
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    device = next(adapters.model.parameters()).device
    heads = adapters.head_under(policy), adapters.head_under(reference)
    for rows in token_batches(lengths, max_tokens or forward_tokens(adapters.backbone)):
        ids_BL, mask_BL = right_pad([[*prompts[i], *responses[i]] for i in rows], pad_token_id, device)
        start_B = torch.tensor([len(prompts[i]) for i in rows], device=device)
        length_B = torch.tensor([len(responses[i]) for i in rows], device=device)
        policy_NH = response_hidden(adapters, policy, ids_BL, mask_BL, start_B=start_B, length_B=length_B)
        reference_NH = response_hidden(adapters, reference, ids_BL, mask_BL, start_B=start_B, length_B=length_B)
        steps_N = _chunked_kl(heads, policy_NH, reference_NH, temperature, chunk)
        for i, steps in zip(rows, steps_N.split([len(responses[i]) for i in rows]), strict=True):
            kls[i] = float(steps.double().sum())
        done += len(rows)
        if on_batch is not None:
            on_batch(done)
    return kls


def _chunked_kl(
    heads: tuple[LmHead, LmHead], policy_NH: Tensor, reference_NH: Tensor, temperature: float, chunk: int | None
) -> Tensor:
    """KL of each step [N], with logits [C, V] for one chunk of steps at a time.

    Args:
        heads: the policy's and the reference's.
    """
    size = chunk or chunk_rows(heads[0].weight)
    pieces = [
        kl_from_logits(heads[0].logits(ours_CH), heads[1].logits(theirs_CH), temperature)
        for ours_CH, theirs_CH in zip(policy_NH.split(size), reference_NH.split(size), strict=True)
    ]
    return torch.cat(pieces) if pieces else policy_NH.new_zeros(0)


def summarise(kls: Sequence[float], lengths: Sequence[int], temperature: float) -> KL:
    """Means and standard errors over responses, from their KLs in nats and their lengths in tokens."""
    per_sequence, per_sequence_se = mean_se(kls)
    per_token, per_token_se = ratio_se(kls, lengths)
    if len(kls) and not math.isfinite(per_sequence):
        raise ValueError(f"the KL is {per_sequence}, expected a finite number; a logit is inf or nan")
    return KL(per_sequence, per_sequence_se, per_token, per_token_se, len(kls), sum(lengths), temperature)
