"""Every field of every config: in the table, with its effect, or refused in words."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.kto_config import KTOConfig
from trl.trainer.reward_config import RewardConfig
from trl.trainer.sft_config import SFTConfig

from preftune.errors import UserError
from preftune.stages import fields, sft
from preftune.stages.check import stage_problems
from preftune.stages.fields import FIELDS, PARAMETER, fields_of
from preftune.stages.kinds import KINDS
from preftune.stages.options import stage_config, word_problems
from preftune.stages.ppo.config import PPOConfig
from preftune.stages.ppo.rewards import RewardSource
from preftune.stages.run import run_stage
from preftune.stages.trainers import stage_callbacks

CONFIGS = (TrainingArguments, SFTConfig, RewardConfig, DPOConfig, KTOConfig, PPOConfig)
KIND_OF = {kind.config.rpartition(":")[2]: kind for kind in KINDS.values()}
# a value that means something for each meaning, and one that is none
GOOD_BAD = {
    fields.RATE: (0.25, -1), fields.ABOVE_0: (0.5, 0), fields.BELOW_1: (0.5, 1), fields.COUNT: (3, 0),
    fields.COUNT_OR_0: (1, -1), fields.LIMIT: (4, 0), fields.STEPS: (0.5, 0), fields.WARMUP: (0.5, -5),
    fields.SEED: (3, -1), fields.FLAG: (True, "yes"), fields.TEXT: ("linear", 3), fields.TEXTS: ("none", 3),
    fields.SETTINGS: ({}, 3), fields.TEXT_OR_SETTINGS: ({}, 3), fields.MULTIPLE: (8, 0),
}  # fmt: skip


def job_with(make_job, kind: str, train: dict):
    """A job of that kind that says nothing else."""
    return dataclasses.replace(make_job("sft"), name=kind, kind=kind, train=train)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_of_the_installed_version_stands_in_the_table(config: type):
    there = {each.name for each in dataclasses.fields(config) if each.init}
    assert set(FIELDS[config.__name__]) == there, "a library's new version: say what becomes of the field"


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "TrainingArguments"])
def test_every_field_takes_what_it_should_and_refuses_the_rest(make_job, name: str):
    kind = KIND_OF[name]
    for key, field in FIELDS[name].items():
        if field is PARAMETER:
            assert any(each.name == key and each.of_config for each in kind.parameters), key
            continue
        if field.state != "works":
            assert field.says, key
            (error,) = word_problems(job_with(make_job, kind.name, {key: "x"}))
            assert error.where == f"stages.{kind.name}.train.{key}" and error.remedy == field.says
            continue
        good, bad = GOOD_BAD.get(field.meaning, (None, None))
        if good is not None:
            assert word_problems(job_with(make_job, kind.name, {key: good})) == [], key
            for wrong in (bad, [1e-4], *([float("nan"), True] if field.meaning.number else [])):
                (error,) = word_problems(job_with(make_job, kind.name, {key: wrong}))
                assert field.meaning.words in error.problem, (key, wrong)
        assert (word_problems(job_with(make_job, kind.name, {key: None})) == []) == (
            field.optional or field.meaning is fields.OPEN
        ), key


def test_the_written_table_is_this_one():
    assert fields.FILE.read_text(encoding="utf-8") == fields.table(), "run python -m preftune.stages.fields"


def test_a_method_of_ones_own_may_add_fields():
    @dataclasses.dataclass
    class MyConfig(SFTConfig):
        spice: float = 1.0

    known = fields_of(MyConfig)
    assert known["spice"].state == "works" and known["max_length"].state == "elsewhere"


@pytest.mark.parametrize(
    ("kind", "train", "said"),
    [
        ("sft", {"optim": "magic"}, "optim"),
        ("sft", {"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
        ("sft", {"report_to": "wandbb"}, "did you mean 'wandb'"),
        ("sft", {"report_to": "swanlab"}, "pip install swanlab"),
        ("sft", {"use_liger_kernel": True}, "pip install liger-kernel"),
        ("sft", {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycels": 1}}, "num_cycels"),
        ("sft", {"neftune_noise_alpha": 5}, "set model.packed to false"),
        ("sft", {"logging_dir": "x"}, "RUN/<stage>/runs"),
        ("sft", {"lr": 1}, "write learning_rate"),
        ("sft", {"learning_rate": None}, "leave it out for the default"),
        ("sft", {"router_aux_loss_coef": 0.1}, "no mixture of experts"),
        ("sft", {"packing": True, "packing_strategy": "wrapped"}, "bfd or bfd_split"),
        ("sft", {"push_to_hub": True, "hub_model_id": "x/y"}, "and so does hub_model_id"),
        ("reward", {"train_sampling_strategy": "group_by_length"}, "a reward stage cannot do"),
        ("kto", {"per_device_train_batch_size": 1}, "use a batch of 2 or more"),
        ("kto", {"train_sampling_strategy": "random"}, "z0 pairs neighbours"),
        ("dpo", {"loss_type": "magic"}, "'sigmoid'"),
    ],
)
def test_what_the_run_would_refuse_is_found_before(make_job, monkeypatch, kind, train, said):
    monkeypatch.setattr("preftune.stages.check._installed", lambda module: False)
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    problems = stage_problems(job_with(make_job, kind, train))
    assert len(problems) == 1 and said in str(problems[0]), problems
    assert problems[0].where.startswith(f"stages.{kind}.train")


def _lengths(completions, **_):
    return [float(len(each)) for each in completions]


@pytest.mark.parametrize(
    ("kind", "method", "said"),
    [
        ("dpo", {"label_smoothing": 0.1}, "has no effect with loss_type"),
        ("dpo", {"discopop_tau": 0.1}, "has no effect without loss_type discopop"),
        ("dpo", {"f_alpha_divergence_coef": 0.2}, "has no effect without f_divergence_type"),
        ("dpo", {"f_divergence_type": "js_divergence", "loss_type": "nca_pair"}, "nca_pair has no form of"),
        ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "same length"),
        ("ppo", {"kl_horizon": 50}, "has no effect without kl.target"),
        ("ppo", {"ensemble_penalty": 2.0}, "has no effect without reward_combination"),
    ],
)
def test_a_parameter_that_would_do_nothing_is_refused(make_job, kind, method, said):
    job = dataclasses.replace(job_with(make_job, kind, {}), method=method)
    job = dataclasses.replace(job, rewards=(RewardSource("function", _lengths),)) if kind == "ppo" else job
    (error,) = stage_problems(job)
    assert said in str(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU cannot do")
@pytest.mark.parametrize("key", ["fp16", "activation_offloading"])
def test_what_needs_a_gpu_is_refused_without_one(make_job, key):
    (error,) = stage_problems(job_with(make_job, "sft", {key: True}))
    assert error.where == f"stages.sft.train.{key}" and "needs a GPU" in error.problem


def test_targets_that_no_layer_has_are_found_before(make_job):
    from preftune.models.lora import LoraSpec

    (error,) = stage_problems(make_job("sft", lora=LoraSpec(r=2, alpha=4, target_modules=["nope_proj"])))
    assert error.where == "lora.target_modules" and "nope_proj" in error.problem


def test_asked_for_checkpoints_stay(make_job):
    job = make_job("sft", train={"max_steps": 4, "save_steps": 2, "save_total_limit": 1})
    run_stage(job)
    assert [each.name for each in (job.output_dir / "checkpoints").iterdir()] == ["checkpoint-4"]
    assert not (job.output_dir / "runs").exists()


def test_event_files_stay(make_job, monkeypatch):
    """Of TensorBoard, in the stage's `runs` from the start; of one that writes where checkpoints are, afterwards."""
    seen = []

    class TensorBoardCallback(TrainerCallback):
        logging_dir = None

        def on_train_begin(self, args, state, control, **_):
            seen.append(self.logging_dir)
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            (Path(args.output_dir) / "emissions.csv").write_text("1")

    monkeypatch.setattr(sft, "stage_callbacks", lambda job: [*stage_callbacks(job), TensorBoardCallback()])
    job = make_job("sft")
    run_stage(job)
    assert seen == [str(job.output_dir / "runs")]
    assert (job.output_dir / "runs" / "emissions.csv").read_text() == "1"
    assert not (job.output_dir / "checkpoints").exists()


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "kto", "ppo"])
def test_defaults_serve_lora(make_job, name: str):
    wanted = {"sft": 2e-4, "reward": 1e-4, "dpo": 1e-5, "kto": 1e-5, "ppo": 1e-4}
    kind = KINDS[name]
    assert kind.defaults["learning_rate"] == wanted[name]
    args = stage_config(kind.config_class(), job_with(make_job, name, {}), held_out=False)
    assert args.learning_rate == wanted[name]
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps < 32


def test_metrics_of_a_run_are_those_of_its_max_steps(make_job):
    job = make_job("sft", train={"max_steps": 3.0, "learning_rate": "1e-3"})
    assert run_stage(job)["steps"] == 3
    assert json.loads((job.output_dir / "metrics.json").read_text())["steps"] == 3


def test_a_mistake_in_two_words_is_two_lines(make_job):
    with pytest.raises(UserError) as caught:
        stage_config(SFTConfig, make_job("sft", train={"optim_args": 3, "adam_beta1": 2.0}), held_out=False)
    assert len(str(caught.value).splitlines()) == 2
