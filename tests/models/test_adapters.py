"""Adapters by role: who changes, who never does, and that a saved one is whole."""

import json
import subprocess
import sys

import pytest
import torch

from preftune import UserError
from preftune.models.adapters import AdapterSet
from preftune.models.generate import merged
from preftune.models.lineage import adapter_sha256
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import LoraSpec

from .conftest import IDS, logits, shake

ROLES = ("default", "ref", "reward", "value")


@pytest.fixture
def four(make) -> AdapterSet:
    adapters = make(dropout=0.1)
    adapters.copy("ref")
    adapters.copy("reward")
    adapters.add_head("reward", bias=False, trainable=False, seed=1)
    shake(adapters, "reward", seed=1)
    adapters.copy("value", source="reward", trainable=True)
    adapters.add_head("value", bias=True, seed=2)
    return adapters


def step(adapters: AdapterSet, name: str) -> None:
    """One optimiser step over everything trainable, from a loss that runs through one adapter."""
    optimizer = torch.optim.SGD([p for p in trainable(adapters) if p.requires_grad], lr=0.1)
    with adapters.using(name):
        hidden = adapters.backbone(input_ids=IDS).last_hidden_state
        out = adapters.heads[name](hidden) if name in adapters.heads else adapters.lm_head(hidden)
        out.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def trainable(adapters):
    heads = [p for head in adapters.heads.values() for p in head.parameters()]
    return [p for p in (*adapters.model.parameters(), *heads) if p.requires_grad]


def digests(adapters):
    return {name: adapters.digest(name) for name in (*ROLES, None)}


@pytest.mark.checklist("P24")
def test_p24_a_step_changes_the_adapter_it_runs_through_and_nothing_else(four):
    four.model.train()
    for name in ("default", "value", "default"):
        before = digests(four)
        step(four, name)
        after = digests(four)
        assert {role for role in before if before[role] != after[role]} == {name}


@pytest.mark.checklist("P24")
def test_p24_only_policy_and_value_can_learn(four):
    wanted = {id(p) for name in ("default", "value") for p in four.parameters(name)}
    assert {id(p) for p in trainable(four)} == wanted
    # Every one of their parameters learns, the head's included: none was left out of the optimiser's sight.
    assert len(wanted) == 2 * 2 * 28 + 2


@pytest.mark.checklist("P24")
def test_p24_looking_through_another_adapter_never_touches_gradients(four):
    before = [(name, p.requires_grad) for name, p in four.model.named_parameters()]
    for name in (*ROLES, None):
        with four.using(name), four.using(None), four.using("ref"):
            assert [(n, p.requires_grad) for n, p in four.model.named_parameters()] == before
    with pytest.raises(ZeroDivisionError), four.using("ref"):
        raise ZeroDivisionError
    assert {layer.active_adapter if isinstance(layer.active_adapter, str) else layer.active_adapter[0]
            for layer in four._layers.values()} == {"default"}  # fmt: skip
    assert not any(layer.disable_adapters for layer in four._layers.values())


def test_adding_adapters_leaves_gradients_mode_and_random_numbers_alone(make, tmp_path):
    adapters = make()
    adapters.save("default", tmp_path)
    adapters.model.train()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    adapters.copy("ref")
    adapters.load("value", tmp_path, trainable=True)
    adapters.load("reward", tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert all(p.requires_grad for name in ("default", "value") for p in adapters.parameters(name))
    assert not any(p.requires_grad for name in ("ref", "reward") for p in adapters.parameters(name))


def test_using_runs_the_adapter_it_names(four, base):
    outs = {name: logits(four, name) for name in (*ROLES, None)}
    with torch.no_grad():
        bare = load_model(base)(input_ids=IDS).logits
    assert torch.equal(outs[None], bare)
    assert torch.equal(outs["default"], outs["ref"])
    assert torch.equal(outs["reward"], outs["value"])
    assert (outs["default"] - bare).abs().max() > 0.01
    assert (outs["default"] - outs["reward"]).abs().max() > 0.01
    with torch.no_grad():
        assert torch.equal(four.model(input_ids=IDS).logits, outs["default"])


@pytest.mark.checklist("D1")
def test_d01_the_reference_is_the_parent_and_not_the_base(make, tmp_path):
    parent = make()
    parent.save("default", tmp_path)
    child = make(parent=tmp_path, dropout=0.1)
    child.copy("ref")
    child.model.train()
    assert child.digest("ref") == child.digest("default") == adapter_sha256(tmp_path)
    reference = logits(child, "ref")
    assert torch.equal(reference, logits(parent, "default"))
    # The frozen copy has no dropout of its own; in evaluation mode KL(policy || reference) is exactly 0.
    child.model.eval()
    assert torch.equal(logits(child, "default"), reference)
    assert (logits(child, None) - reference).abs().max() > 0.01
    step(child, "default")
    assert torch.equal(logits(child, "ref"), reference)
    assert not torch.equal(logits(child, "default"), reference)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_larger_rank_embeds_its_parent_exactly(make, tmp_path, rslora):
    parent = make(use_rslora=rslora)
    parent.save("default", tmp_path)
    alpha = 8 * 2**0.5 if rslora else 16
    child = make(parent=tmp_path, r=8, alpha=alpha, use_rslora=rslora)
    torch.testing.assert_close(logits(child, "default"), logits(parent, "default"), atol=2e-6, rtol=0)
    # The new directions can learn: they get a gradient at once.
    with child.using("default"):
        child.model(input_ids=IDS).logits.square().mean().backward()
    layer = child.model.base_model.model.model.layers[0].mlp.up_proj
    assert layer.lora_B["default"].weight.grad[:, 4:].abs().min() > 0


def test_more_modules_than_the_parent_are_taken_over_exactly(make, tmp_path):
    parent = make(target_modules=["q_proj", "v_proj"])
    parent.save("default", tmp_path)
    child = make(parent=tmp_path)
    assert torch.equal(logits(child, "default"), logits(parent, "default"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 2, "alpha": 4}, "lora.r: 2 is below 4"),
        ({"r": 8, "alpha": 8}, "use alpha: 16 with r: 8"),
        ({"use_rslora": True}, "lora.alpha"),
        ({"target_modules": ["q_proj"]}, "lora.target_modules"),
    ],
)
def test_what_cannot_be_taken_over_exactly_is_refused(make, tmp_path, changes, words):
    make().save("default", tmp_path)
    with pytest.raises(UserError, match=words):
        make(parent=tmp_path, **changes)


def test_all_linear_is_every_projection_and_no_head(make, base):
    config = make().model.peft_config["default"]
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(config.target_modules) == projections
    of_a_reward_model = LoraSpec().config(load_model(base, task="reward"), "SEQ_CLS").target_modules
    assert of_a_reward_model is not None and set(of_a_reward_model) == projections


def test_adapter_weights_are_fp32_on_a_bf16_base(make):
    adapters = make(dtype=torch.bfloat16)
    adapters.copy("ref")
    assert {p.dtype for name in ("default", "ref") for p in adapters.parameters(name)} == {torch.float32}


def test_saved_and_loaded_is_the_same_with_its_head(four, make, tmp_path):
    other = make()
    for name in ROLES:
        four.save(name, tmp_path / name)
        other.load(f"{name}_again", tmp_path / name)
        assert other.digest(f"{name}_again") == four.digest(name) == adapter_sha256(tmp_path / name)
        assert torch.equal(logits(other, f"{name}_again"), logits(four, name))
    assert other.heads["value_again"].score.bias is not None
    assert other.heads["reward_again"].score.bias is None
    assert not any(p.requires_grad for p in other.heads["value_again"].parameters())


def test_a_saved_adapter_loads_alone_with_plain_peft(make, tmp_path):
    adapters = make()
    adapters.copy("ref")
    adapters.save("default", tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    program = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
print(json.dumps(model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits.tolist()))
"""
    command = [sys.executable, "-c", program, str(tmp_path), json.dumps(IDS.tolist())]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    torch.testing.assert_close(torch.tensor(json.loads(out)), logits(adapters, "default"), atol=1e-5, rtol=0)


def test_an_adapter_of_another_shape_is_refused_and_leaves_nothing(make, tmp_path):
    make(target_modules=["q_proj"]).save("default", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = ["k_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapters = make()
    before = adapters.digest("default")
    with pytest.raises(UserError, match="does not fit this base"):
        adapters.load("reward", tmp_path)
    assert adapters.names == ["default"]
    assert adapters.digest("default") == before
    assert all(p.requires_grad for p in adapters.parameters("default"))


def test_merging_and_back_is_exact(four):
    before = digests(four)
    with merged(four, "value"):
        pass
    assert digests(four) == before


def test_same_seed_same_adapter(base):
    def fresh(seed):
        torch.manual_seed(seed + 100)
        return AdapterSet.create(load_model(base), base, LoraSpec(r=4, alpha=8), seed=seed).digest("default")

    assert fresh(0) == fresh(0) != fresh(1)


@pytest.mark.parametrize("bad", [{"r": 0}, {"alpha": 0}, {"dropout": 1.0}])
def test_a_lora_that_cannot_be_is_refused(bad):
    with pytest.raises(UserError, match=rf"lora\.{next(iter(bad))}"):
        LoraSpec(**bad)


def test_two_bases_do_not_mix(make):
    assert resolve_base("random:llama?seed=1").sha256 != make().base.sha256
