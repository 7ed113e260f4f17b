"""The reward model: its head survives saving, its trunk is its parent's, its scores are the same everywhere."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from preftune import UserError
from preftune.models.heads import ScalarHead
from preftune.models.lineage import adapter_sha256
from preftune.models.lora import SCORE, LoraSpec, lora_layers, lora_state
from preftune.models.reward_model import create_reward_model, load_reward_model, reward_tensors, save_reward_model

from .conftest import IDS

LORA = LoraSpec(r=4, alpha=8)
MASK = torch.ones_like(IDS)


@pytest.fixture
def parent(make, tmp_path):
    make().save("default", tmp_path / "parent")
    return tmp_path / "parent"


def scores(model, ids=IDS, mask=MASK):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)


def train_a_step(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, attention_mask=MASK).logits.diff(dim=0).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def frozen(model):
    return {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}


FRESH = """
import json, sys, torch
from peft import AutoPeftModelForSequenceClassification
model = AutoPeftModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=1, dtype=torch.float32)
ids = torch.tensor(json.loads(sys.argv[2]))
print(json.dumps(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.squeeze(-1).tolist()))
"""


@pytest.mark.checklist("R1")
def test_r01_a_fresh_process_gives_the_same_scores(base, tokenizer, parent, make, tmp_path):
    model = create_reward_model(base, tokenizer, LORA, parent)
    train_a_step(model)
    expected = scores(model)
    folder = tmp_path / "reward"
    save_reward_model(model, base, folder)
    assert load_file(folder / "adapter_model.safetensors")[SCORE].dtype == torch.float32
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["score"]

    command = [sys.executable, "-c", FRESH, str(folder), json.dumps(IDS.tolist())]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    torch.testing.assert_close(torch.tensor(json.loads(out)), expected, atol=1e-5, rtol=0)

    again = load_reward_model(folder, base, tokenizer)
    assert not any(p.requires_grad for p in again.parameters())
    torch.testing.assert_close(scores(again), expected, atol=1e-6, rtol=0)

    adapters = make()
    adapters.load("reward", folder)
    with torch.no_grad(), adapters.using("reward"):
        hidden = adapters.backbone(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(adapters.heads["reward"](hidden)[:, -1], expected, atol=1e-6, rtol=0)
    assert adapters.digest("reward") == adapter_sha256(folder)


@pytest.mark.checklist("R2")
def test_r02_the_head_starts_with_std_one_over_root_hidden_plus_one(base, tokenizer):
    head = ScalarHead(4095, bias=True, generator=torch.Generator().manual_seed(0))
    assert head.score.weight.std().item() == pytest.approx(1 / 64, rel=0.05)
    assert head.score.bias.tolist() == [0.0]
    first, second, other = (
        reward_tensors(create_reward_model(base, tokenizer, LORA, seed=s))[SCORE] for s in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape == (1, 128)
    assert first.std().item() == pytest.approx(129**-0.5, rel=0.15)


@pytest.mark.checklist("R3")
@pytest.mark.parametrize("side", ["left", "right"])
def test_r03_padding_does_not_change_a_score(base, tokenizer, parent, side):
    model = create_reward_model(base, tokenizer, LORA, parent)
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    # Both rows end at EOS, as every reward input does: were it taken for padding, the score would be read before it.
    ids = IDS.clone()
    ids[:, -1] = tokenizer.eos_token_id
    alone = scores(model, ids)
    pad, zero = torch.full((2, 5), tokenizer.pad_token_id), torch.zeros(2, 5, dtype=torch.long)
    order = (lambda a, b: [b, a]) if side == "left" else (lambda a, b: [a, b])
    mask = torch.cat(order(MASK, zero), dim=1)
    padded = scores(model, torch.cat(order(ids, pad), dim=1), mask)
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)
    # And it is read there: one token earlier is another score.
    assert (scores(model, ids[:, :-1], MASK[:, 1:]) - alone).abs().min() > 1e-3


@pytest.mark.checklist("P24")
def test_p24_a_reward_step_changes_lora_and_score_and_nothing_else(base, tokenizer, parent):
    model = create_reward_model(base, tokenizer, LORA, parent)
    before, fixed = {k: v.clone() for k, v in reward_tensors(model).items()}, frozen(model)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(t) for t in reward_tensors(model).values()}
    train_a_step(model)
    assert all(not torch.equal(before[name], tensor) for name, tensor in reward_tensors(model).items())
    assert all(torch.equal(fixed[name], p) for name, p in frozen(model).items())


def test_it_starts_as_an_exact_copy_of_its_parent(base, tokenizer, parent):
    model = create_reward_model(base, tokenizer, LORA, parent)
    theirs = load_file(parent / "adapter_model.safetensors")
    ours = lora_state(lora_layers(model), "default")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_reward_parent_hands_its_score_down(base, tokenizer, parent, tmp_path):
    first = create_reward_model(base, tokenizer, LORA, parent, seed=3)
    save_reward_model(first, base, tmp_path / "first")
    second = create_reward_model(base, tokenizer, LORA, tmp_path / "first", seed=4)
    assert torch.equal(scores(first), scores(second))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_head_computes_in_fp32_on_a_bf16_trunk(base, tokenizer, parent, autocast):
    model = create_reward_model(base, tokenizer, LORA, parent, torch.bfloat16)
    inner: Any = model.get_base_model()
    assert inner.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
    head = inner.score.modules_to_save["default"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = inner.model(input_ids=IDS).last_hidden_state[:, -1]
        out = head(hidden)
    assert out.dtype == torch.float32
    assert torch.equal(out, hidden.float() @ head.weight.T)
    assert scores(model).dtype == torch.float32


def test_plain_transformers_could_not_have_read_the_score_at_eos(base):
    # The base's own files say which id is PAD: a fresh process has nothing else to go by.
    config = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=1).config
    assert config.pad_token_id not in (None, config.eos_token_id)


def test_a_policy_is_no_reward_model(base, tokenizer, parent):
    with pytest.raises(UserError, match="without a score head"):
        load_reward_model(parent, base, tokenizer)
