"""Who is who on the one base: where the value starts, what the reward's constants do, who changes and who never."""

from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification

from preftune.data.encode import encode_pairs
from preftune.models.adapters import AdapterSet
from preftune.models.generate import Generation
from preftune.models.lineage import read_lineage
from preftune.models.loading import load_model
from preftune.stages.ppo.rewards import Responses
from preftune.stages.ppo.rollout import make_episodes
from preftune.stages.ppo.trainer import PPOTrainer
from preftune.stages.reward import score, with_prompts
from preftune.stages.run import load_data, run_stage

from .tiny_ppo import rollout_of, settings, trainer, with_reward


@pytest.mark.checklist("P14")
def test_p14_without_a_reward_adapter_the_value_is_a_copy_of_the_policy_with_a_zero_head(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    rollout = rollout_of(made)
    assert rollout.values_BR is not None and not rollout.values_BR.any()
    with torch.no_grad():
        with made.adapters.using("default"):
            policy = made.trunk.hidden(rollout.episodes)
        with made.adapters.using("value"):
            assert torch.equal(made.trunk.hidden(rollout.episodes), policy)


@pytest.mark.checklist("P14")
@pytest.mark.parametrize(
    ("scale", "combination", "weight"), [("none", "sum", 0.5), ("std", "sum", 0.5), ("none", "ensemble", 0.5)]
)
def test_p14_the_value_starts_at_the_normalised_score(
    tmp_path: Path, scale: str, combination: str, weight: float
) -> None:
    made = with_reward(tmp_path, reward_scale=scale, reward_combination=combination, weight=weight)
    rollout = rollout_of(made)
    episodes = rollout.episodes
    with torch.no_grad(), made.adapters.using("value"):
        hidden = made.trunk.hidden(episodes)
    last = hidden[torch.arange(8), episodes.start_B + episodes.length_B - 1]
    torch.testing.assert_close(made.adapters.heads["value"](last[:, None])[:, 0], rollout.scores_B, rtol=0, atol=1e-5)
    assert rollout.values_BR is not None
    assert rollout.scores_B.std() > 0.01 and rollout.values_BR.abs().max() > 0.01


@pytest.mark.checklist("P22")
def test_p22_the_lineages_mean_is_subtracted_from_the_raw_score(tmp_path: Path) -> None:
    centred = rollout_of(with_reward(tmp_path, mean=0.4)).scores_B
    raw = rollout_of(with_reward(tmp_path, mean=0.4, normalize_rewards=False)).scores_B
    torch.testing.assert_close(centred, raw - 0.4, rtol=0, atol=1e-6)
    scaled = rollout_of(with_reward(tmp_path, mean=0.4, std=2.0, reward_scale="std")).scores_B
    torch.testing.assert_close(scaled, (raw - 0.4) / 2, rtol=0, atol=1e-6)
    limit = float(centred.abs().median())
    clipped = rollout_of(with_reward(tmp_path, mean=0.4, reward_clip=limit)).scores_B
    assert clipped.abs().max() == pytest.approx(limit) and (clipped == centred).any()


@pytest.mark.checklist("P22")
def test_p22_reference_responses_score_zero_on_average_and_plain_peft_gives_the_raw_score(
    make_job, sft_folder: Path, tokenizer, tmp_path: Path
) -> None:
    """From a reward stage to PPO: the constants are in the adapter's lineage and nowhere else."""
    job = make_job("reward", parent=sft_folder, held_out=0.4, train={"max_steps": 4, "learning_rate": 1e-2})
    run_stage(job)
    adapters = AdapterSet.create(load_model(job.base), job.base, job.lora, sft_folder)
    args = settings(tmp_path / "ppo")
    made = PPOTrainer(adapters, None, args, [{"prompt": "a"}], None, tokenizer, reward_adapter=job.output_dir)
    held = load_data(job, encode_pairs, tokenizer).held
    assert held is not None
    chosen = held["chosen_ids"][:]
    generation = Generation(chosen, [[0.0] * len(row) for row in chosen], [True] * len(chosen))
    episodes = make_episodes(held["prompt_ids"][:], generation, tokenizer.pad_token_id, torch.device("cpu"))
    empty = [""] * len(chosen)
    scores_B = made.scoring(Responses(episodes, [*empty], empty, {}))
    assert scores_B.mean().abs() < 1e-5 and scores_B.std() > 1e-3

    alone = AutoPeftModelForSequenceClassification.from_pretrained(job.output_dir, num_labels=1, dtype=torch.float32)
    raw = torch.tensor(score(alone, with_prompts(held)["chosen_ids"][:], tokenizer.pad_token_id))
    reward = read_lineage(job.output_dir).reward
    assert reward is not None and abs(reward["mean"]) > 1e-3
    torch.testing.assert_close(raw, scores_B + reward["mean"], rtol=0, atol=1e-5)


@pytest.mark.checklist("P24")
def test_p24_the_reward_never_changes_under_training(tmp_path: Path) -> None:
    made = with_reward(tmp_path)
    roles = (None, "ref", "reward", "default", "value")
    before = {role: made.adapters.digest(role) for role in roles}
    made.train()
    assert {role for role in roles if made.adapters.digest(role) != before[role]} == {"default", "value"}


@pytest.mark.checklist("P24")
@pytest.mark.parametrize("value", ["separate", "shared"])
def test_p24_only_policy_and_value_change(tmp_path: Path, value: str) -> None:
    made = trainer(tmp_path, value=value)
    roles = [None, "ref", "default", *(["value"] if value == "separate" else [])]
    before = {role: made.adapters.digest(role) for role in roles}
    head = made.adapters.heads["value"].score.weight.detach().clone()
    made.train()
    changed = {role for role in roles if made.adapters.digest(role) != before[role]}
    assert changed == set(roles) - {None, "ref"}
    assert not torch.equal(head, made.adapters.heads["value"].score.weight)


@pytest.mark.checklist("P24")
def test_p24_only_policy_and_value_have_gradients_switched_on(tmp_path: Path) -> None:
    made = with_reward(tmp_path)
    ours = {id(p) for p in made.trainables.values()}
    everyone = [*made.adapters.model.parameters(), *(p for h in made.adapters.heads.values() for p in h.parameters())]
    assert {id(p) for p in everyone if p.requires_grad} == ours
    held = [p for group in made.create_optimizer().param_groups for p in group["params"]]
    assert len(held) == len(ours) and {id(p) for p in held} == ours
