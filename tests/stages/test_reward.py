"""The reward stage on a tiny random model."""

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification

from preftune.data.encode import encode_pairs
from preftune.models.lineage import read_lineage
from preftune.models.reward_model import create_reward_model, load_reward_model
from preftune.stages.job import load_data, run_stage
from preftune.stages.metrics import length_baselines, mean_std, pair_accuracy
from preftune.stages.reward import score, with_prompts

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
    assert score(alone, ROWS, tokenizer.pad_token_id) == pytest.approx(ours, abs=1e-6)
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
def test_r04_margin_and_centring_enter_the_loss(make_job, sft_folder, pair_rows):
    losses = {}
    for name, coefficient, margin in (("plain", 0.0, None), ("centred", 0.5, None), ("margin", 0.0, 2.0)):
        rows = [{**row, "margin": margin} if margin else row for row in pair_rows]
        method = {"center_rewards_coefficient": coefficient}
        train = {"max_steps": 1, "per_device_train_batch_size": 12}
        losses[name] = run_stage(make_job("reward", name, parent=sft_folder, rows=rows, method=method, train=train))
    assert losses["centred"]["train_loss"] > losses["plain"]["train_loss"]
    assert losses["margin"]["train_loss"] > losses["plain"]["train_loss"] + 1


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
    held = with_prompts(load_data(job, "pair", encode_pairs, tokenizer).held)
    model = load_reward_model(job.output_dir, job.base, tokenizer)
    raw = score(model, held["chosen_ids"][:], tokenizer.pad_token_id)
    stored = read_lineage(job.output_dir).reward
    assert mean_std([value - stored["mean"] for value in raw])["mean"] == pytest.approx(0, abs=1e-5)
    assert mean_std(raw)["std"] == pytest.approx(stored["std"], rel=1e-4)
