"""The policy on prompts that it does not train on: drawn, scored and measured as in training, and nothing learned.

Every evaluation draws from the same random streams, which go by a prompt's place: two policies that agree say the same,
and what is measured does not depend on how many processes there are.

Legend of shape suffixes: B episodes of this process, R response positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from ...models.adapters import AdapterSet
from ...models.masked import masked_sum
from .config import OnPolicyConfig
from .method import Method
from .rewards import Responses, Scoring
from .rollout import Episodes, Prompts, Reduce, decode, generate, seed_of

Answer = Callable[..., Episodes]
"""As `rollout.generate` from its third argument on."""


@dataclass(frozen=True)
class HeldOut:
    """Prompts to evaluate on, and what they are answered and measured with.

    Attributes:
        measured: what is summed over each response's tokens besides.
        answer: who answers; None: the policy, in this process.
    """

    prompts: Prompts
    adapters: AdapterSet
    tokenizer: PreTrainedTokenizerBase
    scoring: Scoring
    method: Method
    reduce: Reduce
    measured: Callable[[Episodes], dict[str, torch.Tensor]] = lambda _: {}
    answer: Answer | None = None

    @torch.no_grad()
    def measure(self, args: OnPolicyConfig, kl_coef: float) -> dict[str, float]:
        """Means over the prompts of all processes, by the names that training logs.

        objective/scores: as in training, but for the running scale and the clip that follows it, which would make a
        later evaluation another measure. objective/kl: nats a response, estimated on the sampled tokens.
        """
        size = len(self.prompts)
        local = -(-size // args.world_size)
        places = range(args.process_index * local, (args.process_index + 1) * local)
        # every process has as many rows: those past the end are the last prompt's, and count nothing
        prompts = self.prompts.take([min(place, size - 1) for place in places])
        counts_B = torch.tensor([float(place < size) for place in places], dtype=torch.float64, device=args.device)
        seed = seed_of(args.seed, "evaluation")
        answer = self.answer or partial(generate, self.adapters, self.tokenizer)
        episodes = answer(prompts, args, seed=seed, first=places[0], device=args.device)
        found = self._scored(episodes, prompts, kl_coef) if self.scoring.scorers else {}
        found |= {"rollout/length": episodes.length_B, "rollout/eos_rate": episodes.finished_B}
        summed = self.measured(episodes)
        sums = self.reduce(
            torch.stack([(counts_B * x.double()).sum() for x in (*found.values(), *summed.values())]), "sum"
        )
        means = {name: float(total) / size for name, total in zip((*found, *summed), sums, strict=True)}
        means |= {name: means[name] / means["rollout/length"] for name in summed}
        if "scores_squared" in means:
            variance = means.pop("scores_squared") - means["objective/scores"] ** 2
            means["objective/scores_std"] = max(variance, 0.0) ** 0.5
        return means

    def _scored(self, episodes: Episodes, prompts: Prompts, kl_coef: float) -> dict[str, torch.Tensor]:
        """Of each response [B]: its score, and how far it has gone."""
        texts = decode(self.tokenizer, episodes.responses())
        responses = Responses(episodes, prompts.prompts, texts, prompts.column_lists(), prompts.rows)
        scores_B = self.scoring(responses, training=False)
        forwards = self.method.forwards(episodes)
        found = {"objective/scores": scores_B, "scores_squared": scores_B.square()}
        if forwards.ref_logps_BR is not None:
            kl_B = masked_sum(forwards.logps_BR - forwards.ref_logps_BR, episodes.mask_BR, 1)
            found |= {"objective/kl": kl_B, "objective/rlhf_reward": scores_B - kl_coef * kl_B}
        return found
