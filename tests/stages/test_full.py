"""Stages that train all weights (`full: true`): against plain PyTorch, against their own start, and as a base."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from preftune.errors import UserError
from preftune.models.base import Base
from preftune.models.lineage import read_lineage
from preftune.models.loading import resolve_base
from preftune.models.tokens import load_tokenizer
from preftune.models.whole_model import WholeModel
from preftune.stages.dpo import build_dpo
from preftune.stages.job import StageJob
from preftune.stages.kto import build_kto
from preftune.stages.ppo.rewards import RewardSource
from preftune.stages.reward import build_reward, score
from preftune.stages.run import run_stage
from preftune.stages.sft import build_sft

Make = Callable[..., StageJob]
IDS = torch.tensor([[8, 30, 60, 61, 200, 17, 2], [9, 9, 100, 101, 7, 8, 263]])
KINDS = ("sft", "reward", "dpo", "kto")


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


@pytest.mark.checklist("F1")
def test_f01_a_step_is_that_of_plain_pytorch(base: Base, make_job: Make) -> None:
    train = {"max_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 12, "max_grad_norm": 0.0}
    stage = build_sft(make_job("sft", full=True, train={**train, "lr_scheduler_type": "constant"}))
    theirs: Any = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).train()
    rows = [stage.data.train[index] for index in range(len(stage.data.train))]
    total, tokens = torch.zeros(()), 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        logits = theirs(input_ids=torch.tensor([row["input_ids"]])).logits
        found = torch.nn.functional.cross_entropy(
            logits[0, :-1].float(), labels[0, 1:], ignore_index=-100, reduction="sum"
        )
        total, tokens = total + found, tokens + int((labels[0, 1:] != -100).sum())
    (total / tokens).backward()
    expected = {name: each.grad for name, each in theirs.named_parameters()}
    assert all(each is not None for each in expected.values())

    grads: dict[str, torch.Tensor] = {}
    model: Any = stage.trainer.model
    for name, each in model.named_parameters():
        each.register_hook(lambda grad, name=name: grads.__setitem__(name, grads.get(name, 0) + grad.clone()))
    before = state(model)
    stage.trainer.train()
    assert set(grads) == set(expected) and len(grads) > 20
    for name, each in expected.items():
        largest = float(each.detach().abs().max())
        torch.testing.assert_close(grads[name], each, rtol=0, atol=1e-5 * largest + 1e-9, msg=name)
        moved = (model.get_parameter(name).detach() - before[name]).abs().max()
        assert float(moved) > 1e-3, name  # Adam's first step is the learning rate, whatever the gradient


@pytest.mark.checklist("F2")
@pytest.mark.parametrize(("kind", "build"), [("dpo", build_dpo), ("kto", build_kto)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ahead", [False, True])
def test_f02_the_reference_is_what_it_started_from(
    base: Base, make_job: Make, kind: str, build: Callable[[StageJob], Any], dtype: str, ahead: bool
) -> None:
    job = make_job(
        kind,
        full=True,
        dtype=dtype,
        train={"max_steps": 3, "learning_rate": 1e-3, "precompute_ref_log_probs": ahead},
    )
    stage = build(job)
    model, reference = stage.trainer.model, stage.trainer.ref_model
    start = state(model)
    assert reference is not None and not any(each.requires_grad for each in reference.parameters())
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    stage.trainer.train()
    assert not torch.is_autocast_enabled("cpu")
    for name, each in reference.named_parameters():
        assert torch.equal(each, start[name]), name
        assert each.data_ptr() != model.get_parameter(name).data_ptr()
        assert not torch.equal(model.get_parameter(name), start[name]), name
    first, last = (stage.trainer.state.log_history[place] for place in (0, -2))
    small = 1e-4 if dtype == "float32" else 2e-3
    for side in ("chosen", "rejected"):
        assert abs(first[f"rewards/{side}"]) < small < 10 * small < abs(last[f"rewards/{side}"])


@pytest.mark.checklist("F3")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_f03_what_is_written_is_what_was_trained_and_loads_anywhere(
    base: Base, make_job: Make, kind: str, dtype: str
) -> None:
    job = make_job(kind, full=True, dtype=dtype, train={"max_steps": 3, "learning_rate": 1e-2})
    run_stage(job)
    folder = job.output_dir
    assert not (folder / "adapter_config.json").exists() and not (folder / "checkpoints").exists()
    auto: Any = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    theirs = auto.from_pretrained(folder)
    assert theirs.config.dtype == getattr(torch, dtype)
    made = resolve_base(str(folder)) if kind != "reward" else None
    assert made is None or made.sha256 != base.sha256
    # the text is encoded as before: the template lies beside it
    assert AutoTokenizer.from_pretrained(folder).chat_template == load_tokenizer(base).chat_template
    lineage = read_lineage(folder)
    assert lineage.config["full"] is True and "lora" not in lineage.config
    assert lineage.base["sha256"] == base.sha256
    card = (folder / "README.md").read_text()
    assert 'library_name: "transformers"' in card and "LoRA" not in card and auto.__name__ in card


@pytest.mark.checklist("F3")
def test_f03_weights_are_rounded_once(base: Base, make_job: Make, tmp_path: Path) -> None:
    model = WholeModel.open(base, load_tokenizer(base), torch.bfloat16)
    with torch.no_grad():
        for each in model.model.parameters():
            each.add_(torch.randn_like(each), alpha=1e-3)
    before = state(model.model)
    model.save("x", tmp_path / "out")
    assert all(torch.equal(each, before[name]) for name, each in state(model.model).items())
    assert model.model.config.dtype == torch.float32
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, each in theirs.named_parameters():
        assert each.dtype == torch.bfloat16
        step = torch.finfo(torch.bfloat16).eps * before[name].abs()
        assert bool(((each.float() - before[name]).abs() <= step + 1e-30).all()), name


@pytest.mark.checklist("F3")
def test_f03_a_chain_goes_on_from_it(base: Base, make_job: Make) -> None:
    sft = make_job("sft", full=True, train={"max_steps": 3, "learning_rate": 1e-2})
    run_stage(sft)
    made = resolve_base(str(sft.output_dir))
    reward = make_job("reward", base=made, full=True)
    run_stage(reward)
    dpo = make_job("dpo", base=made)
    run_stage(dpo)
    entry = read_lineage(dpo.output_dir).base
    assert entry["sha256"] == made.sha256
    assert entry["made_from"]["stage"] == "sft" and entry["made_from"]["base"]["sha256"] == base.sha256
    ppo = make_job(
        "ppo",
        base=made,
        rewards=(RewardSource("model", str(reward.output_dir)),),
        method={"rollout_batch_size": 4, "total_episodes": 4, "num_mini_batches": 2, "num_ppo_epochs": 1}
        | {"max_new_tokens": 6},
        train={"max_steps": None},
    )
    run_stage(ppo)
    assert read_lineage(ppo.output_dir).base["made_from"]["kind"] == "sft"


@pytest.mark.checklist("F3")
def test_f03_a_reward_model_scores_as_it_did(make_job: Make) -> None:
    job = make_job("reward", full=True, train={"max_steps": 4, "learning_rate": 1e-3}, held_out=0.3)
    stage = build_reward(job)
    stage.trainer.train()
    assert stage.whole is not None
    rows = [IDS[0].tolist(), IDS[1].tolist()]
    pad = stage.tokenizer.pad_token_id
    assert isinstance(pad, int)
    ours = score(stage.whole.model, rows, pad)
    stage.whole.save("reward", job.output_dir)
    theirs: Any = AutoModelForSequenceClassification.from_pretrained(job.output_dir)
    with torch.no_grad():
        said = [float(theirs(input_ids=torch.tensor([row])).logits) for row in rows]
    torch.testing.assert_close(torch.tensor(said), torch.tensor(ours), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_off_and_gone_on_with_it_is_the_same(base: Base, make_job: Make, kind: str) -> None:
    build: dict[str, Callable[[StageJob], Any]]
    build = {"sft": build_sft, "reward": build_reward, "dpo": build_dpo, "kto": build_kto}
    train = {"max_steps": 4, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    job = make_job(kind, full=True, train=train)
    whole = build[kind](job).trainer
    whole.train()
    other = replace(job, output_dir=job.output_dir.with_name("other"))
    other.output_dir.mkdir()
    again = build[kind](other).trainer
    again.train(resume_from_checkpoint=str(Path(str(whole.args.output_dir)) / "checkpoint-2"))
    for name, each in whole.model.named_parameters():
        assert torch.equal(each, again.model.get_parameter(name)), name


def test_a_divided_base_is_refused(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftune.models.whole_model.shards_base", lambda: True)
    with pytest.raises(UserError, match="divides the base"):
        WholeModel.open(base, load_tokenizer(base), torch.float32)


def test_what_was_cut_off_after_its_end_takes_its_place(make_job: Make) -> None:
    from preftune.stages.run import finished

    job = make_job("sft", full=True)
    metrics = run_stage(job)
    assert finished(job) == json.loads((job.output_dir / "metrics.json").read_text())
    assert metrics["steps"] == 2
    weights = job.output_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert finished(job) is None
