"""A loss, a gradient or a weight that is no number ends the stage in words, with the step and the rows."""

from pathlib import Path

import pytest
import torch

from preftune.errors import UserError
from preftune.models.adapters import AdapterSet
from preftune.stages.dpo import build_dpo
from preftune.stages.kto import build_kto
from preftune.stages.reward import build_reward
from preftune.stages.run import run_stage
from preftune.stages.sft import build_sft

from .tiny_ppo import tiny, trainer


@pytest.mark.parametrize("build", [build_sft, build_reward, build_dpo, build_kto])
def test_a_loss_that_is_no_number_names_step_and_rows(make_job, build, monkeypatch) -> None:
    kind = build.__name__.removeprefix("build_")
    job = make_job(kind, train={"per_device_train_batch_size": 2})
    stage = build(job)
    trainer, honest = stage.trainer, stage.trainer.compute_loss
    trainer.came_from(job, stage.data.train, stage.data.origins)
    monkeypatch.setattr(trainer, "compute_loss", lambda *given, **more: honest(*given, **more) * float("nan"))
    place = rf"stages\.{kind}: step 1: the loss is nan on the rows .*{kind}\.jsonl:\d+, "
    with pytest.raises(UserError, match=place):
        trainer.train()


def test_a_gradient_that_is_not_finite_stops_before_the_step(make_job) -> None:
    job = make_job("sft")
    stage = build_sft(job)
    stage.trainer.came_from(job, stage.data.train, stage.data.origins)
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


def test_steps_that_are_not_finite_are_left_out_up_to_a_number(make_job) -> None:
    """Steps 2 and 3 of four are NaN: with two allowed the stage ends as if they were not, with one it stops."""

    def run(allowed: int, name: str):
        job = make_job("sft", name, nonfinite_skips=allowed, train={"max_steps": 4, "per_device_train_batch_size": 2})
        stage = build_sft(job)
        trainer, honest = stage.trainer, stage.trainer.compute_loss
        trainer.came_from(job, stage.data.train, stage.data.origins)
        ill = (1, 2)
        trainer.compute_loss = lambda *given, **more: (
            honest(*given, **more) * (float("nan") if trainer.state.global_step in ill else 1.0)
        )
        return stage

    stage = run(2, "two")
    stage.trainer.train()
    logged = [entry.get("nonfinite_skipped") for entry in stage.trainer.state.log_history]
    assert logged[:4] == [None, 1, 2, None]
    assert all(torch.isfinite(weight).all() for weight in stage.adapters.parameters("default"))
    assert isinstance(stage.trainer.optimizer, torch.optim.Optimizer)
    moments = stage.trainer.optimizer.state_dict()["state"]
    assert {int(each["step"]) for each in moments.values()} == {2}

    stage = run(1, "one")
    with pytest.raises(UserError, match=r"stages\.one: step 3: the loss is nan .* after 1 steps that were left out"):
        stage.trainer.train()


def test_ppo_leaves_out_a_minibatch_that_is_not_finite(tmp_path: Path) -> None:
    made = trainer(tmp_path, reward=lambda completions, **_: [1.0] * len(completions))
    made.skips.allowed = 1
    calls = []

    def once(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * (float("nan") if len(calls) == 1 else 1.0)

    made.adapters.parameters("default")[0].register_hook(once)
    made.train()
    assert made.skips.done == 1 and len(calls) > 1
    assert any(entry.get("nonfinite_skipped") == 1 for entry in made.state.log_history)


@pytest.mark.parametrize(
    ("kind", "train", "method"),
    [
        *((kind, {"learning_rate": 1e6}, {}) for kind in ("sft", "reward", "dpo", "kto")),
        ("dpo", {}, {"beta": 1e38}),
        ("kto", {}, {"beta": 1e38}),
    ],
)
def test_a_stage_that_diverges_is_not_done(make_job, sft_folder: Path, kind: str, train: dict, method: dict) -> None:
    parent = None if kind == "sft" else sft_folder
    job = make_job(kind, parent=parent, train={"max_steps": 6, **train}, method=method)
    with pytest.raises(
        UserError, match=rf"stages\.{kind}: step \d: (the loss|the gradient's norm) is (nan|inf) on the"
    ):
        run_stage(job)
    assert not (job.output_dir / "adapter_model.safetensors").exists()
