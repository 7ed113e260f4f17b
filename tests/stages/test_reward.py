"""The reward stage on a tiny random model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from trl.trainer.reward_config import RewardConfig

from preftune.data.encode import encode_pairs
from preftune.models.lineage import read_lineage
from preftune.models.reward_model import create_reward_model, load_reward_model
from preftune.stages.metrics import length_baselines, mean_std, pair_accuracy
from preftune.stages.options import stage_config
from preftune.stages.reward import RewardStageTrainer, score, with_prompts
from preftune.stages.run import load_data, run_stage

ROWS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16, 17, 18]]


@pytest.fixture
def reward_folder(make_job, sft_folder):
    job = make_job("reward", parent=sft_folder, held_out=0.4, train={"max_steps": 8, "learning_rate": 1e-2})
    return job, run_stage(job)


def test_it_learns_and_measures(reward_folder):
    job, metrics = reward_folder
    assert metrics["final_loss"] < 0.69
    assert 0 <= metrics["held_out_accuracy"] <= 1
    assert metrics["held_out_longer_wins"] + metrics["held_out_shorter_wins"] == pytest.approx(1)
    assert metrics["eval_loss"] > 0
    assert read_lineage(job.output_dir).reward == {
        "mean": metrics["reference_reward_mean"],
        "std": metrics["reference_reward_std"],
    }


@pytest.mark.checklist("R1")
def test_r01_the_head_is_saved_and_loads_alone(reward_folder, tokenizer):
    job, _ = reward_folder
    ours = score(load_reward_model(job.output_dir, job.base, tokenizer), ROWS, tokenizer.pad_token_id)
    alone = AutoPeftModelForSequenceClassification.from_pretrained(job.output_dir, num_labels=1, dtype=torch.float32)
    alone.config.pad_token_id = tokenizer.pad_token_id
    assert score(alone, ROWS, tokenizer.pad_token_id) == pytest.approx(ours, abs=1e-5)
    fresh = create_reward_model(job.base, tokenizer, job.lora, job.parent)
    assert score(fresh, ROWS, tokenizer.pad_token_id) != pytest.approx(ours, abs=1e-3)


@pytest.mark.checklist("R3")
def test_r03_padding_changes_no_score(base, tokenizer, make_job):
    model = create_reward_model(base, tokenizer, make_job("reward").lora).eval()
    pad = tokenizer.pad_token_id
    together = score(model, ROWS, pad, batch_size=3)
    apart = score(model, ROWS, pad, batch_size=1)
    assert together == pytest.approx(apart, abs=1e-5)
    length = max(map(len, ROWS)) + 5
    left = torch.tensor([[pad] * (length - len(row)) + row for row in ROWS])
    with torch.no_grad():
        logits = model(input_ids=left, attention_mask=(left != pad).long(), use_cache=False).logits
    assert logits.squeeze(-1).tolist() == pytest.approx(together, abs=1e-5)


@pytest.mark.checklist("R4")
@pytest.mark.parametrize(
    ("margins", "coefficient", "loss"),
    [
        # chosen 2 and 1, rejected 0 and 3: -log sigmoid(2) = 0.126928, -log sigmoid(-2) = 2.126928
        (None, 0.0, (0.126928 + 2.126928) / 2),
        # less the margins: -log sigmoid(1) = 0.313262, -log sigmoid(-2.5) = 2.578889
        ([1.0, 0.5], 0.0, (0.313262 + 2.578889) / 2),
        # the sums of a pair's scores, 2 and 4, squared
        (None, 0.01, (0.126928 + 2.126928) / 2 + 0.01 * (4 + 16) / 2),
    ],
)
def test_r04_margin_and_centring_by_hand(make_job, tokenizer, pair_rows, margins, coefficient, loss):
    rows = [{**row, "margin": margin} for row, margin in zip(pair_rows, margins or (), strict=False)]
    method = {"center_rewards_coefficient": coefficient}
    train = {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    job = make_job("reward", rows=rows or pair_rows[:2], method=method, train=train)
    trainer = RewardStageTrainer(
        model=create_reward_model(job.base, tokenizer, job.lora),
        args=stage_config(RewardConfig, job, held_out=False),
        train_dataset=with_prompts(load_data(job, encode_pairs, tokenizer).train),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))

    class Scored(torch.nn.Module):
        def forward(self, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.tensor([[2.0], [1.0], [0.0], [3.0]]))

    found = trainer.compute_loss(Scored(), batch)
    assert isinstance(found, torch.Tensor) and found.item() == pytest.approx(loss, abs=1e-5)


@pytest.mark.checklist("R4")
def test_r04_centring_is_on_at_one_hundredth_unless_said_otherwise(reward_folder):
    job, _ = reward_folder
    assert read_lineage(job.output_dir).config["train"]["center_rewards_coefficient"] == 0.01


@pytest.mark.checklist("R5")
def test_r05_a_tie_counts_one_half():
    assert pair_accuracy([1.0] * 7, [1.0] * 7) == 0.5
    assert pair_accuracy([1.0, 2.0, 0.0, 3.0], [0.0, 2.0, 1.0, 3.0]) == 0.5
    assert pair_accuracy([1.0, 2.0], [0.0, 2.0]) == 0.75


@pytest.mark.checklist("R6")
def test_r06_length_alone_is_a_baseline():
    assert length_baselines([3, 2, 5, 1], [1, 4, 5, 0]) == {"longer_wins": 0.625, "shorter_wins": 0.375}


@pytest.mark.checklist("P22")
def test_p22_the_stored_mean_is_that_of_reference_responses(reward_folder, tokenizer):
    job, _ = reward_folder
    pairs = load_data(job, encode_pairs, tokenizer).held
    assert pairs is not None
    held = with_prompts(pairs)
    model = load_reward_model(job.output_dir, job.base, tokenizer)
    raw = score(model, held["chosen_ids"][:], tokenizer.pad_token_id)
    stored = read_lineage(job.output_dir).reward
    assert stored is not None
    assert mean_std([value - stored["mean"] for value in raw])["mean"] == pytest.approx(0, abs=1e-5)
    assert mean_std(raw)["std"] == pytest.approx(stored["std"], rel=1e-4)
