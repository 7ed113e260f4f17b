"""A chain of stages with each kind of LoRA: what every stage saves is, in plain PEFT, what it is here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from preftune.errors import UserError
from preftune.models.adapters import AdapterSet
from preftune.models.added_tokens import spec_with
from preftune.models.base import Base
from preftune.models.lineage import adapter_sha256
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import LoraSpec, read_tensors
from preftune.models.tokens import load_tokenizer, prepare_model
from preftune.stages.check import stage_problems
from preftune.stages.dpo import build_dpo
from preftune.stages.job import StageJob
from preftune.stages.ppo.rewards import RewardSource
from preftune.stages.run import run_stage

from .conftest import ROWS

Make = Callable[..., StageJob]
IDS = torch.tensor([[8, 30, 60, 61, 200, 17, 2], [9, 9, 100, 101, 7, 8, 263]])
KINDS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True, "alpha": 4},
    "DoRA": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "fast PiSSA": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "patterns": {"rank_pattern": {"q_proj": 2, "down_proj": 8}, "alpha_pattern": {"q_proj": 5}},
    "rows of tokens": {"trainable_token_indices": [9, 61, 263]},
    "some layers": {"layers_to_transform": [0, 1], "exclude_modules": ["k_proj"]},
    "a regular expression": {"target_modules": r".*\.(self_attn\.[qv]_proj|mlp\.up_proj)"},
    "DoRA from PiSSA with patterns": {"use_dora": True, "init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}},
}
PPO = {"rollout_batch_size": 4, "total_episodes": 8, "num_mini_batches": 2, "num_ppo_epochs": 1, "max_new_tokens": 6}


def chain(make_job: Make, lora: LoraSpec, **given: Any) -> dict[str, Path]:
    """SFT -> DPO and SFT -> reward -> PPO; their folders."""
    sft = make_job("sft", lora=lora, train={"max_steps": 3, "learning_rate": 1e-2}, **given)
    run_stage(sft)
    more: dict[str, Any] = {"lora": lora, "parent": sft.output_dir, **given}
    dpo = make_job("dpo", **more)
    assert build_copy(dpo) == {adapter_sha256(sft.output_dir)}
    reward = make_job("reward", **more)
    for job in (dpo, reward):
        run_stage(job)
    source = RewardSource("stage", str(reward.output_dir))
    ppo = make_job("ppo", rows=ROWS["prompt"], method=PPO, rewards=(source,), train={"max_steps": None}, **more)
    run_stage(ppo)
    return {job.name: job.output_dir for job in (sft, dpo, reward, ppo)}


def build_copy(job: StageJob) -> set[str]:
    """The hashes of the policy that a DPO stage starts with, and of its reference."""
    adapters = build_dpo(job).adapters
    return {adapters.digest(name) for name in ("default", "ref")}


@torch.no_grad()
def in_plain_peft(base: Base, folder: Path, task: str) -> torch.Tensor:
    """Log-probabilities, or scores, of the saved adapter beside the base as transformers and PEFT load them."""
    if task == "causal":
        model: Any = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        return PeftModel.from_pretrained(model, str(folder)).eval()(input_ids=IDS).logits.log_softmax(-1)
    model = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=1, dtype=torch.float32)
    prepare_model(model, load_tokenizer(base))
    return PeftModel.from_pretrained(model, str(folder)).eval()(input_ids=IDS).logits


def check_chain(base: Base, folders: dict[str, Path]) -> None:
    """Every folder's adapter says the same here and there, each moved on, and PPO's sampler was its trainer."""
    model = load_model(base)
    adapters = AdapterSet.create(model, base, LoraSpec(r=1, alpha=1))
    said = {}
    for name, folder in folders.items():
        adapters.load(name, folder)
        hidden = adapters.hidden(name, IDS, torch.ones_like(IDS))
        if name == "reward":
            said[name] = adapters.heads[name](hidden)[:, -1:].detach()
        else:
            said[name] = adapters.head_under(name).logits(hidden).log_softmax(-1).detach()
        wanted = in_plain_peft(base, folder, "reward" if name == "reward" else "causal")
        torch.testing.assert_close(said[name], wanted, rtol=0, atol=1e-4)
        assert json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"] is True
    for name in ("dpo", "ppo"):
        assert (said[name] - said["sft"]).abs().max() > 1e-3, name
    lines = map(json.loads, (folders["ppo"] / "log.jsonl").read_text().splitlines())
    gaps = [line["rollout/logprob_mismatch"] for line in lines if "rollout/logprob_mismatch" in line]
    assert gaps and max(gaps) < 1e-4


@pytest.mark.checklist("L6")
@pytest.mark.parametrize("kind", KINDS)
def test_l06_a_chain_of_it_agrees_with_plain_peft_at_every_stage(base: Base, make_job: Make, kind: str):
    before = base.sha256
    check_chain(base, chain(make_job, LoraSpec(**{"r": 4, "alpha": 8, **KINDS[kind]})))
    assert resolve_base("random:llama").sha256 == before


@pytest.mark.checklist("L7")
def test_l07_the_reference_of_dpo_has_its_parent_s_rows(base: Base, make_job: Make):
    lora = LoraSpec(r=4, alpha=8, trainable_token_indices=[9, 61])
    sft = make_job("sft", lora=lora, train={"learning_rate": 1e-2})
    run_stage(sft)
    assert build_copy(make_job("dpo", lora=lora, parent=sft.output_dir)) == {adapter_sha256(sft.output_dir)}
    for kind in ("dpo", "kto"):  # and its first margin is 0, with log-probs that are made before the first step
        run_stage(make_job(kind, lora=lora, parent=sft.output_dir, train={"precompute_ref_log_probs": True}))


@pytest.mark.checklist("L8")
def test_l08_a_chain_on_a_base_with_tokens_agrees_with_plain_peft(base: Base, make_job: Make):
    grown = resolve_base(spec_with(base.spec, ["<|think|>"], 0))
    folders = chain(make_job, LoraSpec(r=4, alpha=8), base=grown)
    check_chain(grown, folders)
    held = {name: read_tensors(folder / "adapter_model.safetensors") for name, folder in folders.items()}
    (row,) = [name for name in held["sft"] if name.endswith("trainable_tokens_delta")]
    for name in ("dpo", "ppo"):  # no pair holds the token, and a reward model has no head
        assert held[name][row].dtype == torch.float32 and not torch.equal(held[name][row], held["sft"][row])
    other = resolve_base(spec_with(base.spec, ["<|other|>"], 0))
    with pytest.raises(UserError, match=r"base\.sha256 differs.*<\|think\|>.*there"):
        run_stage(make_job("dpo", name="odd", base=other, parent=folders["sft"]))
    with pytest.raises(UserError, match=r"base\.sha256 differs"):
        run_stage(make_job("dpo", name="plain", parent=folders["sft"]))


@pytest.mark.checklist("L5")
@pytest.mark.parametrize("optimiser", ["sft", "ppo"])
def test_l05_weights_that_are_taken_out_of_the_base_never_decay(make_job: Make, optimiser: str):
    more: dict[str, Any] = {"rows": ROWS["prompt"], "method": PPO} if optimiser == "ppo" else {}
    lora = LoraSpec(r=4, alpha=8, init_lora_weights="pissa")
    job = make_job(optimiser, lora=lora, train={"weight_decay": 0.1, "max_steps": None}, **more)
    assert f"stages.{optimiser}.train.weight_decay" in [each.where for each in stage_problems(job)]


@pytest.mark.checklist("L5")
def test_l05_a_quantised_base_is_not_taken_apart(make_job: Make):
    job = make_job("sft", lora=LoraSpec(init_lora_weights="olora", r=4), quantization="4bit")
    found = [each for each in stage_problems(job) if each.where == "lora.init_lora_weights"]
    assert len(found) == 1 and "packed in 4bit" in found[0].problem


@pytest.mark.parametrize("kind", ["PiSSA", "DoRA"])
def test_an_adapter_of_it_in_memory_trains_as_well(kind: str, tmp_path: Path):
    from preftune import PPOTrainer

    from .tiny_ppo import PROMPTS, TOKENIZER, letters, settings, tiny_model

    lora = LoraSpec(r=4, alpha=8, **KINDS[kind])
    with pytest.raises(UserError, match="weight_decay") if kind == "PiSSA" else pytest.raises(ZeroDivisionError):
        given = settings(tmp_path, total_episodes=8, weight_decay=0.1)
        PPOTrainer(tiny_model(), letters, given, PROMPTS, None, TOKENIZER, lora=lora).train()
        raise ZeroDivisionError
    trainer = PPOTrainer(
        tiny_model(), letters, settings(tmp_path / "b", total_episodes=8), PROMPTS, None, TOKENIZER, lora=lora
    )
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "b").eval()
    ids = torch.tensor([[20, 21, 22, 23]])
    with torch.no_grad(), trainer.adapters.using("default"):
        torch.testing.assert_close(loaded(ids).logits, trainer.adapters.model(ids).logits, rtol=0, atol=1e-4)
