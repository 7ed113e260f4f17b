"""What GRPO and RLOO share: several replies to each prompt, compared with each other, and no value.

Legend of shape suffixes: B episodes of this process, R response positions, S sources of scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from ..errors import UserError
from ..models.adapters import DEFAULT, REF
from ..models.masked import masked_moments, masked_sum
from .advantages import sample_std
from .kl_control import FixedKL, KLController
from .losses import ratio_sums
from .ppo.config import RewardedConfig
from .ppo.method import Forwards, PolicyMethod, Step, policy_forwards
from .ppo.network import Trunk
from .ppo.rewards import RewardSource, Scores
from .ppo.rollout import Episodes, Reduce, Rollout
from .ppo.settings import GroupSettings
from .ppo.trainer import OnPolicyTrainer
from .ppo.trl_names import GROUP


@dataclass
class GroupConfig(GroupSettings, RewardedConfig):
    """What the configs of GRPO and RLOO share.

    `reward_weights` are those of the rewards, in their order, as in TRL's configs; in a recipe they stand in `reward`.
    """

    epochs_field = "num_iterations"
    names = GROUP

    reward_weights: list[float] | None = field(default=None, metadata={"help": "Of the rewards, in their order."})

    def kl_control(self, coef: float | None = None) -> KLController:
        """beta, all along."""
        return FixedKL(self.kl_factor())

    def kl_factor(self) -> float:
        """beta, a field of both, each with its default."""
        raise NotImplementedError

    def measures_kl(self) -> bool:
        return self.kl_factor() != 0

    def first_step_measures(self) -> bool:
        """One step takes the whole rollout, no reward has a KL in it and no server drew it: nothing needs the old
        policy's log-probs before that step's own forward gives them."""
        needed = (self.kl_in_reward and self.measures_kl()) or self.rollout_engine is not None
        return self.num_mini_batches == 1 and not needed

    def samples_per_prompt(self) -> int:
        return self.num_generations

    def clip_high(self) -> float:
        """How far above 1 the ratio counts."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


class Counted(NamedTuple):
    """What a loss is, and what is noted beside it.

    sums: by the method's own names. low_B, high_B: the share of each reply that the clip decided, below and above; NaN
    of one that does not count.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]
    low_B: torch.Tensor
    high_B: torch.Tensor


class GroupMethod(PolicyMethod):
    """A `Method` (`ppo/method.py`) whose replies come in groups; a subclass says advantages and loss.

    Attributes:
        own_statistics: the names of the sums that the subclass's loss makes.
    """

    own_statistics: tuple[str, ...] = ()
    largest = ("low_least", "high_most")
    """Of a step's replies: the least share that the clip decided below, times -1, and the largest above."""

    def __init__(self, config: GroupConfig, trunk: Trunk, sources: Sequence[RewardSource], reduce: Reduce) -> None:
        super().__init__(config, trunk, reduce)
        self.config, self.sources = config, sources
        self.samples_per_prompt = config.num_generations
        self.statistics = (
            "policy_loss", "ratio", "approx_kl", "abs_log_ratio", "entropy", "counted", *self.own_statistics,
        )  # fmt: skip
        self._measured: dict[str, float] = {}

    # What a subclass says.

    def advantages(self, scores: Scores, kl_B: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The advantages of this process' replies [B], and the standard deviations that are looked at for being 0.

        Args:
            scores: NaN where a reply has none.
            kl_B: of each reply to the reference, nats, 0 of one that does not count; None where none is measured.
        """
        raise NotImplementedError

    def loss(self, logps_BR: torch.Tensor, part: Rollout, counted_BR: torch.Tensor, step: Step) -> Counted:
        """The loss of a micro-batch, and the sums of `own_statistics`.

        Args:
            counted_BR: the tokens that train.
        """
        raise NotImplementedError

    def own_metrics(self, mean: dict[str, float]) -> dict[str, float]:
        """The means of `own_statistics` and `largest` under their logged names."""
        raise NotImplementedError

    # What the loop is handed.

    def forwards(self, episodes: Episodes, *, old: bool = True) -> Forwards:
        """Under the policy, and where a KL is asked for under the reference; a group's prompt is laid out once. Without
        `old` the policy's are left to the first step."""
        roles = [*([DEFAULT] if old else []), *([REF] if self.config.measures_kl() else [])]
        return policy_forwards(self.trunk, episodes, roles, self._group_of(episodes))

    def _group_of(self, episodes: Episodes) -> int:
        """Rows that answer one prompt; 1 where they do not come in groups (held-out prompts are answered once)."""
        size, start_B = self.samples_per_prompt, episodes.host.start_B
        if len(start_B) % size:
            return 1
        start_PN = start_B.reshape(-1, size)
        return size if bool((start_PN == start_PN[:, :1]).all()) else 1

    def counted(self, episodes: Episodes) -> torch.Tensor:
        """The tokens that train [B, R]."""
        if not self.config.mask_truncated_completions:
            return episodes.mask_BR
        return episodes.mask_BR & episodes.finished_B[:, None]

    def rollout(self, episodes: Episodes, forwards: Forwards, rewards_BR: torch.Tensor, scores: Scores) -> Rollout:
        """One advantage a reply, the same at each of its tokens."""
        del rewards_BR  # the KL, where it stands in the reward, is that of the replies that count
        none_B = scores.parts_SB.isnan().all(0)
        known = Scores(scores.total_B.masked_fill(none_B, torch.nan), scores.parts_SB)
        kl_B = None
        if forwards.ref_logps_BR is not None:
            kl_B = masked_sum(forwards.logps_BR - forwards.ref_logps_BR, self.counted(episodes), 1)
        advantages_B, std_B = self.advantages(known, kl_B)
        self._measured = {
            **_reward_metrics(known, std_B, self.sources, self.reduce),
            **length_metrics(episodes, self.reduce),
        }
        return Rollout(
            episodes,
            forwards.logps_BR,
            forwards.ref_logps_BR,
            torch.where(episodes.mask_BR, advantages_B[:, None], 0.0),
            scores.total_B,
            entropy_BR=forwards.entropy_BR if self.config.first_step_measures() else None,
        )

    def rollout_metrics(self, rollout: Rollout) -> dict[str, float]:
        """Of the rollout that `rollout` made last, under TRL's names."""
        del rollout
        return self._measured

    def backward(self, part: Rollout, step: Step, kl_coef: float) -> torch.Tensor:
        """See `Method.backward`; beta is the config's."""
        del kl_coef
        episodes, trunk = part.episodes, self.trunk
        mask_BR, counted_BR = episodes.mask_BR, self.counted(episodes)
        # Backward inside `using`: recomputed layers must meet the adapter of the forward.
        with trunk.adapters.using(DEFAULT):
            now = trunk.logprobs(trunk.hidden(episodes), episodes)
            if step.measures:
                assert part.entropy_BR is not None
                part.logps_BR.copy_(now.logps_BR.detach())
                part.entropy_BR.copy_(now.entropy_BR.detach())
            loss, sums, low_B, high_B = self.loss(now.logps_BR, part, counted_BR, step)
            loss.backward()
        ratio = ratio_sums(torch.where(mask_BR, now.logps_BR - part.logps_BR, 0.0), mask_BR)
        found = (loss * step.tokens, *ratio, masked_sum(now.entropy_BR, counted_BR), counted_BR.sum())
        own = [sums[name] for name in self.own_statistics]
        largest = [x_B.nan_to_num(-torch.inf).max() for x_B in (-low_B, high_B)]
        return torch.stack([x.detach().double() for x in (*found, *own, *largest)])

    def update_metrics(self, mean: dict[str, float]) -> dict[str, float]:
        """The loop's names, and TRL's."""
        entropy = mean["entropy"] / (mean["counted"] or 1.0)
        return {
            "policy/approxkl_avg": mean["approx_kl"],
            "policy/entropy_avg": entropy,
            "entropy": entropy,
            "loss/policy_avg": mean["policy_loss"],
            "val/ratio": mean["ratio"],
            **self.own_metrics(mean),
        }


def clip_metrics(mean: dict[str, float]) -> dict[str, float]:
    """Shares of what the clip decided: of all tokens or replies, and of the reply that has least of it below, most
    above (the mean over steps)."""
    count = mean["clip_count"] or 1.0
    low, high = mean["low"] / count, mean["high"] / count
    return {
        "policy/clipfrac_avg": low + high,
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
        "clip_ratio/low_min": abs(mean["low_least"]),
        "clip_ratio/high_max": mean["high_most"],
    }


def _reward_metrics(
    scores: Scores, std_B: torch.Tensor, sources: Sequence[RewardSource], reduce: Reduce
) -> dict[str, float]:
    """Of the replies that have a score; how many groups have no spread, and so nothing to learn from."""
    named = {"reward": scores.total_B}
    named |= {f"rewards/{name}": x_B for name, x_B in zip(_names(sources), scores.parts_SB, strict=True)}
    sums = torch.stack([masked_moments(x_B, ~x_B.isnan()) for x_B in named.values()])
    flat = torch.isclose(std_B, torch.zeros_like(std_B)).double()
    share = torch.stack([flat.sum(), flat.new_tensor(len(flat))])
    *found, zero = reduce(torch.cat([sums.flatten(), share]), "sum").split([3] * len(named) + [2])
    metrics: dict[str, float] = {}
    for name, moments in zip(named, found, strict=True):
        mean, std = float(moments[1] / moments[0].clamp(min=1)), float(sample_std(moments).nan_to_num(0.0))
        whole = name == "reward"
        metrics |= {name if whole else f"{name}/mean": mean, f"{name}_std" if whole else f"{name}/std": std}
    return metrics | {"frac_reward_zero_std": float(zero[0] / zero[1])}


def _names(sources: Sequence[RewardSource]) -> list[str]:
    """The sources' names in the log: a function's own, the last part of a path; where two are alike, numbered."""
    short = [source.name.rstrip("/").replace(":", "/").rpartition("/")[2] for source in sources]
    return [name if short.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(short, start=1)]


def length_metrics(episodes: Episodes, reduce: Reduce) -> dict[str, float]:
    """Tokens of the replies, and of those that ended in EOS (0 where none did), under TRL's names."""
    length_B, finished_B = episodes.length_B.double(), episodes.finished_B
    rows = torch.stack([torch.ones_like(length_B), length_B, finished_B.double(), length_B * finished_B])
    count, total, ended, total_ended = reduce(rows.sum(1), "sum").tolist()
    long_B, short_B = length_B.where(finished_B, 0.0), (-length_B).where(finished_B, -torch.inf)
    longest, shortest, longest_ended, shortest_ended = (
        float(reduce(x.max(), "max")) for x in (length_B, -length_B, long_B, short_B)
    )
    return {
        "completions/mean_length": total / count,
        "completions/min_length": -shortest,
        "completions/max_length": longest,
        "completions/clipped_ratio": 1 - ended / count,
        "completions/mean_terminated_length": total_ended / (ended or 1.0),
        "completions/min_terminated_length": -shortest_ended if ended else 0.0,
        "completions/max_terminated_length": longest_ended,
    }


class GroupTrainer(OnPolicyTrainer):
    """The on-policy loop with groups of replies. Arguments, attributes and errors are those of `OnPolicyTrainer`."""

    args: GroupConfig  # pyright: ignore[reportIncompatibleVariableOverride]: it is never set to another

    def _build_roles(self, sources: list[RewardSource]) -> None:
        super()._build_roles(_weighted(sources, self.args.reward_weights, type(self).__name__))

    def _forwards(self, episodes: Episodes) -> Forwards:
        if not self.args.first_step_measures():
            return super()._forwards(episodes)
        assert isinstance(self.method, GroupMethod)
        return self.method.forwards(episodes, old=False)


def _weighted(sources: list[RewardSource], weights: list[float] | None, where: str) -> list[RewardSource]:
    """The sources with the config's `reward_weights`.

    Raises:
        UserError: not one for each, or weights that are said twice.
    """
    if weights is None:
        return sources
    if len(weights) != len(sources):
        said = f"reward_weights has {len(weights)} numbers, and there are {len(sources)} rewards"
        raise UserError(where, said, "give one for each reward, in their order")
    if any(source.weight != 1 for source in sources):
        raise UserError(where, "reward_weights is given, and the rewards have weights of their own", "keep one of them")
    return [replace(source, weight=weight) for source, weight in zip(sources, weights, strict=True)]
