"""The SFT stage on a tiny random model."""

import json

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM

from preftune.models.adapters import AdapterSet
from preftune.stages.run import run_stage
from preftune.stages.sft import build_sft


def test_the_loss_falls_and_only_the_adapter_changes(make_job):
    job = make_job("sft", train={"max_steps": 12, "learning_rate": 1e-2})
    stage = build_sft(job)
    before = {name: stage.adapters.digest(name) for name in ("default", None)}
    stage.trainer.train()
    losses = [entry["loss"] for entry in stage.trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]
    assert stage.adapters.digest("default") != before["default"]
    assert stage.adapters.digest(None) == before[None]


def test_the_last_step_is_logged_though_the_logs_pass_it_by(make_job):
    job = make_job("sft", train={"max_steps": 3, "logging_steps": 2, "learning_rate": 1e-2})
    metrics = run_stage(job)
    rows = [json.loads(line) for line in (job.output_dir / "log.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert list(losses) == [1, 2, 3]
    assert metrics["final_loss"] == losses[3]


def test_every_row_trains_its_eos(make_job):
    stage = build_sft(make_job("sft"))
    assert isinstance(stage.trainer.train_dataset, Dataset)
    for row in stage.trainer.train_dataset:
        assert isinstance(row, dict)
        trained = [token for token in row["labels"] if token != -100]
        assert trained[-1] == stage.tokenizer.eos_token_id
        assert row["labels"][0] == -100


def test_saved_adapter_loads_with_plain_peft(make_job):
    job = make_job("sft")
    metrics = run_stage(job)
    assert sorted(file.name for file in job.output_dir.iterdir() if file.is_dir()) == []
    ids = torch.randint(5, 100, (2, 9))
    loaded = AutoPeftModelForCausalLM.from_pretrained(job.output_dir).eval()
    from preftune.models.loading import load_model

    ours = AdapterSet.create(load_model(job.base), job.base, job.lora, job.output_dir)
    with torch.no_grad(), ours.using("default"):
        mine = ours.model.eval()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, mine, rtol=1e-5, atol=1e-5)
        with ours.using(None):
            assert (ours.model(ids).logits - mine).abs().max() > 1e-4
    written = json.loads((job.output_dir / "metrics.json").read_text())
    assert written == metrics
    for key in ("train_seconds", "examples_per_second", "tokens_per_second", "peak_memory_bytes", "train_loss"):
        assert written[key] > 0


@pytest.mark.checklist("D8")
def test_d08_accumulation_does_not_change_the_step(make_job):
    saved = []
    for name, batch, accumulation in (("whole", 8, 1), ("parts", 1, 8)):
        train = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        # SGD: Adam's sign-like first steps would enlarge rounding
        stage = build_sft(make_job("sft", name, train={**train, "optim": "sgd", "learning_rate": 0.1}))
        stage.trainer.train()
        saved.append([parameter.detach().clone() for parameter in stage.adapters.parameters("default")])
    for whole, parts in zip(*saved, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-7)


@pytest.mark.checklist("D6")
def test_d06_packed_rows_do_not_see_each_other(make_job):
    losses = []
    for name, packing in (("padded", False), ("packed", True)):
        train = {"packing": packing, "per_device_train_batch_size": 12, "max_steps": 1}
        stage = build_sft(make_job("sft", name, train=train))
        stage.trainer.train()
        losses.append(stage.trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
