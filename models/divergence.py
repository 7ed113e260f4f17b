"""How far a student's distributions are from a teacher's, without ever holding a [tokens, vocabulary] matrix of either.

Both heads are frozen, so each chunk's divergence is differentiated by the student's hidden states while its logits are
at hand, as in `logprobs.py`; the backward is then one elementwise product. Where rows of the student's head train, each
chunk is made again in the backward instead.

Legend of shape suffixes: N tokens, C tokens of a chunk, H hidden size (each model's own), V vocabulary.
"""

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .logprobs import LmHead, chunk_rows


class Divergences(NamedTuple):
    """Of each token, fp32 [N], in nats; gradients reach the student's hidden states through `divergence_N` alone.

    divergence_N: of the two distributions that predict it. logps_N: the token's log-prob under the student's, and
    entropy_N that distribution's entropy.
    """

    divergence_N: torch.Tensor
    logps_N: torch.Tensor
    entropy_N: torch.Tensor


def generalised_jsd(student_CV: torch.Tensor, teacher_CV: torch.Tensor, beta: float) -> torch.Tensor:
    """The divergence of two distributions [C], in nats (Agarwal et al. 2024, arXiv 2306.13649, eq. 1).

    With m = (1 - beta) student + beta teacher it is beta KL(teacher || m) + (1 - beta) KL(student || m). At the ends,
    where that is 0 whatever the two are, it is by convention, which is TRL's too, what it tends to when it is divided
    by beta or by 1 - beta: KL(teacher || student) at 0, KL(student || teacher) at 1.

    Args:
        student_CV, teacher_CV: log-probabilities.
        beta: from 0 to 1.
    """
    if beta == 0:
        return _kl(teacher_CV, student_CV)
    if beta == 1:
        return _kl(student_CV, teacher_CV)
    mixture_CV = torch.logaddexp(student_CV + math.log1p(-beta), teacher_CV + math.log(beta))
    return beta * _kl(teacher_CV, mixture_CV) + (1 - beta) * _kl(student_CV, mixture_CV)


def divergences(
    student_NH: torch.Tensor,
    teacher_NH: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    student: LmHead,
    teacher: LmHead,
    beta: float,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Divergences:
    """`generalised_jsd` of softmax(logits / temperature) of both models, at each token.

    Args:
        student_NH, teacher_NH: hidden states that predict the tokens (already shifted), each model's own.
        targets_N: their ids.
        student, teacher: the heads, over one vocabulary, both frozen but for the student's `rows`.
        temperature: divides the logits of both; > 0.
        chunk: tokens of one chunk; None: half of `chunk_rows`, as there are two matrices.

    Raises:
        ValueError: other vocabularies, or lengths that differ.
    """
    ours, theirs = student.weight.shape[0], teacher.weight.shape[0]
    if ours != theirs:
        raise ValueError(f"the student's head has {ours} tokens and the teacher's {theirs}, expected as many")
    if not len(student_NH) == len(teacher_NH) == len(targets_N):
        sizes = f"{len(student_NH)}, {len(teacher_NH)} and {len(targets_N)}"
        raise ValueError(f"{sizes} states of the student, of the teacher and targets, expected as many")
    keep = torch.is_grad_enabled() and student_NH.requires_grad
    spec = _Spec(student, teacher, beta, temperature, chunk or max(32, chunk_rows(student.weight) // 2))
    if torch.is_grad_enabled() and student.weight.requires_grad:
        return _plain(student_NH, teacher_NH, targets_N, spec)
    return Divergences(*_Divergence.apply(student_NH, teacher_NH, targets_N, spec, keep))


def _kl(of_CV: torch.Tensor, to_CV: torch.Tensor) -> torch.Tensor:
    """KL(of || to) [C] of log-probabilities."""
    return (of_CV.exp() * (of_CV - to_CV)).sum(-1)


class _Spec(NamedTuple):
    student: LmHead
    teacher: LmHead
    beta: float
    temperature: float
    chunk: int


def _plain(student_NH: torch.Tensor, teacher_NH: torch.Tensor, targets_N: torch.Tensor, spec: _Spec) -> Divergences:
    """The same numbers by autograd, for a student's head that trains."""

    def one(
        student_CH: torch.Tensor, teacher_CH: torch.Tensor, targets_C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            teacher_CV = (spec.teacher.logits(teacher_CH) / spec.temperature).log_softmax(-1)
        student_CV = (spec.student.logits(student_CH) / spec.temperature).log_softmax(-1)
        divergence_C = generalised_jsd(student_CV, teacher_CV, spec.beta)
        student_CV = student_CV.detach()
        entropy_C = -(student_CV.exp() * student_CV).sum(-1)
        return divergence_C, student_CV.gather(-1, targets_C[:, None])[:, 0], entropy_C

    chunks = zip(*(each.split(spec.chunk) for each in (student_NH, teacher_NH, targets_N)), strict=True)
    parts = [checkpoint(one, *chunk, use_reentrant=False) for chunk in chunks]
    return Divergences(*map(torch.cat, zip(*parts, strict=True)))


class _Divergence(torch.autograd.Function):
    """Forward in chunks, each differentiated at once: no logits outlive their chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        student_NH: torch.Tensor,
        teacher_NH: torch.Tensor,
        targets_N: torch.Tensor,
        spec: _Spec,
        keep_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n, device = len(student_NH), student_NH.device
        found = [torch.empty(n, dtype=torch.float32, device=device) for _ in range(3)]
        gradient_NH = torch.empty_like(student_NH) if keep_gradient else None
        for start in range(0, n, spec.chunk):
            rows = slice(start, start + spec.chunk)
            teacher_CV = (spec.teacher.logits(teacher_NH[rows]) / spec.temperature).log_softmax(-1)
            with torch.set_grad_enabled(keep_gradient):
                state_CH = student_NH[rows].detach().requires_grad_(keep_gradient)
                student_CV = (spec.student.logits(state_CH) / spec.temperature).log_softmax(-1)
                divergence_C = generalised_jsd(student_CV, teacher_CV, spec.beta)
            if gradient_NH is not None:
                (gradient_NH[rows],) = torch.autograd.grad(divergence_C, state_CH, torch.ones_like(divergence_C))
            student_CV = student_CV.detach()
            found[0][rows] = divergence_C.detach()
            found[1][rows] = student_CV.gather(-1, targets_N[rows, None])[:, 0]
            found[2][rows] = -(student_CV.exp() * student_CV).sum(-1)
        ctx.save_for_backward(*(() if gradient_NH is None else (gradient_NH,)))
        ctx.mark_non_differentiable(*found[1:])
        return found[0], found[1], found[2]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: autograd's own takes any arguments
        ctx: Any, *grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        (gradient_NH,) = ctx.saved_tensors
        grad_N = grads[0]
        assert grad_N is not None
        # fp32 product, one rounding, as in `logprobs.py`
        return ((grad_N[:, None] * gradient_NH).to(gradient_NH.dtype), *([None] * 4))
