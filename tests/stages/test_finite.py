"""A loss, a gradient or a weight that is no number ends the stage in words, with the step and the rows."""

from pathlib import Path

import pytest
import torch

from preftune.errors import UserError
from preftune.models.adapters import AdapterSet
from preftune.stages.dpo import build_dpo
from preftune.stages.kto import build_kto
from preftune.stages.reward import build_reward
from preftune.stages.sft import build_sft

from .tiny_ppo import tiny, trainer


@pytest.mark.parametrize("build", [build_sft, build_reward, build_dpo, build_kto])
def test_a_loss_that_is_no_number_names_step_and_rows(make_job, build, monkeypatch) -> None:
    kind = build.__name__.removeprefix("build_")
    stage = build(make_job(kind, train={"per_device_train_batch_size": 2}))
    trainer, honest = stage.trainer, stage.trainer.compute_loss
    trainer.came_from(kind, stage.data.train, stage.data.origins)
    monkeypatch.setattr(trainer, "compute_loss", lambda *given, **more: honest(*given, **more) * float("nan"))
    place = rf"stages\.{kind}: step 1: the loss is nan on the rows .*{kind}\.jsonl:\d+, "
    with pytest.raises(UserError, match=place):
        trainer.train()


def test_a_gradient_that_is_not_finite_stops_before_the_step(make_job) -> None:
    stage = build_sft(make_job("sft"))
    stage.trainer.came_from("sft", stage.data.train, stage.data.origins)
    weight = stage.adapters.parameters("default")[0]
    weight.register_hook(lambda gradient: gradient * float("inf"))
    before = stage.adapters.digest("default")
    with pytest.raises(UserError, match=r"stages\.sft: step 1: the gradient's norm is (nan|inf) on the rows .*sft"):
        stage.trainer.train()
    assert stage.adapters.digest("default") == before


def test_rows_are_named_by_where_they_come_from(make_job) -> None:
    from preftune.stages.finite import rows_of

    stage = build_dpo(make_job("dpo", train={"per_device_train_batch_size": 2}))
    batch = stage.trainer.data_collator([stage.data.train[i] for i in (3, 5)])
    origins = [f"file:{i}" for i in range(len(stage.data.train))]
    assert rows_of(batch, stage.data.train, origins) == "the rows file:3, file:5"
    assert rows_of(batch, stage.data.train, ()) == "rows of unknown origin"


def test_ppo_stops_at_a_gradient_that_is_no_number(tmp_path: Path) -> None:
    made = trainer(tmp_path, reward=lambda completions, **_: [1.0] * len(completions))
    made.adapters.parameters("default")[0].register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(UserError, match=r"step 1: the gradient's norm is nan on minibatch 1 of iteration 1 \(prompts"):
        made.train()


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    adapters: AdapterSet = tiny()
    with torch.no_grad():
        adapters.parameters("default")[0][0, 0] = float("inf")
    with pytest.raises(UserError, match=r"1 of the adapter's \d+ weights are not finite"):
        adapters.save("default", tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()
