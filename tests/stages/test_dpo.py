"""The DPO stage on a tiny random model: where it starts, what changes, what its reference is."""

import math
from typing import Any

import pytest
import torch
from trl.trainer.dpo_config import DPOConfig

from preftune.errors import UserError
from preftune.models.dropout import dropout_rate
from preftune.models.lineage import read_lineage
from preftune.models.loading import load_model
from preftune.models.lora import LoraSpec
from preftune.stages.dpo import build_dpo
from preftune.stages.global_batch import ROWS
from preftune.stages.kto import build_kto
from preftune.stages.method_problems import dpo_problems
from preftune.stages.options import stage_config
from preftune.stages.run import run_stage

BETA = 0.2
START = {  # hand-computed at a zero margin
    "sigmoid": math.log(2),
    "hinge": 1.0,
    "ipo": 1 / (4 * BETA**2),
    "exo_pair": 0.5 * (math.log(0.5) - math.log(0.9)) + 0.5 * (math.log(0.5) - math.log(0.1)),
    "nca_pair": 2 * math.log(2),
    "robust": math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 2 * (0.5 / BETA) ** 2,
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * math.log(2) + 0.5,
    "sigmoid_norm": math.log(2),
    "sft": None,
}
SMOOTHED = {"exo_pair": 0.1, "robust": 0.1}


def first_batch(stage):
    stage.trainer.model.train()
    batch = next(iter(stage.trainer.get_train_dataloader()))
    return stage.trainer.compute_loss(stage.trainer.model, batch).item(), stage.trainer._metrics["train"]


@pytest.mark.checklist("D1")
@pytest.mark.parametrize("loss_type", START)
def test_d01_margin_is_zero_at_step_zero(make_job, sft_folder, loss_type):
    method = {"beta": BETA, "loss_type": loss_type}
    if loss_type in SMOOTHED:
        method["label_smoothing"] = SMOOTHED[loss_type]
    stage = build_dpo(make_job("dpo", parent=sft_folder, method=method))
    loss, metrics = first_batch(stage)
    for key in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
        assert abs(metrics[key][-1]) < 1e-6
    if (expected := START[loss_type]) is not None:
        assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.checklist("D1")
@pytest.mark.parametrize("from_parent", [True, False])
def test_d01_reference_is_the_frozen_parent(make_job, sft_folder, from_parent):
    stage = build_dpo(make_job("dpo", parent=sft_folder if from_parent else None, train={"max_steps": 3}))
    adapters, model = stage.adapters, stage.trainer.model
    assert model is not None
    batch = next(iter(stage.trainer.get_train_dataloader()))
    ids = batch["input_ids"]

    def logits(name):
        with torch.no_grad(), adapters.using(name):
            return model.eval()(ids, attention_mask=batch["attention_mask"]).logits.clone()

    default, reference, bare = (logits(name) for name in ("default", "ref", None))
    assert torch.equal(default, reference)
    assert torch.equal(default, bare) is not from_parent
    names = ("default", "ref", None)
    before = {name: adapters.digest(name) for name in names}
    stage.trainer.train()
    after = {name: adapters.digest(name) for name in names}
    assert {name for name in names if before[name] != after[name]} == {"default"}
    assert torch.equal(logits("ref"), reference)


@pytest.mark.checklist("D1")
def test_d01_wrong_reference_stops_the_run(make_job, sft_folder):
    stage = build_dpo(make_job("dpo", parent=sft_folder))
    for name, parameter in stage.adapters.model.named_parameters():
        if ".ref." in name:
            parameter.data.zero_()
    with pytest.raises(RuntimeError, match="expected 0 within"):
        stage.trainer.train()


@pytest.mark.checklist("D3")
def test_d03_ipo_averages_over_tokens_where_dpo_sums(make_job, sft_folder):
    stage = build_dpo(make_job("dpo", parent=sft_folder, method={"beta": BETA, "loss_type": ["sigmoid"]}))
    trainer, model = stage.trainer, stage.trainer.model
    assert model is not None
    with torch.no_grad():  # move the policy away from its reference
        for parameter in stage.adapters.parameters("default"):
            parameter.add_(0.02 * torch.randn_like(parameter))
    trainer._identity_checked = True
    batch = next(iter(trainer.get_train_dataloader()))
    del batch[ROWS]
    lengths = batch["completion_mask"].sum(1).chunk(2)
    row = next(i for i in range(len(lengths[0])) if lengths[0][i] != lengths[1][i])
    rows = [row, row + len(lengths[0])]
    one = {key: value[rows] for key, value in batch.items()}
    sigmoid = trainer.compute_loss(model, one).item()
    metrics = trainer._metrics["train" if model.training else "eval"]
    chosen, rejected = (metrics[f"rewards/{side}"][-1] / BETA for side in ("chosen", "rejected"))
    assert sigmoid == pytest.approx(math.log1p(math.exp(-BETA * (chosen - rejected))), rel=1e-5)
    trainer.loss_types = ["ipo"]
    gap = chosen / lengths[0][row].item() - rejected / lengths[1][row].item()
    ipo = trainer.compute_loss(model, one).item()
    assert math.sqrt(ipo) == pytest.approx(abs(gap - 2.5), rel=1e-4)  # 1 / (2 beta) = 2.5


def test_dropout_would_reach_the_reference_so_it_is_off_or_refused(make_job, sft_folder, caplog):
    lora = LoraSpec(r=4, alpha=8, dropout=0.3)
    stage = build_dpo(make_job("dpo", "off", parent=sft_folder, lora=lora))
    assert dropout_rate(stage.adapters.model) == 0 and "lora.dropout 0.3 is off here" in caplog.text
    with pytest.raises(UserError, match=r"dpo.train.disable_dropout: false, and the model drops at a rate of 0.3"):
        build_dpo(make_job("dpo", parent=sft_folder, lora=lora, train={"disable_dropout": False}))
    with pytest.raises(UserError, match="disable_dropout"):
        build_kto(make_job("kto", parent=sft_folder, lora=lora, train={"disable_dropout": False}))
    build_dpo(make_job("dpo", "nothing_to_drop", parent=sft_folder, train={"disable_dropout": False}))


def test_attention_that_keeps_its_rate_elsewhere_is_without_dropout_too(make_job, sft_folder, monkeypatch):
    def with_rate(*args, **kwargs):
        model = load_model(*args, **kwargs)
        model.config.attention_dropout = 0.2
        layer: Any
        for layer in model.modules():
            if hasattr(layer, "attention_dropout"):
                layer.attention_dropout = 0.2
        return model

    monkeypatch.setattr("preftune.stages.run.load_model", with_rate)
    stage = build_dpo(make_job("dpo", parent=sft_folder))
    assert dropout_rate(stage.adapters.model) == 0
    with pytest.raises(UserError, match="disable_dropout"):
        build_dpo(make_job("dpo", "on", parent=sft_folder, train={"disable_dropout": False}))


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", ["sigmoid", "sft"]])
def test_label_smoothing_that_no_loss_looks_at_is_refused(make_job, sft_folder, loss_type):
    method = {"beta": BETA, "loss_type": loss_type, "label_smoothing": 0.1}
    job = make_job("dpo", parent=sft_folder, method=method)
    (found,) = dpo_problems(job, stage_config(DPOConfig, job, held_out=False))
    assert str(found).startswith("stages.dpo.label_smoothing: 0.1 has no effect with loss_type")


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired", "robust", "exo_pair"])
def test_label_smoothing_changes_the_losses_that_take_it(make_job, sft_folder, loss_type):
    losses = []
    for smoothing in (0.1, 0.3):
        method = {"beta": BETA, "loss_type": loss_type, "label_smoothing": smoothing}
        stage = build_dpo(make_job("dpo", f"at{smoothing}", parent=sft_folder, method=method))
        with torch.no_grad():
            for number, parameter in enumerate(stage.adapters.parameters("default")):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        stage.trainer._identity_checked = True
        losses.append(first_batch(stage)[0])
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.checklist("D8")
def test_d08_accumulation_does_not_change_the_step(make_job, sft_folder):
    saved = []
    for name, batch, accumulation in (("whole", 8, 1), ("parts", 1, 8)):
        train = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        job = make_job("dpo", name, parent=sft_folder, train={**train, "optim": "sgd", "learning_rate": 0.1})
        stage = build_dpo(job)
        stage.trainer.train()
        saved.append([parameter.detach().clone() for parameter in stage.adapters.parameters("default")])
    for whole, parts in zip(*saved, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-7)


def test_a_run_learns_and_names_its_parent(make_job, sft_folder):
    job = make_job("dpo", parent=sft_folder, method={"beta": 0.5}, train={"max_steps": 8, "learning_rate": 5e-3})
    metrics = run_stage(job)
    assert metrics["final_loss"] < 0.6
    lineage = read_lineage(job.output_dir)
    assert [parent["stage"] for parent in lineage.parents] == ["sft"]
    assert not (job.output_dir / "ref").exists()
