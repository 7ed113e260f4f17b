"""The on-policy loop with another method than PPO: no value, an advantage within groups, a loss of its own."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from preftune.models.masked import masked_sum
from preftune.stages.losses import ppo_policy_loss
from preftune.stages.ppo.config import OnPolicyConfig
from preftune.stages.ppo.method import Forwards, Step
from preftune.stages.ppo.network import Trunk
from preftune.stages.ppo.rewards import RewardSource, Scorer, Scores
from preftune.stages.ppo.rollout import Episodes, Rollout
from preftune.stages.ppo.trainer import OnPolicyTrainer

from .collecting import collect
from .tiny_ppo import PROMPTS, TOKENIZER, letters, settings, tiny

GROUP = 4


class LeaveOneOut:
    """A response's advantage is its score less the mean score of the group's others (RLOO, arXiv 2402.14740)."""

    statistics: tuple[str, ...] = ("loss", "ratio", "approx_kl", "abs_log_ratio")
    samples_per_prompt: int = GROUP

    def __init__(self, config: OnPolicyConfig, trunk: Trunk) -> None:
        self.config, self.trunk = config, trunk
        self.trainables: dict[str, nn.Parameter] = {
            f"policy.{i}": p for i, p in enumerate(trunk.adapters.parameters("default"))
        }

    def clip(self, clip: Callable[[list[nn.Parameter]], float]) -> dict[str, float]:
        return {"policy": clip(list(self.trainables.values()))}

    def learning_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        return [(list(self.trainables.values()), self.config.learning_rate)]

    @torch.no_grad()
    def forwards(self, episodes: Episodes) -> Forwards:
        found = []
        for role in ("default", "ref"):
            with self.trunk.adapters.using(role):
                found.append(self.trunk.logprobs(self.trunk.hidden(episodes), episodes))
        return Forwards(found[0].logps_BR, found[1].logps_BR, found[0].entropy_BR)

    def rollout(self, episodes: Episodes, forwards: Forwards, rewards_BR: torch.Tensor, scores: Scores) -> Rollout:
        totals_BG = rewards_BR.sum(1).view(-1, GROUP)
        others_BG = (totals_BG.sum(1, keepdim=True) - totals_BG) / (GROUP - 1)
        advantages_BR = torch.where(episodes.mask_BR, (totals_BG - others_BG).view(-1, 1), 0.0)
        return Rollout(episodes, forwards.logps_BR, forwards.ref_logps_BR, advantages_BR, scores.total_B)

    def rollout_metrics(self, rollout: Rollout) -> dict[str, float]:
        return {"group/spread": float(rollout.scores_B.view(-1, GROUP).std(1).mean())}

    def backward(self, part: Rollout, step: Step, kl_coef: float) -> torch.Tensor:
        mask_BR = part.episodes.mask_BR
        with self.trunk.adapters.using("default"):
            now_BR = self.trunk.logprobs(self.trunk.hidden(part.episodes), part.episodes).logps_BR
            found = ppo_policy_loss(
                now_BR, part.logps_BR, part.advantages_BR, mask_BR, cliprange=0.2, denominator=step.tokens
            )
            found.loss.backward()
        gap = masked_sum((now_BR.detach() - part.logps_BR).abs(), mask_BR)
        return torch.stack([x.detach().double() for x in (found.loss * step.tokens, found.ratio, found.approx_kl, gap)])

    def update_metrics(self, mean: dict[str, float]) -> dict[str, float]:
        return {"loss/policy_avg": mean["loss"], "val/ratio": mean["ratio"]}


class GroupTrainer(OnPolicyTrainer):
    def build_method(self, sources: Sequence[RewardSource], scorers: Sequence[Scorer]) -> LeaveOneOut:
        return LeaveOneOut(self.args, self.trunk)


def make(folder: Path, **options: Any) -> GroupTrainer:
    args = settings(folder, **options)
    return GroupTrainer(tiny(), letters, args, PROMPTS, PROMPTS, TOKENIZER, quiet=True)


def test_a_group_answers_one_prompt_and_its_advantages_add_up_to_nothing(tmp_path: Path) -> None:
    made = make(tmp_path)
    rollout = collect(made, kl_coef=0.0).rollout
    starts = rollout.episodes.start_B.view(-1, GROUP)
    prompts = [
        tuple(row[:start].tolist()) for row, start in zip(rollout.episodes.input_ids_BT, starts.flatten(), strict=True)
    ]
    assert [len(set(prompts[i : i + GROUP])) for i in (0, GROUP)] == [1, 1] and len(set(prompts)) == 2
    # the same prompt, another response each
    assert len({tuple(each) for each in rollout.episodes.responses()}) > 2
    advantage_BG = rollout.advantages_BR[:, 0].view(-1, GROUP)
    torch.testing.assert_close(advantage_BG.sum(1), torch.zeros(2), atol=1e-6, rtol=0)
    first, *others = rollout.scores_B[:GROUP].tolist()
    assert float(advantage_BG[0, 0]) == pytest.approx(first - sum(others) / (GROUP - 1), abs=1e-6)
    assert rollout.values_BR is None and "value" not in made.adapters.names


def test_it_trains_logs_saves_and_resumes_exactly(tmp_path: Path) -> None:
    def digest(trainer: GroupTrainer) -> str:
        return trainer.adapters.digest("default")

    options = {"save_strategy": "steps", "save_steps": 5, "total_episodes": 24}
    whole = make(tmp_path / "whole", **options)
    start = digest(whole)
    whole.train()
    logged = [each for each in whole.state.log_history if "objective/kl" in each]
    assert len(logged) == 3 and all("group/spread" in each and "policy/grad_norm" in each for each in logged)
    assert not any(name.startswith("value/") for name in logged[0])
    resumed = make(tmp_path / "whole", **options)
    # between two minibatches of the second iteration
    resumed.train(str(tmp_path / "whole" / "checkpoint-5"))
    assert digest(resumed) == digest(whole) != start
