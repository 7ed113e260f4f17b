"""From a job to a folder: what is written, what is refused and in which words."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune.errors import UserError
from preftune.files import ADAPTER_CONFIG
from preftune.models.lineage import IMPORTED, adapter_sha256, read_lineage
from preftune.models.loading import resolve_base
from preftune.stages.checkpoints import newest, seal
from preftune.stages.dpo import build_dpo
from preftune.stages.job import StageJob
from preftune.stages.options import device_defaults
from preftune.stages.run import run_stage
from preftune.stages.sft import build_sft

KINDS = ("sft", "reward", "dpo", "kto")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_writes_its_folder(make_job, sft_folder, kind):
    job = make_job(kind, parent=None if kind == "sft" else sft_folder)
    metrics = run_stage(job)
    names = {file.name for file in job.output_dir.iterdir()}
    expected = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "lineage.json"}
    assert expected | {"metrics.json", "log.jsonl"} <= names
    assert "checkpoints" not in names
    lines = [json.loads(line) for line in (job.output_dir / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert metrics["steps"] == 2
    lineage = read_lineage(job.output_dir)
    assert (lineage.stage, lineage.kind, lineage.seed) == (kind, kind, 0)
    assert lineage.data["rows"] > 0
    assert lineage.config["train"]["learning_rate"] == 1e-3
    assert len(lineage.parents) == (kind != "sft")


def test_any_plain_adapter_can_be_a_parent_and_the_lineage_says_that_it_is_unverified(make_job, base, tmp_path, caplog):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path / "elsewhere"
    model.save_pretrained(str(folder))
    stage = build_dpo(make_job("dpo", parent=folder))
    ids = torch.tensor([[20, 21, 22, 23]])
    with torch.no_grad(), stage.adapters.using("default"):
        torch.testing.assert_close(stage.adapters.causal(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-5)
    job = make_job("dpo", parent=folder)
    run_stage(job)
    (entry,) = read_lineage(job.output_dir).parents
    assert entry == {"stage": IMPORTED, "sha256": adapter_sha256(folder), "adapter": str(folder.resolve())}
    assert "imported, its tokenizer and template are unverified" in caplog.text
    # its config names another model that lies here, or it is more than plain LoRA
    file = folder / ADAPTER_CONFIG
    whole = json.loads(file.read_text())
    other = resolve_base("random:llama?seed=1")
    foreign = {"base_model_name_or_path": str(other.path)}
    for changes, words in ((foreign, "another model"), ({"use_dora": True}, "dora")):
        file.write_text(json.dumps(whole | changes))
        with pytest.raises(UserError, match=words):
            build_dpo(make_job("dpo", parent=folder))


def test_a_token_beyond_the_embedding_is_refused_before_anything_loads(make_job, base, tmp_path):
    folder = tmp_path / "grown"
    shutil.copytree(base.path, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)
    grown = resolve_base(str(folder))
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "use <tool> now"}]
    with pytest.raises(UserError, match=r"data.demo: row 2 holds the token '<tool>' .* has 264 rows"):
        build_sft(make_job("sft", base=grown, rows=rows))
    build_sft(make_job("sft", base=grown, rows=rows[:1]))  # a token that nobody says does no harm
    tokenizer.eos_token = "<tool>"
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<tool>")
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="its EOS '<tool>'"):
        build_sft(make_job("sft", base=grown, rows=rows[:1]))


@pytest.mark.parametrize("kind", KINDS)
def test_runs_repeat_bit_for_bit(make_job, sft_folder, kind):
    adapters = []
    for name in ("once", "again"):
        job = make_job(kind, name, parent=None if kind == "sft" else sft_folder)
        run_stage(job)
        adapters.append((job.output_dir / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(
    ("method", "train", "message"),
    [
        ({}, {"learning_rte": 1.0}, "stages.dpo.train.learning_rte: .* did you mean 'learning_rate'"),
        ({"bta": 0.1}, {}, "stages.dpo.bta: .* did you mean 'beta'"),
        ({"beta": 0.1}, {"beta": 0.2}, "beta is said twice, as 0.1 beside train and as 0.2 in it"),
        ({"loss_type": "exo_pair"}, {}, "Label smoothing must be greater than 0.0"),
        ({}, {"max_length": 3}, "set max_length of the data entry"),
        ({}, {"eval_strategy": "steps"}, "set data.pair.held_out"),
        ({"early_stopping_patience": 2}, {}, "set data.pair.held_out"),
        ({}, {"learning_rate": "fast"}, r"learning_rate: is 'fast' \(text\), expected a number"),
        ({}, {"lr_scheduler_type": "wavy"}, "wavy is not a valid SchedulerType"),
    ],
)
def test_wrong_words_are_refused_in_one_line(make_job, method, train, message):
    with pytest.raises(UserError, match=message) as caught:
        run_stage(make_job("dpo", method=method, train=train))
    assert "\n" not in str(caught.value)


def test_unknown_kind_is_refused(make_job):
    job = make_job("sft")
    wrong = StageJob(**{**job.__dict__, "kind": "sfft"})
    with pytest.raises(UserError, match="'sfft' is no kind of stage"):
        run_stage(wrong)


def test_numbers_written_as_text_are_numbers(make_job):
    stage = build_sft(make_job("sft", train={"learning_rate": "2e-4", "num_train_epochs": "2"}))
    assert stage.trainer.args.learning_rate == 2e-4
    assert stage.trainer.args.num_train_epochs == 2


def test_a_parent_of_another_base_is_refused(make_job, sft_folder, tmp_path):
    other = tmp_path / "parent"
    shutil.copytree(sft_folder, other)
    lineage = json.loads((other / "lineage.json").read_text())
    lineage["base"]["sha256"] = "0" * 64
    (other / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(UserError, match=r"base\.sha256 differs"):
        run_stage(make_job("dpo", parent=other))


def test_held_out_rows_are_evaluated_and_the_best_kept(make_job):
    method = {"early_stopping_patience": 1}
    train = {"max_steps": None, "num_train_epochs": 6, "learning_rate": 0.0}
    metrics = run_stage(make_job("sft", held_out=0.3, method=method, train=train))
    assert metrics["eval_loss"] > 0
    assert metrics["epochs"] == 2  # the second evaluation is no better than the first


def test_the_best_checkpoint_is_what_is_saved(make_job):
    train = {"max_steps": None, "num_train_epochs": 4, "learning_rate": 0.1, "load_best_model_at_end": True}
    job = make_job("sft", held_out=0.3, train=train)
    metrics = run_stage(job)
    lines = [json.loads(line) for line in (job.output_dir / "log.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert metrics["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    assert not (job.output_dir / "checkpoints").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_resumes_exactly(make_job, sft_folder, kind, monkeypatch):
    parent = None if kind == "sft" else sft_folder
    train = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_job(kind, "whole", parent=parent, train=train)
    run_stage(whole)
    killed = make_job(kind, "killed", parent=parent, train=train)
    from preftune.stages import callbacks

    class Killed(Exception):
        pass

    def at_three(self, args, state, control, **_):
        if state.global_step == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.ProgressBar, "on_step_end", at_three)
        with pytest.raises(Killed):
            run_stage(killed)
    found = newest(killed.output_dir / "checkpoints", kind, 1)
    assert found is not None and found.name == "checkpoint-2"
    run_stage(killed)
    weights = [(job.output_dir / "adapter_model.safetensors").read_bytes() for job in (whole, killed)]
    assert weights[0] == weights[1]
    steps = [json.loads(line)["step"] for line in (killed.output_dir / "log.jsonl").read_text().splitlines()]
    assert [step for step in steps[:-1]] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_rows_than_a_batch(make_job, rows_of, kind):
    metrics = run_stage(make_job(kind, rows=rows_of(kind)[:3], train={"per_device_train_batch_size": 8}))
    assert metrics["steps"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU needs")
def test_device_defaults_of_a_cpu():
    values = device_defaults("float32")
    assert values["use_cpu"] and not values["bf16"] and not values["gradient_checkpointing"]
    assert device_defaults("bfloat16")["bf16"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_base_trains(make_job, sft_folder, kind):
    job = make_job(kind, parent=None if kind == "sft" else sft_folder, dtype="bfloat16")
    assert run_stage(job)["steps"] == 2


class _Payload:
    """What a pickle runs when it is read: it makes a file."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.touched,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_checkpoint_that_would_run_code_is_not_read(make_job, tmp_path, capsys, name, sealed):
    """Whoever put it there may have written its manifest anew or not."""
    killed = make_job("sft", train={"max_steps": 2, "save_strategy": "steps", "save_steps": 2})
    run_stage(killed)
    checkpoint = killed.output_dir / "checkpoints" / "checkpoint-2"
    touched = tmp_path / "ran"
    torch.save({"state": _Payload(touched)}, checkpoint / name)
    if sealed:
        seal(checkpoint, processes=1, asked=True)
    again = replace(killed, train={**killed.train, "max_steps": 3})
    if sealed:
        with pytest.raises(UserError, match=rf"checkpoint-2: not read: {name} would run code when it is read"):
            run_stage(again)
    else:
        run_stage(again)
        assert f"passed over, {name} is damaged" in capsys.readouterr().err
    assert not touched.exists()
