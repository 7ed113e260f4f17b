"""Log-probabilities of given tokens, without ever holding the [tokens, vocabulary] matrix.

The head is frozen, so d logp / d hidden = (W[target] - softmax(logits) @ W) / temperature can be computed in the
forward, chunk by chunk, while the chunk's probabilities are at hand; the backward is then one elementwise product.
Memory: one chunk of logits instead of three copies of all of them. Where single rows of the head train, what their
gradient needs is the chunk's probabilities of those tokens, and nothing else.

`response_logprobs` is the one place where the shift (position t predicts token t + 1) and the temperature are applied.

Legend of shape suffixes: N tokens, C tokens of a chunk, H hidden size, V vocabulary, B rows, T positions of prompt +
response, R positions of the longest response, K rows of the head that train.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import numpy
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from . import seams
from .sharded import in_full
from .token_rows import HeadRows, plain_table, weight_of
from .transfer import to_device

CHUNK_ELEMENTS = {"cpu": 6 << 20, "cuda": 64 << 20}
"""Logits of one chunk by device, 16 Mi elsewhere. On a CPU, passes over what stays in its caches cost a tenth less than
over larger ones; smaller chunks re-read the head's weight more often. On a GPU a chunk of a large vocabulary must still
be hundreds of tokens, or its products leave most of the card idle: a quarter of a GB in fp32, a few times."""


def chunk_rows(weight_VH: torch.Tensor) -> int:
    """Tokens whose logits are made at once with this head."""
    return max(32, CHUNK_ELEMENTS.get(weight_VH.device.type, 16 << 20) // weight_VH.shape[0])


@dataclass(frozen=True)
class LmHead:
    """What turns hidden states into logits: softcap(scale * (hidden @ weight.T + bias)).

    weight [V, H]; bias [V] or None; softcap: Gemma's c * tanh(x / c), None for none; scale: Cohere's `logit_scale`,
    Granite's 1 / `logits_scaling`. product: what makes hidden @ weight.T + bias, if not `F.linear`. own: what makes the
    logits [C, V] from hidden states [C, H] instead of all that, for a model whose head does more (`causal.head_of`).
    rows: those of the weight that train, of the adapter that was active when the head was made; the weight holds them.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    product: Callable[[torch.Tensor], torch.Tensor] | None = None
    own: Callable[[torch.Tensor], torch.Tensor] | None = None
    rows: HeadRows | None = None

    @classmethod
    def by(cls, own: Callable[[torch.Tensor], torch.Tensor], weight_VH: torch.Tensor) -> "LmHead":
        """A head that is a function; of `weight_VH` the dtype, the device and the vocabulary are read."""
        return cls(weight_VH, own=own)

    @classmethod
    def of(cls, lm_head: torch.nn.Module, config: Any) -> "LmHead":
        """The head of a Hugging Face causal model: its output embedding module and its config."""
        seams.require(seams.LOGIT_FIELDS)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        scale = float(getattr(text, "logit_scale", None) or 1.0)
        if divisor := getattr(text, "logits_scaling", None):
            scale /= float(divisor)
        found: tuple[Any, Any] = weight_of(lm_head)
        (weight, rows), bias = found, getattr(plain_table(lm_head), "bias", None)
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"lm_head.weight is {type(weight).__name__}, expected a tensor")
        return cls(in_full(weight), bias, getattr(text, "final_logit_softcapping", None), scale, rows=rows)

    def logits(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        """fp32 logits [C, V] of hidden states [C, H], before any temperature."""
        hidden_CH = hidden_CH.to(self.weight.dtype)
        if self.own is not None:
            return self.own(hidden_CH).float()
        return _shaped(self._products(hidden_CH).float(), _Spec(1.0, self.softcap, self.scale, False), False)[0]

    def bare_logits(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        """The same in the weights' precision, where that is what they are made in and nothing follows (else fp32)."""
        if self.own is not None or self.softcap is not None or self.scale != 1.0:
            return self.logits(hidden_CH)
        return self._products(hidden_CH.to(self.weight.dtype))

    def _products(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        return self.product(hidden_CH) if self.product else F.linear(hidden_CH, self.weight, self.bias)

    def token_logprobs(
        self,
        hidden_NH: torch.Tensor,
        targets_N: torch.Tensor,
        temperature: float = 1.0,
        chunk: int | None = None,
        *,
        differentiable_entropy: bool = False,
        return_top1: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """Log-probs and entropies of given tokens, and if asked whether each is the likeliest: `token_logprobs`."""
        return token_logprobs(
            hidden_NH,
            self.weight,
            targets_N,
            temperature,
            chunk,
            bias_V=self.bias,
            softcap=self.softcap,
            logit_scale=self.scale,
            differentiable_entropy=differentiable_entropy,
            return_top1=return_top1,  # pyright: ignore[reportArgumentType, reportCallIssue]: the overloads want a literal
            own=self.own,
            rows=self.rows,
        )


@overload
def token_logprobs(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float = ...,
    chunk: int | None = ...,
    *,
    bias_V: torch.Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    differentiable_entropy: bool = ...,
    return_top1: Literal[False] = ...,
    own: Callable[[torch.Tensor], torch.Tensor] | None = ...,
    rows: HeadRows | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def token_logprobs(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float = ...,
    chunk: int | None = ...,
    *,
    bias_V: torch.Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    differentiable_entropy: bool = ...,
    return_top1: Literal[True],
    own: Callable[[torch.Tensor], torch.Tensor] | None = ...,
    rows: HeadRows | None = ...,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


def token_logprobs(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
    *,
    bias_V: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    differentiable_entropy: bool = False,
    return_top1: bool = False,
    own: Callable[[torch.Tensor], torch.Tensor] | None = None,
    rows: HeadRows | None = None,
) -> tuple[torch.Tensor, ...]:
    """log softmax(logits / temperature)[target] for each token, and the entropy of each distribution, in nats.

    Args:
        hidden_NH: hidden states that predict the targets (already shifted), any float dtype.
        weight_VH: the head. Frozen: exact gradients reach `hidden_NH` and `rows` only. If it (or the bias) requires
            grad, and `rows` does not say which part of it, a plain checkpointed path gives gradients to both.
        targets_N: the token ids.
        temperature: divides the logits; > 0.
        chunk: tokens of one chunk; None: `chunk_rows`.
        bias_V, softcap, logit_scale: see `LmHead`.
        differentiable_entropy: let the entropy carry gradients (for an entropy bonus); it is detached otherwise.
        return_top1: also return whether the target is the most probable token (token accuracy).
        own: see `LmHead`; by autograd, each chunk recomputed in the backward.
        rows: see `LmHead`.

    Returns:
        (logps_N, entropy_N[, is_top1_N]): fp32, fp32, bool.

    Raises:
        ValueError: temperature <= 0, or lengths that differ.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, expected > 0: log-probs of greedy decoding are not defined")
    if hidden_NH.shape[0] != targets_N.shape[0]:
        raise ValueError(f"{hidden_NH.shape[0]} hidden states for {targets_N.shape[0]} targets, expected as many")
    spec = _Spec(float(temperature), softcap, float(logit_scale), return_top1, own)
    chunk = chunk or chunk_rows(weight_VH)
    grads = torch.is_grad_enabled()
    head_trains = (weight_VH.requires_grad and rows is None) or (bias_V is not None and bias_V.requires_grad)
    if own is not None or (grads and (head_trains or (differentiable_entropy and hidden_NH.requires_grad))):
        logps_N, entropy_N, top1_N = _plain(hidden_NH, weight_VH, bias_V, targets_N, chunk=chunk, spec=spec)
        entropy_N = entropy_N if differentiable_entropy else entropy_N.detach()
    else:
        keep = grads and (hidden_NH.requires_grad or rows is not None)
        index_K, rows_KH = (None, None) if rows is None or not grads else (rows.index_K, rows.rows_KH)
        logps_N, entropy_N, top1_N = _TokenLogprobs.apply(
            hidden_NH, weight_VH.detach(), bias_V, targets_N, index_K, rows_KH, chunk, spec, keep
        )
    return (logps_N, entropy_N, top1_N) if return_top1 else (logps_N, entropy_N)


class ResponseLogprobs(NamedTuple):
    """Per response token; zeros outside the response."""

    logps_BR: torch.Tensor
    entropy_BR: torch.Tensor


def response_logprobs(
    hidden_BTH: torch.Tensor,
    input_ids_BT: torch.Tensor,
    start_B: torch.Tensor,
    length_B: torch.Tensor,
    head: LmHead,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    differentiable_entropy: bool = False,
    tokens: "ResponseTokens | None" = None,
) -> ResponseLogprobs:
    """Log-probs of the response tokens of prompt + response rows: the one place of shift and temperature.

    Only response positions go through the head.

    Args:
        hidden_BTH: the backbone's last hidden states.
        input_ids_BT: the same rows' ids.
        start_B: where each response starts in its row (>= 1: something must predict its first token).
        length_B: its number of tokens, EOS included.
        head: the frozen output head.
        temperature: the one that the rollout sampled with (P1: for policy, old and reference alike).
        tokens: where the response tokens stand, where that is known; None: `start_B` and `length_B` are read, for which
            a GPU's queue must be done.

    Returns:
        fp32 log-probs and entropies [B, R], R = length_B.max().
    """
    if tokens is None:
        tokens = ResponseTokens.of(start_B.cpu().numpy(), length_B.cpu().numpy(), input_ids_BT.shape, start_B.device)
    logps_N, entropy_N = head.token_logprobs(
        hidden_BTH.flatten(0, 1)[tokens.before_N],
        input_ids_BT.flatten()[tokens.token_N],
        temperature,
        chunk,
        differentiable_entropy=differentiable_entropy,
    )
    zeros = torch.zeros(tokens.shape, dtype=torch.float32, device=hidden_BTH.device).flatten()
    logps_BR, entropy_BR = (zeros.index_copy(0, tokens.place_N, x_N).view(tokens.shape) for x_N in (logps_N, entropy_N))
    return ResponseLogprobs(logps_BR, entropy_BR)


@dataclass(frozen=True)
class ResponseTokens:
    """Where the response tokens of rows [B, T] stand, row by row.

    token_N: of each token, its place among the B * T; before_N: of the one whose state predicts it. place_N: its place
    in `shape` = (B, R).
    """

    token_N: torch.Tensor
    before_N: torch.Tensor
    place_N: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def of(
        cls,
        start_B: NDArray[numpy.int64],
        length_B: NDArray[numpy.int64],
        rows: Sequence[int],
        device: torch.device,
    ) -> "ResponseTokens":
        """Worked out in the processor's memory, so that no device is asked.

        Args:
            rows: (B, T).
            device: where they are needed.

        Raises:
            ValueError: a response begins its row.
        """
        _check_starts(int(start_B.min()))
        (b, t), longest = rows, int(length_B.max())
        row_N, step_N = numpy.nonzero(numpy.arange(longest) < length_B[:, None])
        token_N = row_N * t + start_B[row_N] + step_N
        flat = to_device(numpy.concatenate([token_N, token_N - 1, row_N * longest + step_N]), device)
        return cls(*flat.split(len(token_N)), shape=(b, longest))


def response_positions(
    start_B: torch.Tensor, length_B: torch.Tensor, longest: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where response tokens stand in their rows: (index_BR, mask_BR). Outside the mask the index points at `start`.

    Args:
        longest: R, where it is known; None: it is asked for, and whether each response has something before it.
    """
    if longest is None:
        _check_starts(int(start_B.min()))
        longest = int(length_B.max())
    step_R = torch.arange(longest, device=start_B.device)
    mask_BR = step_R < length_B[:, None]
    return torch.where(mask_BR, start_B[:, None] + step_R, start_B[:, None]), mask_BR


def states_before_response(
    hidden_BTH: torch.Tensor, start_B: torch.Tensor, length_B: torch.Tensor, longest: int | None = None
) -> torch.Tensor:
    """The hidden states [B, R, H] from which each response token was chosen: what a value head reads (V(s_t)).

    After a response's end stand other states of its row, each once: one that stood there many times would be one index
    of many gradients, which a GPU adds up one after the other.
    """
    if longest is None:
        longest = int(length_B.max())
    step_R = torch.arange(longest, device=start_B.device)
    rows_B1 = torch.arange(hidden_BTH.shape[0], device=hidden_BTH.device)[:, None]
    return hidden_BTH[rows_B1, (start_B[:, None] - 1 + step_R) % hidden_BTH.shape[1]]


def _check_starts(first: int) -> None:
    if first < 1:
        raise ValueError(f"a response starts at position {first}, expected >= 1: nothing predicts it")


class _Spec(NamedTuple):
    temperature: float
    softcap: float | None
    scale: float
    top1: bool
    own: Callable[[torch.Tensor], torch.Tensor] | None = None


class _TokenLogprobs(torch.autograd.Function):
    """Forward in chunks; d logp / d hidden is made in the forward, so that no probabilities outlive their chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        index_K: torch.Tensor | None,
        rows_KH: torch.Tensor | None,
        chunk: int,
        spec: _Spec,
        keep_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n, device = hidden_NH.shape[0], hidden_NH.device
        logps_N = torch.empty(n, dtype=torch.float32, device=device)
        entropy_N = torch.empty_like(logps_N)
        top1_N = torch.zeros(n, dtype=torch.bool, device=device)
        gradient_NH = torch.empty_like(hidden_NH) if keep_gradient else None
        slope_NK = None if index_K is None else hidden_NH.new_zeros((n, len(index_K)), dtype=torch.float32)
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            target_C1 = targets_N[rows, None]
            logits_CV, slope_CV = _logits(hidden_NH[rows], weight_VH, bias_V, spec, keep_gradient)
            top_C1, best_C1 = logits_CV.max(-1, keepdim=True) if spec.top1 else (logits_CV.amax(-1, keepdim=True), None)
            logits_CV.sub_(top_C1)
            probs_CV = logits_CV.exp()
            total_C1 = probs_CV.sum(-1, keepdim=True)
            probs_CV.div_(total_C1)
            log_total_C = total_C1.log().squeeze(-1)
            logps_N[rows] = logits_CV.gather(1, target_C1).squeeze(1) - log_total_C
            entropy_N[rows] = log_total_C - torch.linalg.vecdot(probs_CV, logits_CV)
            if best_C1 is not None:
                top1_N[rows] = (best_C1 == target_C1).squeeze(1)
            if gradient_NH is not None:
                # d logp / d logits = onehot - probs, in fp32 before the cast: exact where a probability is close to 1
                probs_CV.neg_().scatter_add_(1, target_C1, torch.ones_like(target_C1, dtype=torch.float32))
                probs_CV = probs_CV if slope_CV is None else probs_CV.mul_(slope_CV)
                factor = spec.scale / spec.temperature
                probs_CV = probs_CV.mul_(factor) if factor != 1 else probs_CV
                gradient_NH[rows] = probs_CV.to(weight_VH.dtype) @ weight_VH
                if slope_NK is not None:
                    slope_NK[rows] = probs_CV[:, index_K]
        if gradient_NH is not None:
            ctx.save_for_backward(gradient_NH, slope_NK, None if slope_NK is None else hidden_NH)
        ctx.rows_dtype = None if rows_KH is None else rows_KH.dtype
        ctx.mark_non_differentiable(entropy_N, top1_N)
        return logps_N, entropy_N, top1_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: autograd's own takes any arguments
        ctx: Any, *grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        gradient_NH, slope_NK, hidden_NH = ctx.saved_tensors
        grad_logps_N = grads[0]
        assert grad_logps_N is not None
        grad_rows_KH = None
        if slope_NK is not None:
            grad_rows_KH = ((grad_logps_N[:, None] * slope_NK).t() @ hidden_NH.float()).to(ctx.rows_dtype)
        # fp32 product, one rounding: a bf16 scale would add a second one
        grad_NH = (grad_logps_N[:, None] * gradient_NH).to(gradient_NH.dtype)
        return grad_NH, None, None, None, None, grad_rows_KH, None, None, None


def _logits(
    hidden_CH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, spec: _Spec, want_slope: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """fp32 logits / temperature of one chunk (in place, they are its own), and the soft cap's slope or None."""
    if spec.own is not None and not len(hidden_CH):
        return hidden_CH.sum() * hidden_CH.new_zeros(0, len(weight_VH)).float(), None
    if spec.own is not None:
        return spec.own(hidden_CH.to(weight_VH.dtype)).float() / spec.temperature, None
    return _shaped(F.linear(hidden_CH.to(weight_VH.dtype), weight_VH, bias_V).float(), spec, want_slope)


def _shaped(logits_CV: torch.Tensor, spec: _Spec, want_slope: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    if spec.scale != 1:
        logits_CV = logits_CV * spec.scale
    slope_CV = None
    if spec.softcap:
        tanh_CV = torch.tanh(logits_CV / spec.softcap)
        logits_CV = tanh_CV * spec.softcap
        slope_CV = 1 - tanh_CV * tanh_CV if want_slope else None
    return (logits_CV if spec.temperature == 1 else logits_CV.div_(spec.temperature)), slope_CV


def _plain(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    *,
    chunk: int,
    spec: _Spec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same numbers by autograd, each chunk recomputed in the backward: for a head or an entropy that trains."""

    def one(hidden_CH: torch.Tensor, targets_C: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        logits_CV, _ = _logits(hidden_CH, weight, bias, spec, False)
        logps_CV = logits_CV.log_softmax(-1)
        entropy_C = -(logps_CV.exp() * logps_CV).sum(-1)
        return logps_CV.gather(1, targets_C[:, None]).squeeze(1), entropy_C, logps_CV.argmax(-1) == targets_C

    parts = [
        checkpoint(one, hidden, targets, weight_VH, bias_V, use_reentrant=False)
        for hidden, targets in zip(hidden_NH.split(chunk), targets_N.split(chunk), strict=True)
    ]
    logps, entropy, top1 = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropy), torch.cat(top1)
