"""What makes the on-policy loop PPO: a value, generalised advantages, and the clipped losses.

The loop (`trainer.py`) knows prompts, generation, scores, log-probs, the reference and checkpoints, and is handed a
`Method`: which parameters train, what the rewards become, and the loss. A method without a value is another `Method`.

Legend of shape suffixes: B episodes of this process, T positions of prompt + response, R response positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn

from ...models.adapters import DEFAULT, REF, REWARD, VALUE, AdapterSet
from ...models.masked import masked_sum
from ...models.transfer import to_device
from ..advantages import gae, whiten
from ..losses import kl_loss, ppo_policy_loss, value_loss
from .config import OnPolicyConfig, PPOConfig
from .network import Trunk
from .rewards import RewardSource, Scorer, Scores
from .rollout import Episodes, Reduce, Rollout, global_moments


@dataclass(frozen=True)
class Forwards:
    """What the training forward says of a rollout, fp32 [B, R], zero outside the mask.

    logps_BR, ref_logps_BR: log-probs under old policy and reference; None where no KL is measured.
    entropy_BR: the old policy's.
    values_BR: V(s_t), s_t being everything before token t; None of a method without a value.

    Where the old policy's are left to the first step (`OnPolicyConfig.first_step_measures`), its two are NaN within the
    mask, so that nothing can be made of them before.
    """

    logps_BR: torch.Tensor
    ref_logps_BR: torch.Tensor | None
    entropy_BR: torch.Tensor
    values_BR: torch.Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What an optimiser step is made of, whichever of it a process has: the numbers that losses are divided by.

    rows, tokens: of the step, over all processes; finished_tokens: those of responses that ended in EOS.
    rollout: of all processes, whose minibatch the step is. rollout_tokens, rollout_finished_tokens: of it, the same.
    measures: this step's forward gives the rollout the old policy's log-probs and entropies.
    """

    rows: float
    tokens: float
    finished_tokens: float
    rollout: Rollout
    rollout_tokens: float
    rollout_finished_tokens: float
    measures: bool = False

    @classmethod
    def of(cls, rollout: Rollout, rows: torch.Tensor, reduce: Reduce, *, measures: bool = False) -> "Step":
        """The step that takes the rows `rows` of this process, and others' rows of others."""
        lengths_B, finished_B = rollout.episodes.length_B, rollout.episodes.finished_B
        here = to_device(rows, lengths_B.device)
        own = [torch.tensor(len(rows), device=lengths_B.device), lengths_B[here].sum()]
        own.append((lengths_B * finished_B)[here].sum())
        whole = [lengths_B.sum(), (lengths_B * finished_B).sum()]
        step = reduce(torch.stack(own).double(), "sum")
        # asked for at once: a GPU is waited for
        counts = torch.cat([step, torch.stack(whole).double()]).tolist()
        return cls(counts[0], counts[1], counts[2], rollout, counts[3], counts[4], measures)


class Method(Protocol):
    """What the loop is handed.

    Attributes:
        trainables: what trains, by the names under which checkpoints hold it.
        statistics: what `backward` sums over tokens: the loss first, and "ratio", "approx_kl" and "abs_log_ratio".
            A method may have `largest` besides: the names of what `backward` finds the largest of, behind the sums.
        samples_per_prompt: how many responses of a rollout answer one prompt; they stand together.
    """

    trainables: dict[str, nn.Parameter]
    statistics: tuple[str, ...]
    samples_per_prompt: int

    def clip(self, clip: Callable[[list[nn.Parameter]], float]) -> dict[str, float]:
        """Clip the gradients with `clip`, those that go together at once; each norm before, by its name in the log."""
        ...

    def learning_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """The optimiser's groups."""
        ...

    def forwards(self, episodes: Episodes) -> Forwards:
        """Step 4: log-probs (and values) of a rollout; changes nothing."""
        ...

    def rollout(self, episodes: Episodes, forwards: Forwards, rewards_BR: torch.Tensor, scores: Scores) -> Rollout:
        """Step 5: what the rewards become: advantages, and what a value is to learn."""
        ...

    def rollout_metrics(self, rollout: Rollout) -> dict[str, float]:
        """What is logged about a rollout besides what the loop logs."""
        ...

    def backward(self, part: Rollout, step: Step, kl_coef: float) -> torch.Tensor:
        """Step 6: backward of one micro-batch of the step; its sums in `statistics`' order, then the `largest`. Where
        the step `measures`, what its forward found is written into `part`."""
        ...

    def update_metrics(self, mean: dict[str, float]) -> dict[str, float]:
        """The means of `statistics`, and of each step's `largest`, under the names by which they are logged."""
        ...


class PolicyMethod:
    """What methods share that train the policy and nothing else.

    Attributes:
        policy: its parameters.
    """

    def __init__(self, config: OnPolicyConfig, trunk: Trunk, reduce: Reduce) -> None:
        self.trunk, self.reduce, self.rate = trunk, reduce, config.learning_rate
        self.policy = trunk.adapters.parameters(DEFAULT)
        self.trainables: dict[str, nn.Parameter] = {f"policy.{i}": p for i, p in enumerate(self.policy)}

    def clip(self, clip: Callable[[list[nn.Parameter]], float]) -> dict[str, float]:
        """All at once."""
        return {"policy": clip(self.policy)}

    def learning_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """One."""
        return [(self.policy, self.rate)]


@torch.no_grad()
def policy_forwards(trunk: Trunk, episodes: Episodes, roles: Sequence[str] = (DEFAULT,), group: int = 1) -> Forwards:
    """Log-probs and entropies of a rollout under the policy, and log-probs under the reference, where the roles have
    it. Without the policy among them its two are NaN within the mask, for the first step to fill.

    Args:
        group: so many rows that follow each other answer one prompt, which is laid out once.
    """
    mask_BR = episodes.mask_BR
    unknown_BR = torch.zeros(mask_BR.shape, device=mask_BR.device).masked_fill(mask_BR, torch.nan)
    # a tensor each: the first step writes into the policy's
    logps, entropy_BR = {role: unknown_BR.clone() for role in (DEFAULT, *roles)}, unknown_BR.clone()
    for rows in trunk.batches(episodes, group) if roles else ():
        part, here = episodes.rows(rows), to_device(rows, mask_BR.device)
        for role in roles:
            with trunk.adapters.using(role):
                found = trunk.logprobs(trunk.hidden(part), part)
            logps[role][here, : found.logps_BR.shape[1]] = found.logps_BR
            if role == DEFAULT:
                entropy_BR[here, : found.entropy_BR.shape[1]] = found.entropy_BR
    return Forwards(logps[DEFAULT], logps.get(REF), entropy_BR)


class ValueStart(NamedTuple):
    """The value starts as weight * (score - mean) / std of the reward adapter `role`."""

    role: str
    mean: float
    std: float
    weight: float


def value_start(config: PPOConfig, sources: Sequence[RewardSource], scorers: Sequence[Scorer]) -> ValueStart | None:
    """What the value starts from: the first reward stage; None when no source is one (P14)."""
    for source, scorer in zip(sources, scorers, strict=True):
        if source.kind == "stage":
            known = scorer.normal is not None and config.normalize_rewards
            mean, std = scorer.normal if known and scorer.normal is not None else (0.0, 1.0)
            return ValueStart(
                REWARD,
                mean,
                std if config.reward_scale == "std" else 1.0,
                # an ensemble's members are not weighted
                source.weight if config.reward_combination == "sum" else 1.0,
            )
    return None


def add_value(adapters: AdapterSet, *, shared: bool, start: ValueStart | None) -> None:
    """Give the adapters a value function: adapter "value" (none when shared) and head "value", both trainable.

    Args:
        shared: the head stands on the policy's own trunk, and starts at zero.
        start: the reward that the value starts from: head and bias are set so that at a response's last token the
            value is the normalised score. None: a copy of the policy with a zero head.
    """
    if VALUE in adapters.names:
        return
    if shared or start is None:
        if not shared:
            adapters.copy(VALUE, source=DEFAULT, trainable=True)
        adapters.add_head(VALUE, bias=True, zero=True)
        return
    adapters.copy(VALUE, source=start.role, trainable=True)
    source = adapters.heads[start.role].score
    head = adapters.add_head(VALUE, bias=True, zero=True).score
    with torch.no_grad():
        head.weight.copy_(source.weight * (start.weight / start.std))
        head.bias.fill_(-start.mean * start.weight / start.std)


def trainable_parameters(adapters: AdapterSet, *, shared: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(policy's, value's) parameters, the value's head among the latter."""
    policy = adapters.parameters(DEFAULT)
    value = list(adapters.heads[VALUE].parameters()) if shared else adapters.parameters(VALUE)
    for parameter in (*policy, *value):
        if not parameter.requires_grad:
            raise ValueError("a parameter of the policy or the value is frozen, expected all of them to train")
    return policy, value


class PPO:
    """Proximal policy optimisation (arXiv 1707.06347) with a value adapter, or a value head on the policy's trunk.

    Attributes:
        policy, value: the parameters that train, the value's head among the latter.
    """

    statistics: tuple[str, ...] = (
        "policy_loss", "value_loss", "kl_loss", "approx_kl", "clipped", "value_clipped", "ratio", "ratio_squared",
        "abs_log_ratio", "entropy",
    )  # fmt: skip

    samples_per_prompt: int = 1

    def __init__(self, config: PPOConfig, trunk: Trunk, start: ValueStart | None, reduce: Reduce) -> None:
        self.config, self.trunk, self.reduce = config, trunk, reduce
        self.shared = config.value == "shared"
        add_value(trunk.adapters, shared=self.shared, start=start)
        self.policy, self.value = trainable_parameters(trunk.adapters, shared=self.shared)
        self.trainables = {f"policy.{i}": p for i, p in enumerate(self.policy)}
        self.trainables |= {f"value.{i}": p for i, p in enumerate(self.value)}

    def clip(self, clip: Callable[[list[nn.Parameter]], float]) -> dict[str, float]:
        """Policy and value apart; where they share a trunk, all at once."""
        if self.shared:
            norm = clip([*self.policy, *self.value])
            return {"policy": norm, "value": norm}
        return {"policy": clip(self.policy), "value": clip(self.value)}

    def learning_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """Policy and value, each with its own."""
        rate, value_rate = self.config.learning_rate, self.config.value_learning_rate
        return [(self.policy, rate), (self.value, rate if value_rate is None else value_rate)]

    @torch.no_grad()
    def forwards(self, episodes: Episodes) -> Forwards:
        """In micro-batches of like length."""
        trunk, adapters, device = self.trunk, self.trunk.adapters, episodes.start_B.device
        out = [torch.zeros(episodes.mask_BR.shape, device=device) for _ in range(4)]
        for rows in trunk.batches(episodes):
            part = episodes.rows(rows)
            with adapters.using(DEFAULT):
                hidden_BTH = trunk.hidden(part)
                policy = trunk.logprobs(hidden_BTH, part)
                values_BR = trunk.values(hidden_BTH, part) if self.shared else None
            with adapters.using(REF):
                ref = trunk.logprobs(trunk.hidden(part), part)
            if values_BR is None:
                with adapters.using(VALUE):
                    values_BR = trunk.values(trunk.hidden(part), part)
            here = to_device(rows, device)
            for whole_BR, own_BR in zip(
                out, (policy.logps_BR, ref.logps_BR, policy.entropy_BR, values_BR), strict=True
            ):
                whole_BR[here, : own_BR.shape[1]] = own_BR
        return Forwards(*out)

    def rollout(self, episodes: Episodes, forwards: Forwards, rewards_BR: torch.Tensor, scores: Scores) -> Rollout:
        """Generalised advantages and returns, whitened over the valid tokens of all processes (P16)."""
        config, mask_BR = self.config, episodes.mask_BR
        assert forwards.values_BR is not None
        if config.whiten_rewards:
            moments = global_moments(rewards_BR, mask_BR, self.reduce)
            rewards_BR = whiten(rewards_BR, mask_BR, *moments, keep_mean=True)
        advantages_BR, returns_BR = gae(rewards_BR, forwards.values_BR, mask_BR, gamma=config.gamma, lam=config.lam)
        if config.whiten_advantages:
            advantages_BR = whiten(advantages_BR, mask_BR, *global_moments(advantages_BR, mask_BR, self.reduce))
        return Rollout(
            episodes,
            forwards.logps_BR,
            forwards.ref_logps_BR,
            advantages_BR,
            scores.total_B,
            forwards.values_BR,
            returns_BR,
        )

    def rollout_metrics(self, rollout: Rollout) -> dict[str, float]:
        """The share of the returns' variance that the value knew."""
        assert rollout.values_BR is not None and rollout.returns_BR is not None
        mask_BR = rollout.episodes.mask_BR
        _, noise = global_moments(rollout.returns_BR - rollout.values_BR, mask_BR, self.reduce)
        _, spread = global_moments(rollout.returns_BR, mask_BR, self.reduce)
        return {"value/explained_variance": float(1 - noise / spread.clamp(min=1e-12))}

    def backward(self, part: Rollout, step: Step, kl_coef: float) -> torch.Tensor:
        """Policy loss, KL and entropy terms, value loss; see `Method.backward`."""
        r, config, trunk, adapters, tokens = part, self.config, self.trunk, self.trunk.adapters, step.tokens
        episodes, mask_BR = r.episodes, r.episodes.mask_BR
        # Backward inside `using`: recomputed layers must meet the adapter of the forward.
        with adapters.using(DEFAULT):
            hidden_BTH = trunk.hidden(episodes)
            now = trunk.logprobs(hidden_BTH, episodes, differentiable_entropy=config.entropy_coef != 0)
            policy = ppo_policy_loss(
                now.logps_BR, r.logps_BR, r.advantages_BR, mask_BR, cliprange=config.cliprange, denominator=tokens
            )
            loss = policy.loss
            kl = torch.zeros((), device=loss.device)
            if config.kl_in == "loss":
                assert r.ref_logps_BR is not None
                kl = kl_loss(now.logps_BR, r.ref_logps_BR, mask_BR, estimator=config.estimator(), denominator=tokens)
                loss = loss + kl_coef * kl
            entropy = masked_sum(now.entropy_BR, mask_BR)
            if config.entropy_coef:
                loss = loss - config.entropy_coef * entropy / tokens
            value = self._value_loss(hidden_BTH, r, tokens) if self.shared else None
            if value is not None:
                loss = loss + config.vf_coef * value[0]
            loss.backward()
        if value is None:
            # after the policy's backward, so that only one adapter's activations are held
            with adapters.using(VALUE):
                value = self._value_loss(trunk.hidden(episodes), r, tokens)
                (config.vf_coef * value[0]).backward()
        gap = masked_sum((now.logps_BR.detach() - r.logps_BR).abs(), mask_BR)
        found = (
            policy.loss * tokens, value[0] * tokens, kl * tokens, policy.approx_kl, policy.clipped, value[1],
            policy.ratio, policy.ratio_squared, gap, entropy,
        )  # fmt: skip
        return torch.stack([x.detach().double() for x in found])

    def update_metrics(self, mean: dict[str, float]) -> dict[str, float]:
        """TRL's names."""
        return {
            "policy/approxkl_avg": mean["approx_kl"],
            "policy/clipfrac_avg": mean["clipped"],
            "policy/entropy_avg": mean["entropy"],
            "loss/policy_avg": mean["policy_loss"],
            "loss/value_avg": mean["value_loss"],
            **({"loss/kl_avg": mean["kl_loss"]} if self.config.kl_in == "loss" else {}),
            "val/clipfrac_avg": mean["value_clipped"],
            "val/ratio": mean["ratio"],
            "val/ratio_var": max(mean["ratio_squared"] - mean["ratio"] ** 2, 0.0),
        }

    def _value_loss(self, hidden_BTH: torch.Tensor, r: Rollout, tokens: float) -> tuple[torch.Tensor, torch.Tensor]:
        assert r.values_BR is not None and r.returns_BR is not None
        loss, clipped = value_loss(
            self.trunk.values(hidden_BTH, r.episodes),
            r.values_BR,
            r.returns_BR,
            r.episodes.mask_BR,
            cliprange=self.config.cliprange_value,
            denominator=tokens,
        )
        return loss, clipped
