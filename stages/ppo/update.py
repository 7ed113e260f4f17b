"""One optimiser step of an on-policy method: gradients over micro-batches and processes, the brakes, what is logged.

No DistributedDataParallel: only the adapters train, so one all-reduce of their few gradients, once a step, is both the
simplest and the exact thing. Every loss is a sum over tokens divided by the global token count, so the gradient does
not depend on micro-batches or on the number of processes. The loss itself belongs to the method (`method.py`).
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ...errors import UserError
from .config import OnPolicyConfig
from .method import Method, Step
from .rollout import Reduce, Rollout, micro_batches

FULL_TOLERANCE = 1e-4
"""Mean |difference| per token, nats, that two fp32 forwards of other shapes may show."""
LOW_TOLERANCE = 0.05
"""The same in bf16."""


SAMPLER_FULL, SAMPLER_LOW = 2e-3, 0.15
"""Nats per token that may lie between sampler and trainer, in the mean and as a KL. fp32: runs that are right are below
1e-4. 16 bits: the merged weights are rounded (measured on SmolLM2-135M with a strong random adapter: 0.05 in the mean,
0.003 as a KL; single tokens up to 0.7)."""


@dataclass(frozen=True)
class StepReport:
    """What one minibatch was, and what was done with it.

    sums: over its valid tokens, all processes, in the order of `names`, in the processor's memory.
    norms: of the gradients before clipping, by their names in the log (policy, value).
    largest: of the method's names for it, over all processes; one that no row had is left out.
    """

    names: tuple[str, ...]
    sums: torch.Tensor
    tokens: float
    norms: dict[str, float]
    largest: dict[str, float] = field(default_factory=dict)
    stop: bool = False
    skip: bool = False

    @property
    def finite(self) -> bool:
        """Whether every gradient is."""
        return sum(self.norms.values()) < float("inf")

    def mean(self, name: str) -> float:
        """Mean of a statistic over the minibatch's valid tokens, all processes."""
        return float(self.sums[self.names.index(name)]) / self.tokens


class Updater:
    """Step 6 of an iteration, one minibatch at a time."""

    def __init__(self, config: OnPolicyConfig, method: Method, reduce: Reduce) -> None:
        self.config, self.method, self.reduce = config, method, reduce
        self.largest: tuple[str, ...] = getattr(method, "largest", ())

    def gradients(self, rollout: Rollout, rows: torch.Tensor, kl_coef: float, *, measures: bool = False) -> StepReport:
        """Fill the gradients of the minibatch `rows` of this process, reduced over processes and clipped; where it
        `measures`, the rollout's log-probs and entropies under the old policy as well.

        `stop`: the new policy has left the old one by more than 1.5 x target_approx_kl per token. `skip`: the mean
        ratio is above max_ratio, or a gradient is not finite. Both are decided on global numbers, so processes agree.
        """
        config, method = self.config, self.method
        for parameter in method.trainables.values():
            parameter.grad = None
        step = Step.of(rollout, rows, self.reduce, measures=measures)
        tokens = step.tokens
        named, extreme = len(method.statistics), len(self.largest)
        sums = torch.zeros(named, dtype=torch.float64, device=rollout.scores_B.device)
        largest = torch.full_like(sums[:1], -torch.inf).expand(extreme)
        size, group = config.per_device_train_batch_size, method.samples_per_prompt
        for part in micro_batches(rollout.episodes, rows, size, group):
            own = rollout.rows(part)
            found = method.backward(own, step, kl_coef)
            sums += found[:named]
            largest = torch.maximum(largest, found[named:])
            if measures:
                rollout.measured(part, own)
        if measures and config.world_size > 1:
            for each in (rollout.logps_BR, rollout.entropy_BR):
                assert each is not None
                each.copy_(self.reduce(each.nan_to_num(0.0), "sum"))  # those of other processes are unknown here
        sums = self.reduce(sums, "sum").cpu()
        self._reduce_gradients()
        norms = method.clip(self._clip)
        report = StepReport(method.statistics, sums, tokens, norms, self._largest(largest))
        ratio = report.mean("ratio")
        skip = not report.finite or (config.max_ratio is not None and not ratio <= config.max_ratio)
        target = config.target_approx_kl
        stop = target is not None and not report.mean("approx_kl") <= 1.5 * target
        return replace(report, stop=stop, skip=skip)

    def _largest(self, own: torch.Tensor) -> dict[str, float]:
        found = {name: float(self.reduce(x, "max")) for name, x in zip(self.largest, own, strict=True)}
        return {name: x for name, x in found.items() if x > -torch.inf}

    def _reduce_gradients(self) -> None:
        parameters = list(self.method.trainables.values())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.config.world_size == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = self.reduce(torch.cat([grad.flatten() for grad in grads]), "sum")
        for grad, piece in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(piece.view_as(grad))

    def _clip(self, parameters: list[nn.Parameter]) -> float:
        """Clip to max_grad_norm (0: not at all); the norm before."""
        limit = self.config.max_grad_norm or float("inf")
        return float(nn.utils.clip_grad_norm_(parameters, limit))


def minibatches(size: int, count: int, seed: int, group: int = 1) -> list[torch.Tensor]:
    """`count` minibatches of a fresh permutation of `size` rows; `size` must be a multiple of `count`.

    Args:
        group: so many rows that follow each other answer one prompt and stay together.
    """
    if size % (count * group):
        raise ValueError(f"{size} episodes in {count} minibatches, expected a multiple")
    order = torch.randperm(size // group, generator=torch.Generator().manual_seed(seed))
    rows = (order[:, None] * group + torch.arange(group)).flatten()
    return list(rows.split(size // count))


def add_report(totals: dict[str, float], report: StepReport, seconds: float) -> None:
    """Add a minibatch to the iteration's sums over tokens and over steps; they are divided once, when logged."""
    found = {name: float(x) for name, x in zip(report.names, report.sums, strict=True)}
    found |= {f"{name}_norm": norm for name, norm in report.norms.items()} | {"tokens": report.tokens}
    for name, x in report.largest.items():
        found |= {name: x, f"{name} steps": 1.0}
    if not report.finite:  # left out, and so are its numbers
        found = dict.fromkeys(found, 0.0)
    found |= {"steps": 1.0, "skipped": float(report.skip), "stopped": float(report.stop)}
    found["updates"] = float(not (report.skip or report.stop))
    found["seconds"] = seconds
    for name, x in found.items():
        totals[name] = totals.get(name, 0.0) + x


def update_metrics(totals: dict[str, float], method: Method) -> dict[str, float]:
    """Means over all valid tokens of the iteration's minibatches, under the names that people know."""
    mean = {name: totals[name] / max(totals["tokens"], 1.0) for name in method.statistics}
    for name in getattr(method, "largest", ()):
        mean[name] = totals.get(name, 0.0) / max(totals.get(f"{name} steps", 0.0), 1.0)
    return {
        **method.update_metrics(mean),
        **{
            f"{name.removesuffix('_norm')}/grad_norm": x / totals["steps"]
            for name, x in totals.items()
            if name.endswith("_norm")
        },
        "policy/steps": totals["updates"],
        "policy/skipped": totals["skipped"],
        "policy/stopped": totals["stopped"],
        "time/update": totals["seconds"],
        "lr": totals["lr"],
    }


def tolerance(dtype: torch.dtype, *, autocast: bool) -> float:
    """What two forwards of the same tokens may differ by, for the head's dtype."""
    return FULL_TOLERANCE if dtype == torch.float32 and not autocast else LOW_TOLERANCE


def sampler_tolerance(asked: float | None, *, low_precision: bool) -> float:
    """What sampler and trainer may differ by: what was asked for, or else by the precision."""
    if asked is not None:
        return asked
    return SAMPLER_LOW if low_precision else SAMPLER_FULL


def check_sampler(metrics: dict[str, float], iteration: int, tolerance: float) -> None:
    """The replies were drawn with the log-probs that the training forward gives them.

    The largest gap is no measure: in 16 bits single tokens of a right run are off by half a nat.

    Raises:
        UserError: the mean gap or the KL is above the tolerance.
    """
    mean, kl = metrics["rollout/logprob_mismatch_mean"], metrics["rollout/sampler_kl"]
    if not (mean <= tolerance and kl <= tolerance):
        raise UserError(
            "mismatch_tolerance",
            f"iteration {iteration}: the sampler's log-probs are {mean:.2g} nats per token from the training forward's "
            f"(KL {kl:.2g}), expected {tolerance:g} at most: it would learn from replies of another policy",
            f"train in float32, or raise mismatch_tolerance above {max(mean, kl):.2g} if that is what you want",
        )


def check_reference(rollout: Rollout, tolerance: float) -> None:
    """KL(policy || reference) = 0 before the first update.

    Raises:
        RuntimeError: it is not.
    """
    assert rollout.ref_logps_BR is not None
    gap = (rollout.logps_BR - rollout.ref_logps_BR).abs().sum() / rollout.episodes.length_B.sum()
    if not float(gap) <= tolerance:
        raise RuntimeError(
            f"step 0: |log pi - log pi_ref| is {float(gap):.2g} nats per token, expected 0 within {tolerance:g}: "
            "the reference is not the adapter that training starts from"
        )


def check_ratio(report: StepReport, iteration: int, tolerance: float) -> None:
    """ratio = 1 in the first minibatch of the first epoch.

    Args:
        tolerance: of a mean over many tokens; see `of_few`.

    Raises:
        RuntimeError: it is not.
    """
    gap, most = report.mean("abs_log_ratio"), of_few(tolerance, report.tokens)
    if not gap <= most:
        raise RuntimeError(
            f"iteration {iteration}: the first minibatch's |log ratio| is {gap:.2g} nats per token, expected 0 within "
            f"{most:.2g}: rollout and update do not see the same policy"
        )


def of_few(tolerance: float, tokens: float) -> float:
    """What a mean over so many tokens may be, where it may be `tolerance` over many: four standard errors more.

    A token's difference between two forwards in 16 bits spreads about as widely as it is large: 0.038 nats around a
    mean of 0.044, in minibatches of one reply up to 0.14 (SmolLM2-135M in bf16 on a CPU, 64 replies, 2,510 tokens).
    """
    return tolerance * (1 + 4 / math.sqrt(max(tokens, 1.0)))
