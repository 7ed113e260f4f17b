"""One rollout of PPO, from prompts to advantages, and what is logged about it.

Legend of shape suffixes: S reward sources, B episodes of this process, R response positions.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..models.generate import sample
from ..models.heap import give_back
from ..models.masked import masked_mean, masked_moments, masked_sum, mean_and_variance
from .advantages import gae, whiten
from .losses import token_rewards
from .ppo_config import PPOConfig
from .ppo_forward import Trunk
from .ppo_prompts import Prompts, seed_of, stream_rows
from .rewards import RewardSource, RunningScale, apply_eos_rule, combine
from .rollout import FORWARD_ONLY, Episodes, Rollout, make_episodes, micro_batches
from .scorers import Responses, Scorer, decode


@dataclass(frozen=True)
class Collected:
    """A rollout, its metrics (global, under their logged names) and a few generations of this process."""

    rollout: Rollout
    metrics: dict[str, float]
    samples: list[dict[str, Any]]


class Collector:
    """Steps 1 to 5 of an iteration.

    Args:
        reduce: adds a tensor up over all processes ("sum") or takes the largest ("max").
    """

    def __init__(
        self,
        config: PPOConfig,
        trunk: Trunk,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        sources: Sequence[RewardSource],
        *,
        scorers: Sequence[Scorer],
        device: torch.device,
        reduce: Callable[[torch.Tensor, str], torch.Tensor],
    ) -> None:
        self.config, self.trunk, self.tokenizer, self.prompts = config, trunk, tokenizer, prompts
        self.sources, self.scorers, self.device, self.reduce = sources, scorers, device, reduce
        self.running = RunningScale()

    def collect(self, iteration: int, kl_coef: float) -> Collected:
        """Sample prompts, generate, score, compute KL and advantages. Changes no adapter."""
        config, began = self.config, time.perf_counter()

        # 1. Prompts: this process' slice of the iteration's part of the stream.
        local = config.local_rollout_size()
        start = iteration * config.rollout_batch_size + config.process_index * local
        prompts = self.prompts.take(stream_rows(len(self.prompts), config.seed, start, local))

        # 2. Generate. The seed names iteration and process: each samples differently, and again the same.
        episodes = self._generate(prompts, seed_of(config.seed, "rollout", iteration, config.process_index))
        generated = time.perf_counter()

        # 3. Score.
        texts = decode(self.tokenizer, episodes.responses())
        scores_B = self._scores(Responses(episodes, prompts.prompts, texts, prompts.column_lists()))
        scored = time.perf_counter()

        # 4. Log-probs of old policy and reference, values; the KL penalty goes into the rewards, token by token.
        logps_BR, ref_logps_BR, values_BR, entropy_BR = self._forwards(episodes)
        give_back()
        mask_BR = episodes.mask_BR
        delta_BR = logps_BR - ref_logps_BR
        coef = kl_coef if config.kl_in == "reward" else 0.0
        rewards_BR, non_score_BR = token_rewards(delta_BR, scores_B, mask_BR, coef)

        # 5. Advantages, whitened over the valid tokens of all processes.
        if config.whiten_rewards:
            rewards_BR = whiten(rewards_BR, mask_BR, *self._moments(rewards_BR, mask_BR), keep_mean=True)
        advantages_BR, returns_BR = gae(rewards_BR, values_BR, mask_BR, gamma=config.gamma, lam=config.lam)
        if config.whiten_advantages:
            advantages_BR = whiten(advantages_BR, mask_BR, *self._moments(advantages_BR, mask_BR))

        rollout = Rollout(episodes, logps_BR, ref_logps_BR, values_BR, advantages_BR, returns_BR, scores_B)
        metrics = self._metrics(rollout, non_score_BR, entropy_BR)
        metrics["objective/kl_coef"] = kl_coef
        metrics["rollout/tokens_per_second"] = metrics.pop("tokens") / (generated - began)
        metrics["time/rollout"], metrics["time/score"] = generated - began, scored - generated
        metrics["time/forward"] = time.perf_counter() - scored
        return Collected(rollout, metrics, self._samples(prompts, texts, rollout))

    def _generate(self, prompts: Prompts, seed: int) -> Episodes:
        config, tokenizer = self.config, self.tokenizer
        eos = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        pad = eos if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)  # type: ignore[arg-type]
        give_back()  # here and below: no phase grows on top of what another one left
        generation = sample(
            self.trunk.adapters,
            "default",
            prompts.ids,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            eos_token_id=eos,
            pad_token_id=pad,
            seed=seed,
            batch_size=config.rollout_micro_batch_size,
        )
        give_back()
        return make_episodes(prompts.ids, generation, pad, self.device)

    def _scores(self, responses: Responses) -> torch.Tensor:
        """Raw scores, centred and combined, scaled, clipped; then what a missing EOS does."""
        config = self.config
        parts = []
        for scorer in self.scorers:
            scores_B = scorer(responses).to(self.device)
            if scorer.normal is not None and config.normalize_rewards:
                mean, std = scorer.normal
                scores_B = (scores_B - mean) / (std if config.reward_scale == "std" else 1.0)
            parts.append(scores_B)
        weights_S = torch.tensor([source.weight for source in self.sources], device=self.device)
        scores_B = combine(
            torch.stack(parts), weights_S, how=config.reward_combination, penalty=config.ensemble_penalty
        )
        if config.reward_scale == "running":
            moments = masked_moments(scores_B, torch.ones_like(scores_B, dtype=torch.bool))
            self.running.update(self.reduce(moments, "sum"))
            scores_B = scores_B / self.running.std
        if config.reward_clip is not None:
            scores_B = scores_B.clamp(-config.reward_clip, config.reward_clip)
        return apply_eos_rule(
            scores_B,
            responses.episodes.finished_B,
            penalty=config.missing_eos_penalty,
            replacement=config.missing_eos_score,
        )

    @torch.no_grad()
    def _forwards(self, episodes: Episodes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(old log-probs, reference log-probs, values, entropy), fp32 [B, R], in micro-batches of like length."""
        trunk, adapters = self.trunk, self.trunk.adapters
        out = [torch.zeros(episodes.mask_BR.shape, device=self.device) for _ in range(4)]
        everyone = torch.arange(len(episodes), device=self.device)
        for rows in micro_batches(episodes, everyone, FORWARD_ONLY * self.config.per_device_train_batch_size):
            part = episodes.rows(rows)
            with adapters.using("default"):
                hidden_BTH = trunk.hidden(part)
                old = trunk.logprobs(hidden_BTH, part)
                values_BR = trunk.values(hidden_BTH, part) if self.config.value == "shared" else None
            with adapters.using("ref"):
                ref = trunk.logprobs(trunk.hidden(part), part)
            if values_BR is None:
                with adapters.using("value"):
                    values_BR = trunk.values(trunk.hidden(part), part)
            for whole_BR, own_BR in zip(out, (old.logps_BR, ref.logps_BR, values_BR, old.entropy_BR), strict=True):
                whole_BR[rows, : own_BR.shape[1]] = own_BR
        return out[0], out[1], out[2], out[3]

    def _moments(self, x_BR: torch.Tensor, mask_BR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return mean_and_variance(self.reduce(masked_moments(x_BR, mask_BR), "sum"))

    def _metrics(self, rollout: Rollout, non_score_BR: torch.Tensor, entropy_BR: torch.Tensor) -> dict[str, float]:
        """Means over episodes (of sums over valid tokens), over all processes."""
        episodes, mask_BR = rollout.episodes, rollout.episodes.mask_BR
        non_score_B = masked_sum(non_score_BR, mask_BR, 1)
        per_episode = {
            "objective/kl": masked_sum(rollout.logps_BR - rollout.ref_logps_BR, mask_BR, 1),
            "objective/entropy": masked_sum(-rollout.logps_BR, mask_BR, 1),
            "objective/non_score_reward": non_score_B,
            "objective/rlhf_reward": non_score_B + rollout.scores_B,
            "objective/scores": rollout.scores_B,
            "rollout/length": episodes.length_B,
            "rollout/eos_rate": episodes.finished_B,
            "rollout/entropy_per_token": masked_mean(entropy_BR, mask_BR, 1),
            "scores_squared": rollout.scores_B.square(),
        }
        sums = self.reduce(torch.stack([x.double().sum() for x in per_episode.values()]), "sum")
        n = self.config.rollout_batch_size
        metrics = {name: float(total) / n for name, total in zip(per_episode, sums, strict=True)}
        metrics["objective/scores_std"] = (
            max(metrics.pop("scores_squared") - metrics["objective/scores"] ** 2, 0) ** 0.5
        )
        metrics["val/num_eos_tokens"] = metrics["rollout/eos_rate"] * n
        metrics["tokens"] = metrics["rollout/length"] * n
        gap = torch.where(mask_BR, rollout.logps_BR - episodes.sampler_logps_BR, 0.0).abs().max()
        metrics["rollout/logprob_mismatch"] = float(self.reduce(gap, "max"))
        _, noise = self._moments(rollout.returns_BR - rollout.values_BR, mask_BR)
        _, spread = self._moments(rollout.returns_BR, mask_BR)
        metrics["value/explained_variance"] = float(1 - noise / spread.clamp(min=1e-12))
        return metrics

    def _samples(self, prompts: Prompts, texts: list[str], rollout: Rollout) -> list[dict[str, Any]]:
        kl_B = masked_sum(rollout.logps_BR - rollout.ref_logps_BR, rollout.episodes.mask_BR, 1)
        return [
            {
                "prompt": prompts.prompts[i],
                "completion": texts[i],
                "score": float(rollout.scores_B[i]),
                "kl": float(kl_B[i]),
                "length": int(rollout.episodes.length_B[i]),
                "finished": bool(rollout.episodes.finished_B[i]),
            }
            for i in range(min(self.config.num_log_samples, len(texts)))
        ]
