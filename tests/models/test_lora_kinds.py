"""Every kind of LoRA that a recipe can ask for: trained, saved, copied and merged it is what plain PEFT makes of it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.optimization import Adafactor

from preftune.errors import UserError
from preftune.files import ADAPTER_WEIGHTS
from preftune.models.adapters import AdapterSet
from preftune.models.base import Base
from preftune.models.generate import merged, sample
from preftune.models.lineage import adapter_sha256
from preftune.models.loading import load_model
from preftune.models.lora import LoraSpec, lora_layers, lora_state
from preftune.models.reward_model import create_reward_model, save_reward_model
from preftune.models.starts import components
from preftune.models.tokens import prepare_model
from preftune.recipes.schema import Lora, Model
from preftune.stages.names import REFUSED

from .conftest import IDS, logits

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "DoRA from PiSSA": {"use_dora": True, "init_lora_weights": "pissa"},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\.up_proj": 8}, "alpha_pattern": {"q_proj": 5}},
    "PiSSA with patterns": {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "layers": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["q_proj", "layers.0.mlp.up_proj"]},
    "rows of tokens": {"trainable_token_indices": [8, 30, 263]},
    "DoRA with rows of tokens": {"use_dora": True, "trainable_token_indices": {"embed_tokens": [2, 9]}},
    "a regular expression": {"target_modules": r".*layers\.[01]\.self_attn\.[qv]_proj"},
}
ALTERING = [name for name, kind in KINDS.items() if kind.get("init_lora_weights") in ("pissa", "olora")]


def spec(kind: str, **more: Any) -> LoraSpec:
    return LoraSpec(**{"r": 4, "alpha": 8, **KINDS[kind], **more})


def made(base: Base, kind: str, parent: Path | None = None, **more: Any) -> AdapterSet:
    return AdapterSet.create(load_model(base), base, spec(kind, **more), parent)


def bare(base: Base) -> Any:
    return AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)


def three_steps(model: Any, parameters: list[Any], kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> None:
    settings: dict[Any, dict[str, Any]] = {
        torch.optim.AdamW: {"lr": 1e-2, "weight_decay": 0.0},
        torch.optim.SGD: {"lr": 0.03},  # Adam's first steps go by a gradient's sign, which rounding may turn
        Adafactor: {"lr": 1e-2, "scale_parameter": False, "relative_step": False},
    }
    optimizer = kind(parameters, **settings[kind])
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(base: Base, kind: str) -> AdapterSet:
    adapters = made(base, kind)
    three_steps(adapters.model, adapters.parameters("default"))
    return adapters


def logps(found: torch.Tensor) -> torch.Tensor:
    return found.float().log_softmax(-1)


def plain_logps(base: Base, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return logps(PeftModel.from_pretrained(bare(base), str(folder)).eval()(input_ids=IDS).logits)


@pytest.mark.checklist("L1")
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern")
@pytest.mark.parametrize("kind", KINDS)
def test_l01_a_few_steps_move_the_model_as_plain_pefts_do(base: Base, kind: str):
    adapters = made(base, kind)
    settings: Any = adapters.model.peft_config["default"]
    targets = sorted(settings.target_modules)
    own = {key: value for key, value in KINDS[kind].items() if key not in ("target_modules", "exclude_modules")}
    own.pop("layers_to_transform", None)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **own)
    model: Any = get_peft_model(bare(base), config)
    theirs = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if kind not in ALTERING:  # what is drawn
        ours = dict(adapters.model.named_parameters())
        assert ours.keys() >= theirs.keys()
        with torch.no_grad():
            for name, each in theirs.items():
                each.copy_(ours[name])
    with torch.no_grad():
        start = logps(model(input_ids=IDS).logits)
    torch.testing.assert_close(logps(logits(adapters, "default")), start, rtol=0, atol=1e-4)
    three_steps(model, list(theirs.values()), torch.optim.SGD)
    three_steps(adapters.model, adapters.parameters("default"), torch.optim.SGD)
    with torch.no_grad():
        wanted = logps(model(input_ids=IDS).logits)
    assert (wanted - start).abs().max() > 0.1
    torch.testing.assert_close(logps(logits(adapters, "default")), wanted, rtol=0, atol=1e-4)


@pytest.mark.checklist("L2")
@pytest.mark.parametrize("kind", KINDS)
def test_l02_saved_it_is_the_same_in_plain_peft_as_a_role_and_in_rollouts(base: Base, tmp_path: Path, kind: str):
    adapters = trained(base, kind)
    wanted = logps(logits(adapters, "default"))
    assert (wanted - logps(logits(adapters, None))).abs().max() > 0.1
    adapters.save("default", tmp_path, done=True)
    adapters.copy("ref")
    adapters.load("reward", tmp_path)
    torch.testing.assert_close(plain_logps(base, tmp_path), wanted, rtol=0, atol=1e-4)
    for role, most in (("ref", 0.0), ("reward", 1e-4)):
        torch.testing.assert_close(logps(logits(adapters, role)), wanted, rtol=0, atol=most)
    with torch.no_grad(), merged(adapters, "default"):
        torch.testing.assert_close(logps(adapters.causal(input_ids=IDS).logits), wanted, rtol=0, atol=1e-4)
    for merge in (True, False):
        prompt = IDS[0].tolist()
        drawn = sample(
            adapters, "default", [prompt], max_new_tokens=6, eos_token_id=1, pad_token_id=0, seed=0, merge=merge
        )
        with torch.no_grad(), adapters.using("default"):
            row = adapters.causal(input_ids=torch.tensor([prompt + drawn.tokens[0]])).logits
        own = logps(row)[0, len(prompt) - 1 : -1].gather(1, torch.tensor(drawn.tokens[0])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(drawn.logprobs[0]), own, rtol=0, atol=1e-4)


@pytest.mark.checklist("L3")
@pytest.mark.parametrize("kind", KINDS)
def test_l03_a_child_of_it_is_an_exact_copy_and_so_is_its_reference(base: Base, tmp_path: Path, kind: str):
    trained(base, kind).save("default", tmp_path, done=True)
    child = made(base, kind, tmp_path, dropout=0.1)
    child.copy("ref")
    assert child.digest("default") == child.digest("ref") == adapter_sha256(tmp_path)
    for name, each in lora_state(child._layers, "default").items():
        assert each.requires_grad, name
    again = AdapterSet.create(load_model(base), base, LoraSpec.of(tmp_path), tmp_path)
    assert again.digest("default") == adapter_sha256(tmp_path)
    three_steps(child.model.eval(), child.parameters("default"))
    assert child.digest("ref") == adapter_sha256(tmp_path) != child.digest("default")


@pytest.mark.checklist("L3")
def test_l03_a_child_that_could_not_be_exact_is_refused(base: Base, tmp_path: Path):
    folders = {kind: tmp_path / kind for kind in ("plain", "DoRA", "PiSSA", "patterns")}
    for kind, folder in folders.items():
        trained(base, kind).save("default", folder, done=True)
    for parent, kind, more, words in [
        ("plain", "DoRA", {}, r"lora\.use_dora.*true, and .* is none"),
        ("DoRA", "plain", {}, r"lora\.use_dora.*false, and .* is a DoRA"),
        ("PiSSA", "plain", {}, r"lora\.r.*4 is below 8"),
        ("plain", "patterns", {}, r"lora\.alpha_pattern.*up_proj is scaled by"),
        ("patterns", "plain", {}, r"_proj is scaled by"),
        ("patterns", "patterns", {"r": 8}, r"is scaled by"),
        ("patterns", "patterns", {"rank_pattern": {}, "alpha_pattern": {"q_proj": 10}}, r"up_proj is scaled by"),
    ]:
        with pytest.raises(UserError, match=words):
            made(base, kind, folders[parent], **more)


@pytest.mark.checklist("L3")
def test_l03_a_larger_rank_keeps_what_a_dora_computes(base: Base, tmp_path: Path):
    adapters = trained(base, "DoRA")
    adapters.save("default", tmp_path)
    grown = made(base, "DoRA", tmp_path, r=8, alpha=16)
    torch.testing.assert_close(logits(grown, "default"), logits(adapters, "default"), rtol=0, atol=1e-5)


@pytest.mark.checklist("L4")
@pytest.mark.parametrize("kind", ALTERING)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, Adafactor])
def test_l04_the_base_stays_and_so_does_the_half_that_is_taken_out_of_it(base: Base, kind: str, optimizer: Any):
    adapters = made(base, kind)
    before, bare_ = adapters.digest(None), logits(adapters, None)
    torch.testing.assert_close(logits(adapters, "default"), bare_, rtol=0, atol=1e-4)
    state = lora_state(adapters._layers, "default")
    start = {name: each.detach().clone() for name, each in state.items()}
    three_steps(adapters.model, adapters.parameters("default"), optimizer)
    assert adapters.digest(None) == before and torch.equal(logits(adapters, None), bare_)
    for name, each in state.items():
        if "lora_A" in name or "lora_B" in name:
            dim = 0 if "lora_A" in name else 1
            half = each.shape[dim] // 2
            now, then = each.detach().split(half, dim), start[name].split(half, dim)
            assert torch.equal(now[1], then[1]), name
            assert not torch.equal(now[0], then[0]), name


@pytest.mark.checklist("L4")
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_8", "olora"])
def test_l04_what_is_taken_out_is_the_principal_part_or_the_first_columns(start: str):
    weight = torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0]))[:, torch.tensor([2, 0, 1, 3])]
    a_RI, b_OR = components(weight, 2, 4.0, start)
    taken = 4.0 * b_OR @ a_RI
    if start == "olora":  # the columns are orthogonal: Q holds their directions, and R is diagonal
        assert torch.allclose(taken[:, :2], 4.0 * weight[:, :2]) and not taken[:, 2:].any()
    else:
        close = 1e-5 if start == "pissa" else 1e-3
        assert torch.allclose(taken[:2], weight[:2], atol=close) and taken[2:].abs().max() < close
    assert components(weight, 9, 1.0, start)[0].shape == (4, 4)


@pytest.mark.checklist("L4")
def test_l04_saved_nothing_is_added_and_taken_away_again(base: Base, tmp_path: Path):
    adapters = trained(base, "PiSSA")
    adapters.save("default", tmp_path / "raw")
    adapters.save("default", tmp_path / "done", done=True)
    raw, done = (load_file(tmp_path / name / ADAPTER_WEIGHTS) for name in ("raw", "done"))
    for name in (each for each in raw if "lora_A" in each):
        other = name.replace("lora_A", "lora_B")
        change = (raw[other].double() @ raw[name].double(), done[other].double() @ done[name].double())
        torch.testing.assert_close(*change, rtol=0, atol=1e-6)
        rows = done[name] @ done[name].t()
        torch.testing.assert_close(rows, torch.eye(len(rows)) / 3, rtol=0, atol=1e-5)
        assert done[other].norm() < raw[other].norm()


@pytest.mark.parametrize("kind", ["DoRA", "PiSSA", "patterns", "layers"])
def test_a_reward_model_of_it_scores_as_in_plain_peft_and_as_a_role(
    base: Base, tokenizer: Any, tmp_path: Path, kind: str
):
    model: Any = create_reward_model(base, tokenizer, spec(kind))
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        model(input_ids=IDS).logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
    save_reward_model(model, base, tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=1, dtype=torch.float32)
    prepare_model(classifier, tokenizer)
    with torch.no_grad():
        found = PeftModel.from_pretrained(classifier, str(tmp_path)).eval()(input_ids=IDS).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    adapters = made(base, "plain")
    adapters.load("reward", tmp_path)
    hidden = adapters.hidden("reward", IDS, torch.ones_like(IDS))
    torch.testing.assert_close(adapters.heads["reward"](hidden)[:, -1:], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_train_are_fp32_beside_a_16_bit_base(base: Base, kind: str):
    adapters = AdapterSet.create(load_model(base, dtype=torch.bfloat16), base, spec(kind))
    adapters.copy("value", trainable=True)
    for role in ("default", "value"):
        assert {each.dtype for each in adapters.parameters(role)} == {torch.float32}
    with torch.no_grad(), adapters.using("default"), torch.autocast("cpu", dtype=torch.bfloat16):
        found = adapters.model(input_ids=IDS).logits.float()
    bare_ = adapters.lm_head(adapters.hidden(None, IDS, torch.ones_like(IDS))).float()
    assert (logps(found) - logps(bare_)).abs().mean() < 0.02 * bare_.std()


@pytest.mark.checklist("L5")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_lora_weights": "eva"}, "draws A from activations"),
        ({"init_lora_weights": "corda"}, "covariance of activations"),
        ({"init_lora_weights": "loftq"}, "replaces the base by a quantised one"),
        ({"init_lora_weights": "lora_ga"}, "needs gradients"),
        ({"init_lora_weights": "mica"}, "holds B still"),
        ({"init_lora_weights": False}, "starts with a random change"),
        ({"init_lora_weights": "pissa_niter_0"}, "is no start of an adapter"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "orthogonal has even ranks"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj: 0, expected a whole number"),
        ({"alpha_pattern": {"q_proj": -1}}, "q_proj: -1, expected more than 0"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 1}, "beside a regular expression"),
        ({"layers_pattern": "layers"}, "no effect without layers_to_transform"),
    ],
)
def test_l05_a_start_that_is_not_offered_is_refused_with_why(settings: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        LoraSpec(**{"r": 4, "alpha": 8, **settings})


@pytest.mark.checklist("L5")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank_pattern": {"q_porj": 2}}, r"lora\.rank_pattern.*'q_porj' matches no layer"),
        ({"alpha_pattern": {"k_proj": 2}, "target_modules": ["q_proj"]}, "'k_proj' matches no layer that is adapted"),
        ({"layers_to_transform": [1, 7]}, "no layer 7"),
        ({"exclude_modules": ["q_porj"]}, r"'q_porj' is none of the modules.*did you mean 'q_proj'"),
        ({"exclude_modules": r".*\.nothing"}, "none of the modules that would be adapted"),
        ({"target_modules": r".*\.nothing"}, "matches no module"),
        ({"target_modules": r".*(q_proj|embed_tokens)"}, "is the embedding"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "matches no stacked weight"),
    ],
)
def test_l05_a_setting_that_would_say_nothing_is_refused(base: Base, settings: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        LoraSpec(r=4, alpha=8, **settings).config(load_model(base), "CAUSAL_LM")


@pytest.mark.checklist("L5")
def test_l05_every_field_of_pefts_is_taken_or_refused_in_words():
    names = {each.name for each in dataclasses.fields(LoraConfig)}
    ours = {"lora_alpha": "alpha", "lora_dropout": "dropout"}
    taken = {name for name in names if ours.get(name, name) in Lora.model_fields}
    assert not taken & REFUSED.keys()
    assert names <= taken | REFUSED.keys() | Model.model_fields.keys()  # the base's revision
    # which tokens the base was given is said of the model
    assert {each.name for each in dataclasses.fields(LoraSpec)} == Lora.model_fields.keys() | {"added_tokens"}


def test_a_layer_that_is_not_adapted_is_none_of_the_adapters(base: Base):
    layers = lora_layers(made(base, "excluded").model)
    assert not any(path.endswith("q_proj") or "layers.0.mlp.up_proj" in path for path in layers)
    assert all(".layers.1." in path for path in lora_layers(made(base, "layers").model))
