"""One optimiser step of PPO: losses, gradients summed over micro-batches and processes, clipping, the two brakes.

No DistributedDataParallel: only the adapters train, so one all-reduce of their few gradients, once a step, is both the
simplest and the exact thing. Every loss is a sum over tokens divided by the global token count, so the gradient does
not depend on micro-batches or on the number of processes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..models.masked import masked_sum
from .losses import kl_loss, ppo_policy_loss, value_loss
from .ppo_config import PPOConfig
from .ppo_forward import Trunk
from .rollout import Rollout, micro_batches

STATS = (
    "policy_loss", "value_loss", "kl_loss", "approx_kl", "clipped", "value_clipped", "ratio", "ratio_squared",
    "abs_log_ratio", "entropy",
)  # fmt: skip


@dataclass(frozen=True)
class StepReport:
    """What one minibatch was: token sums (STATS order), tokens, and what was done with it."""

    sums: torch.Tensor
    tokens: float
    policy_norm: float
    value_norm: float
    stop: bool
    skip: bool

    def mean(self, name: str) -> float:
        """Mean of a statistic over the minibatch's valid tokens, all processes."""
        return float(self.sums[STATS.index(name)]) / self.tokens


class Updater:
    """Step 6 of an iteration, one minibatch at a time.

    Args:
        policy, value: the parameters that train (the value's head included).
        reduce: adds a tensor up over all processes.
    """

    def __init__(
        self,
        config: PPOConfig,
        trunk: Trunk,
        policy: list[nn.Parameter],
        value: list[nn.Parameter],
        reduce: Callable[[torch.Tensor, str], torch.Tensor],
    ) -> None:
        self.config, self.trunk, self.policy, self.value, self.reduce = config, trunk, policy, value, reduce

    def gradients(self, rollout: Rollout, rows: torch.Tensor, kl_coef: float) -> StepReport:
        """Fill the gradients of the minibatch `rows` of this process, reduced over processes and clipped.

        `stop`: the new policy has left the old one by more than 1.5 x target_approx_kl per token. `skip`: the mean
        ratio is above max_ratio, or a gradient is not finite. Both are decided on global numbers, so processes agree.
        """
        config = self.config
        for parameter in (*self.policy, *self.value):
            parameter.grad = None
        tokens = float(self.reduce(rollout.episodes.length_B[rows].sum().double(), "sum"))
        sums = torch.zeros(len(STATS), dtype=torch.float64, device=rows.device)
        for part in micro_batches(rollout.episodes, rows, config.per_device_train_batch_size):
            sums += self._backward(rollout.rows(part), tokens, kl_coef)
        sums = self.reduce(sums, "sum")
        self._reduce_gradients()
        if config.value == "shared":
            policy_norm = value_norm = self._clip([*self.policy, *self.value])
        else:
            policy_norm, value_norm = self._clip(self.policy), self._clip(self.value)
        report = StepReport(sums, tokens, policy_norm, value_norm, False, False)
        ratio, finite = report.mean("ratio"), policy_norm + value_norm < float("inf")
        skip = not finite or (config.max_ratio is not None and not ratio <= config.max_ratio)
        target = config.target_approx_kl
        stop = target is not None and not report.mean("approx_kl") <= 1.5 * target
        return StepReport(sums, tokens, policy_norm, value_norm, stop, skip)

    def _backward(self, r: Rollout, tokens: float, kl_coef: float) -> torch.Tensor:
        """Backward of one micro-batch; its token sums in STATS order."""
        config, trunk, adapters = self.config, self.trunk, self.trunk.adapters
        episodes, mask_BR = r.episodes, r.episodes.mask_BR
        # Backward inside `using`: recomputed layers must meet the adapter of the forward.
        with adapters.using("default"):
            hidden_BTH = trunk.hidden(episodes)
            now = trunk.logprobs(hidden_BTH, episodes, differentiable_entropy=config.entropy_coef != 0)
            policy = ppo_policy_loss(
                now.logps_BR, r.logps_BR, r.advantages_BR, mask_BR, cliprange=config.cliprange, denominator=tokens
            )
            loss = policy.loss
            kl = torch.zeros((), device=loss.device)
            if config.kl_in == "loss":
                kl = kl_loss(now.logps_BR, r.ref_logps_BR, mask_BR, estimator=config.estimator(), denominator=tokens)
                loss = loss + kl_coef * kl
            entropy = masked_sum(now.entropy_BR, mask_BR)
            if config.entropy_coef:
                loss = loss - config.entropy_coef * entropy / tokens
            value = self._value_loss(hidden_BTH, r, tokens) if config.value == "shared" else None
            if value is not None:
                loss = loss + config.vf_coef * value[0]
            loss.backward()
        if value is None:
            # after the policy's backward, so that only one adapter's activations are held
            with adapters.using("value"):
                value = self._value_loss(trunk.hidden(episodes), r, tokens)
                (config.vf_coef * value[0]).backward()
        gap = masked_sum((now.logps_BR.detach() - r.logps_BR).abs(), mask_BR)
        found = (
            policy.loss * tokens, value[0] * tokens, kl * tokens, policy.approx_kl, policy.clipped, value[1],
            policy.ratio, policy.ratio_squared, gap, entropy,
        )  # fmt: skip
        return torch.stack([x.detach().double() for x in found])

    def _value_loss(self, hidden_BTH: torch.Tensor, r: Rollout, tokens: float) -> tuple[torch.Tensor, torch.Tensor]:
        values_BR = self.trunk.values(hidden_BTH, r.episodes)
        loss, clipped = value_loss(
            values_BR,
            r.values_BR,
            r.returns_BR,
            r.episodes.mask_BR,
            cliprange=self.config.cliprange_value,
            denominator=tokens,
        )
        return loss, clipped

    def _reduce_gradients(self) -> None:
        parameters = [*self.policy, *self.value]
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


def minibatches(size: int, count: int, seed: int, device: torch.device) -> list[torch.Tensor]:
    """`count` minibatches of a fresh permutation of `size` rows; `size` must be a multiple of `count`."""
    if size % count:
        raise ValueError(f"{size} episodes in {count} minibatches, expected a multiple")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return list(order.to(device).split(size // count))
