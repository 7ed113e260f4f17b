"""The KTO stage on a tiny random model."""

import pytest
import torch
from datasets import Dataset

from preftune.errors import UserError
from preftune.stages.kto import build_kto, with_kl_completions
from preftune.stages.run import run_stage


@pytest.mark.checklist("D1")
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_d01_starts_at_one_half(make_job, sft_folder, loss_type):
    stage = build_kto(make_job("kto", parent=sft_folder, method={"loss_type": loss_type}, train={"max_steps": 3}))
    before = {name: stage.adapters.digest(name) for name in ("default", "ref", None)}
    stage.trainer.train()
    history = stage.trainer.state.log_history
    assert history[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert history[0]["kl"] == pytest.approx(0, abs=1e-6)
    after = {name: stage.adapters.digest(name) for name in before}
    assert {name for name in before if before[name] != after[name]} == {"default"}


@pytest.mark.checklist("D1")
def test_d01_wrong_reference_stops_the_run(make_job, sft_folder):
    stage = build_kto(make_job("kto", parent=sft_folder))
    for name, parameter in stage.adapters.model.named_parameters():
        if ".ref." in name:
            parameter.data.zero_()
    with pytest.raises(RuntimeError, match="expected 0 within"):
        stage.trainer.train()


@pytest.mark.checklist("D4")
def test_d04_a_batch_of_one_is_refused_in_words(make_job):
    with pytest.raises(UserError, match=r"per_device_train_batch_size is 1.*apo_zero_unpaired"):
        build_kto(make_job("kto", train={"per_device_train_batch_size": 1}))


@pytest.mark.checklist("D4")
def test_d04_a_loss_without_z0_takes_a_batch_of_one(make_job):
    job = make_job("kto", method={"loss_type": "apo_zero_unpaired"}, train={"per_device_train_batch_size": 1})
    assert run_stage(job)["steps"] == 2


@pytest.mark.checklist("D4")
@pytest.mark.parametrize(("estimates", "z0", "loss"), [((-3.0, 1.0), 0.0, 0.5), ((5.0, 1.0), 3.0, 0.645656)])
def test_d04_z0_is_clamped_at_zero_and_detached(make_job, sft_folder, monkeypatch, estimates, z0, loss):
    method = {"beta": 0.2, "undesirable_weight": 0.0}
    trainer = build_kto(make_job("kto", parent=sft_folder, method=method)).trainer
    batch = next(iter(trainer.get_train_dataloader()))
    trained = torch.tensor(estimates).repeat(2).requires_grad_()
    # log-probs of the mismatched pairs, under the policy and then under the reference
    answers = iter([trained, torch.zeros(4)])
    monkeypatch.setattr(trainer, "_compute_kl_logps", lambda *_: next(answers))
    assert trainer.model is not None
    found = trainer.compute_loss(trainer.model.train(), batch)
    # at step 0 a good response costs 1 - sigmoid(-0.2 z0), whatever it says
    assert found.item() == pytest.approx(loss * batch["label"].float().mean().item(), abs=1e-6)
    assert trainer._metrics["train"]["kl"] == [pytest.approx(z0, abs=1e-6)]
    found.backward()
    assert trained.grad is None


def test_completions_rotate_within_their_block():
    rows = Dataset.from_dict({"completion_ids": [[1], [2], [3], [4], [5]]})
    assert with_kl_completions(rows, 3)["KL_completion_ids"][:] == [[3], [1], [2], [5], [4]]
    # a last block of one takes the row before it, never itself
    assert with_kl_completions(rows, 2)["KL_completion_ids"][:] == [[2], [1], [4], [3], [4]]


def test_pairs_serve_as_labels(make_job, pair_rows):
    assert run_stage(make_job("kto", rows=pair_rows[:4]))["steps"] == 2
